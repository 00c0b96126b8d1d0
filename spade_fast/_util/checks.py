"""Checks of arguments: each returns what was given in one form or raises an error that names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def integer(name: str, value: Any, least: int) -> int:
    """An integer (and no bool) of at least `least`: else TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def finite_floats(name: str, value: Any, dimensions: str | None = None) -> Tensor:
    """A finite floating-point tensor that is not empty, detached: else TypeError or ValueError.

    Parameters
    ----------
    dimensions
        Names of its dimensions, such as ``"samples, classes"``; None for any shape.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind(value)}")
    if value.numel() == 0 or (dimensions is not None and value.dim() != dimensions.count(",") + 1):
        shape = "" if dimensions is None else f"have shape [{dimensions}] and "
        raise ValueError(f"{name} must {shape}not be empty, got {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has NaN or infinite values")
    return value.detach()


def class_indices(name: str, value: Any, samples: int, device: torch.device) -> Tensor:
    """One class for all samples or one a sample, as int64 ``[samples]``: else TypeError or ValueError."""
    try:
        classes = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, got {value!r}") from error
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {classes.dtype}")
    if classes.shape not in ((), (samples,)):
        raise ValueError(f"{name} must be one for all or one for each of {samples} samples, got {list(classes.shape)}")
    return classes.long().expand(samples)


def array(value: Any) -> np.ndarray:
    """A tensor (of any device), array or sequence as an array."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return value.double().numpy() if value.is_floating_point() else value.numpy()


def kind(value: Any) -> str:
    """What to call a value of the wrong type."""
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
