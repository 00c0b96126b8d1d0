"""Number of floating-point operations of an op, computed from the shapes of its arguments.

For native ops these are the operations of the algorithm, with symmetric halves and shared products counted once. For
torch's ops they are those that `torch.utils.flop_counter` counts: convolutions, matrix products and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_Formula = Callable[..., float]


def count(op: Any, arguments: Sequence[Any], keywords: dict[str, Any], result: Any) -> float:
    """Return the operations of one call of an op overload; 0 for ops that are not counted."""
    if op.namespace == "spade_fast":
        _, formula = _NATIVE.get(op.overloadpacket.__name__, (None, None))
        return float(formula(*arguments, **keywords)) if formula else 0.0
    formula = flop_registry.get(op.overloadpacket)
    return float(formula(*arguments, **keywords, out_val=result)) if formula else 0.0


def stage_of(op: Any) -> str | None:
    """Return the stage that a native op forms by itself; None for other ops, which count for the stage around them."""
    return _NATIVE[op.overloadpacket.__name__][0] if op.namespace == "spade_fast" else None


def gram_linear(gram: Tensor, x: Tensor) -> float:
    """``N C²`` per sample: one product and one sum per pair of columns."""
    samples, positions, columns = x.shape
    return samples * positions * columns**2


def gram_conv2d(
    gram: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> float:
    """One product and one sum per pair of values of an image that lie under the kernel at the same time.

    Pairs of taps at the same distance share these products, so this is less work than with im2col.
    """
    images, channels, *size = x.shape
    groups = gram.shape[1]
    geometry = zip(size, kernel_size, stride, padding, dilation, strict=True)
    rows, columns = (_pairs(*axis) for axis in geometry)
    return images * groups * (channels // groups) ** 2 * rows * columns


@lru_cache
def _pairs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the number of ordered pairs of positions along an axis that lie under the kernel at the same time."""
    pairs: set[tuple[int, int]] = set()
    for start in range(-padding, size + padding - dilation * (kernel - 1), stride):
        seen = [start + tap * dilation for tap in range(kernel) if 0 <= start + tap * dilation < size]
        pairs.update((a, b) for a in seen for b in seen)
    return len(pairs)


def inverse_cholesky(hessian: Tensor, damp: Tensor) -> float:
    """``2 C³ / 3``: a Cholesky factorisation and a triangular inverse."""
    return hessian.shape[0] * 2 * hessian.shape[1] ** 3 / 3


def reverse_cholesky(hessian: Tensor, damp: Tensor) -> float:
    """``C³ / 3``: a Cholesky factorisation."""
    return hessian.shape[0] * hessian.shape[1] ** 3 / 3


def obs_path(weight: Tensor, hinv: Tensor, block: int) -> float:
    """``C³ / 3`` per row: a pivoted Cholesky factorisation."""
    problems, rows, columns = weight.shape
    return problems * rows * columns**3 / 3


def nm_path(weight: Tensor, hinv: Tensor, n: int, m: int) -> float:
    """``(C³ - (C - P)³) / 3`` per row: a pivoted Cholesky factorisation that stops after P pivots."""
    problems, rows, columns = weight.shape
    return problems * rows * (columns**3 - (columns - columns // m * n) ** 3) / 3


def obs_solution(weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int) -> float:
    """``n³ / 3`` per factorised system of n removed or n kept weights; a row has one system, or one of each kind."""
    columns = weight.shape[2]
    removed = (counts.flatten(0, -3) if counts.dim() > 2 else counts[None]).double().mul(block).sort(0).values
    gone, kept = F.pad(removed, (0, 0, 0, 0, 1, 0)), F.pad(columns - removed, (0, 0, 0, 0, 0, 1))
    return float((gone.pow(3) + kept.pow(3)).amin(0).sum()) / 3


def sparsegpt(weight: Tensor, *_: Any) -> float:
    """``R C²``: each column's error is subtracted from the columns to its right."""
    problems, rows, columns = weight.shape
    return problems * rows * columns**2


_NATIVE: dict[str, tuple[str, _Formula]] = {
    "gram_linear_": ("gram", gram_linear),
    "gram_conv2d_": ("gram", gram_conv2d),
    "inverse_cholesky": ("factor", inverse_cholesky),
    "reverse_cholesky": ("factor", reverse_cholesky),
    "obs_path": ("path", obs_path),
    "nm_path": ("path", nm_path),
    "obs_solution": ("solution", obs_solution),
    "sparsegpt": ("sweep", sparsegpt),
}
