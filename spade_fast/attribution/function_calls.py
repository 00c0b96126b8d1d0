"""Reads the calls of torch's functions that a `TorchFunctionMode` sees: the function's name, and its arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch

_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__).parent


def function_names(*lines: str) -> frozenset[str]:
    """Return the names in some lines, separated by blanks."""
    return frozenset(" ".join(lines).split())


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name without the underscores of its in-place and operator forms."""
    return getattr(function, "__name__", "").split(".")[0].strip("_")


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    """Return the argument that stands at `place`, or has this name, or else its default."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def overwrites(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call overwrites its first argument by the result."""
    full = getattr(function, "__name__", "").split(".")[0]
    return kwargs.get("inplace") is True or full == "__setitem__" or (full[-1:] == "_" != full[-2:-1])


def place_of_call(start: CodeType) -> str:
    """Return the line of the network's code that is running, if the function `start` began to run the network."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not start:
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(_TORCH) and not path.is_relative_to(_HERE):
            return f", called at {path}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
