"""Imports the compiled extension, which registers ``torch.ops.spade_fast``, after checking that it fits this torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def check_torch_version(built_with: str, running: str) -> None:
    """Raise ImportError if the extension was built for a different minor version of torch than the `running` one."""
    if _minor(built_with) != _minor(running):
        raise ImportError(
            f"spade_fast was built for torch {built_with}, but torch {running} is imported; "
            "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps <spade_fast>"
        )


def check_build(record: Path, running: str) -> None:
    """Raise ImportError if the extension was not built, or was built for a torch other than the `running` one."""
    if not record.exists():
        raise ImportError(
            "spade_fast's extension is not built; run in the source folder: pip install --no-build-isolation -e ."
        )
    check_torch_version(json.loads(record.read_text())["torch"], running)


check_build(Path(__file__).with_name("built_with.json"), torch.__version__)

from spade_fast.ops import _C  # noqa: E402, F401
