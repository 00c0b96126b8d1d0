"""Progress of the commands: bars on a terminal, lines from time to time elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spade_fast._util.extras import extra_for
from spade_fast._util.progress import Progress
from spade_fast.cli.options import stderr

with extra_for("spade-fast needs"):
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

_SECONDS_PER_LINE = 5.0


def has_terminal() -> bool:
    """Whether progress goes to a terminal that can redraw it."""
    return stderr.is_terminal and not stderr.is_dumb_terminal


def lines(seconds: float) -> Callable[[str], None]:
    """Return a function that prints a line: the first, and then those that come `seconds` or more after the last."""
    due = 0.0

    def line(text: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            stderr.print(text, markup=False)

    return line


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """Yield a callback that shows the stages of a command."""
    if not has_terminal():
        line = lines(_SECONDS_PER_LINE)
        yield lambda stage, done, total: line(f"{stage}: {done}/{total}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=stderr) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
