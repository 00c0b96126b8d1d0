"""Reads the calls of torch's functions that a `TorchFunctionMode` sees: the function's name, and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def function_names(*lines: str) -> frozenset[str]:
    """Return the names in some lines, separated by blanks."""
    return frozenset(" ".join(lines).split())


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name without the underscores of its in-place and operator forms."""
    return getattr(function, "__name__", "").split(".")[0].strip("_")


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    """Return the argument that stands at `place`, or has this name, or else its default."""
    return args[place] if len(args) > place else kwargs.get(name, default)
