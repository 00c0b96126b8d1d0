"""Progress callbacks of long calls: ``progress(stage, done, total)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore a progress report."""


def titled(progress: Progress, title: str) -> Progress:
    """Return a callback that reports to `progress` with stages named "`title`: STAGE"."""
    return partial(_report, progress, title)


def _report(progress: Progress, title: str, stage: str, done: int, total: int) -> None:
    progress(f"{title}: {stage}", done, total)
