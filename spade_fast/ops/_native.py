"""Loads the compiled extension, which registers ``torch.ops.spade_fast``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def check_torch_version(built_with: str, running: str) -> None:
    """Raise ImportError if the extension was built for another torch minor version than the one that is imported."""
    if _minor(built_with) != _minor(running):
        raise ImportError(
            f"spade_fast was built for torch {built_with}, but torch {running} is imported; "
            "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps <spade_fast>"
        )


def load() -> ModuleType:
    record = Path(__file__).with_name("built_with.json")
    if not record.exists():
        raise ImportError(
            "spade_fast's extension is not built; in the source folder run: pip install --no-build-isolation -e ."
        )
    check_torch_version(json.loads(record.read_text())["torch"], torch.__version__)
    return importlib.import_module("spade_fast.ops._C")


_C = load()
