"""Checks of the arguments of the ops' functions; shapes and values are checked by the native ops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spade_fast._util.checks import is_number, kind
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.ops._native import _C

_NATIVE = {"cpu", "meta", "cuda"} if _C.build_info()["cuda"] else {"cpu", "meta"}


def tensors(op: str, **given: Any) -> list[Tensor]:
    """Return dense tensors where they are computed with: the first one's device if it has native kernels, else the CPU.

    Tensors on the meta device hold only shapes, and stay there. Tensors that require grad are detached.

    Raises
    ------
    TypeError, ValueError
        One is not a dense tensor, or is on the meta device while the first is not.
    """
    for name, value in given.items():
        _check_dense(op, name, value)
    first = next(iter(given.values()))
    home = first.device if first.device.type in _NATIVE else torch.device("cpu")
    return [_moved(op, name, value, home) for name, value in given.items()]


def _moved(op: str, name: str, value: Tensor, home: torch.device) -> Tensor:
    if value.is_meta and home.type != "meta":
        raise InvalidValueError(f"{op}: {name} must hold values, as the first tensor does, got one on 'meta'")
    return (value.detach() if value.requires_grad else value).to(home)


def _check_dense(op: str, name: str, value: Any) -> None:
    """Raise TypeError if `value` is not a tensor, or one that is sparse, quantised or nested, or a negated bool."""
    if not isinstance(value, Tensor):
        raise InvalidTypeError(f"{op}: {name} must be a tensor, got {kind(value)}")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        described = "nested" if value.is_nested else "quantised" if value.is_quantized else str(value.layout)
        raise InvalidTypeError(f"{op}: {name} must be a dense tensor, got one that is {described}")
    if value.dtype == torch.bool and is_negated(value):
        raise InvalidTypeError(f"{op}: {name} must be numbers, got a negated view of torch.bool")


def is_negated(tensor: Tensor) -> bool:
    """Whether a tensor is the negated view of another; the compiler cannot tell, and its code makes none."""
    return not torch.compiler.is_compiling() and tensor.is_neg()


def integer(op: str, name: str, value: Any) -> int:
    """Return an integer (not a bool) that a native op can take."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise InvalidTypeError(f"{op}: {name} must be an integer, got {kind(value)}")
    if isinstance(value, int) and not -(2**62) <= value < 2**63:  # what torch passes on
        raise InvalidValueError(f"{op}: {name} must be between -2^62 and 2^63 - 1")
    number: Any = int(value) if isinstance(value, np.integer) else value
    return number


def pair(op: str, name: str, value: Any) -> list[int]:
    """Return the integers of a tuple or list; a single integer stands for two equal ones."""
    if isinstance(value, (tuple, list)):
        return [integer(op, name, one) for one in value]
    return [integer(op, name, value)] * 2


def flag(op: str, name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise InvalidTypeError(f"{op}: {name} must be a bool, got {kind(value)}")
    return value


def damping(op: str, value: Any, hessian: Tensor) -> Tensor:
    """Return what to add to the diagonal of each problem of `hessian`, on its device and in its dtype."""
    shape = hessian.shape[:1]
    if isinstance(value, Tensor):
        _check_dense(op, "damp", value)
        if value.is_complex() or value.dtype == torch.bool:
            raise InvalidTypeError(f"{op}: damp must be real, got {kind(value)}")
        if value.shape not in ((), shape):
            raise InvalidValueError(f"{op}: damp must have shape {list(shape)} or [], got {list(value.shape)}")
        return _moved(op, "damp", value, hessian.device).to(hessian.dtype).expand(shape)
    if not is_number(value):
        raise InvalidTypeError(f"{op}: damp must be a number or a tensor, got {kind(value)}")
    if not hessian.is_floating_point():
        return hessian  # which the op refuses first
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= torch.finfo(hessian.dtype).max:
        raise InvalidValueError(f"{op}: damp must be finite in {hessian.dtype}, got {number:g}")
    return torch.full((), number, dtype=hessian.dtype, device=hessian.device).expand(shape)
