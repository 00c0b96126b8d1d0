"""Checks of arguments, which return them in a normalised form or raise an error, and suggestions for unknown names."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.text import first_line


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Return `value` if it is an integer (not a bool) of at least `least`; otherwise raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise InvalidValueError(f"{name} must be at least {least}, got {value}")
    return value


def number(name: str, value: Any, least: float, most: float = sys.float_info.max) -> float:
    """Return `value` as a float if it is a number in ``[least, most]``; otherwise raise TypeError or ValueError."""
    if not is_number(value):
        raise InvalidTypeError(f"{name} must be a number, got {value!r}")
    if not least <= value <= most:
        unlimited = most == sys.float_info.max
        limits = f"be finite and at least {least:g}" if unlimited else f"lie between {least:g} and {most:g}"
        raise InvalidValueError(f"{name} must {limits}, got {value!r}")
    return float(value)


def sides(name: str, value: Any) -> tuple[int, int]:
    """Return height and width given as one number or two; otherwise raise TypeError or ValueError."""
    given = value if isinstance(value, tuple | list) else (value, value)
    if len(given) != 2:
        raise InvalidValueError(f"{name} must be a number or a height and a width, got {value!r}")
    return integer(name, given[0], 1), integer(name, given[1], 1)


def normalisation(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel; otherwise raise TypeError or ValueError."""
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"mean and std must be numbers, one per channel, got {mean!r} and {std!r}") from error
    if len(mean) != len(std) or not mean:
        raise InvalidValueError(f"mean and std must have one number per channel, got {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise InvalidValueError(f"mean must be finite, std positive and finite, got {mean} and {std}")
    return mean, std


def finite_floats(name: str, value: Any, dimensions: str | None = None) -> Tensor:
    """Return `value`, detached, if it is a non-empty, finite floating-point tensor; else raise TypeError or ValueError.

    Parameters
    ----------
    dimensions
        Names of the dimensions, such as ``"samples, classes"``; None for any shape.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InvalidTypeError(f"{name} must be a floating-point tensor, got {kind(value)}")
    if value.numel() == 0 or (dimensions is not None and value.dim() != dimensions.count(",") + 1):
        shape = "" if dimensions is None else f"have shape [{dimensions}] and "
        raise InvalidValueError(f"{name} must {shape}not be empty, got {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise InvalidValueError(f"{name} has NaN or infinite values")
    return value.detach()


def class_indices(name: str, value: Any, samples: int, device: torch.device) -> Tensor:
    """Return one class for all samples or one per sample as int64 ``[S]``; otherwise raise TypeError or ValueError."""
    try:
        classes = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"{name} must be integers, got {value!r}") from error
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise InvalidTypeError(f"{name} must be integers, got {classes.dtype}")
    if classes.shape not in ((), (samples,)):
        raise InvalidValueError(
            f"{name} must be one class for all samples or one for each of {samples} samples, got {list(classes.shape)}"
        )
    return classes.long().expand(samples)


def array(value: Any) -> np.ndarray:
    """Convert a tensor (on any device), array or sequence to an array."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return value.double().numpy() if value.is_floating_point() else value.numpy()


def kind(value: Any) -> str:
    """Describe a value of the wrong type in an error message."""
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def is_number(value: Any) -> bool:
    """Whether `value` is a real number and not a bool."""
    return not isinstance(value, bool) and isinstance(value, Real)


def check_names(
    kind: str, names: Sequence[Any], allowed: Iterable[str], also_called: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError if `names` is empty or one of them is not allowed; the message suggests the nearest.

    Parameters
    ----------
    kind
        What they name, such as ``method``.
    also_called
        By allowed name, another name for it, which leads to a suggestion but is not accepted.
    """
    allowed, also_called = list(allowed), also_called or {}
    if not names:
        raise InvalidValueError(f"give at least one {kind} of: {', '.join(allowed)}")
    for name in names:
        if name in allowed:
            continue
        known = {**{one: one for one in allowed}, **{other: one for one, other in also_called.items()}}
        near = [f"{known[one]!r}{'' if one in allowed else f' ({one})'}" for one in nearest(str(name), known)[:1]]
        hint = f"did you mean {near[0]}? Choose" if near else "choose"
        raise InvalidValueError(f"unknown {kind} {name!r}: {hint} from {', '.join(allowed)}")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three of the `known` names that may be meant, the nearest first; case and punctuation count less."""
    by_plain: dict[str, list[str]] = {}
    for one in known:
        by_plain.setdefault(plain(one), []).append(one)
    close = difflib.get_close_matches(plain(name), by_plain, n=3, cutoff=0.5)
    return [one for match in close for one in by_plain[match]][:3]


def plain(name: str) -> str:
    """Return the letters and digits of a name in lower case."""
    return "".join(character for character in name.casefold() if character.isalnum())


def check_device(name: str) -> None:
    """Raise ValueError if tensors cannot be made on the device of this name."""
    try:
        torch.zeros(0, device=name)
        if torch.device(name).type == "meta":
            raise RuntimeError("its tensors have no values")
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InvalidValueError(f"device {name!r} cannot be used: {first_line(error)}") from error
