"""The inputs of a weight in a matrix product: of the whole matrix, or of some matrices of a stack of experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spade_fast import ops
from spade_fast.pruning.gram_sums import summable
from spade_fast.pruning.layers import Layer

# The number of an expert, counted from the first of the given weight, and the inputs ``[experts, N, C]`` from there on.
Inputs = tuple[int, Tensor]


def product_inputs(layer: Layer, weight: Tensor, factor: Tensor, left: Tensor, right: Tensor) -> list[Inputs] | None:
    """Return the inputs of a product of two factors, or None if `factor` is not the layer's matrix in its orientation.

    Parameters
    ----------
    layer
        The layer, as which the weight is used.
    weight
        Its weight, or that of some experts.
    factor
        The one of `left` and `right`, ``[N, C]`` and ``[C, R]`` or batches of them, that belongs to the weight.
    """
    matrices = _matrices(layer, weight)
    if matrices is None:
        return None
    weight_on_left = factor is left
    left, right = left.to_dense(), right.to_dense()  # inputs may be sparse
    if right.dim() == 1:
        right = right[:, None]
    if weight_on_left:
        left, right = right.mT, left.mT
    if right.dim() == 3 and (len(right) == 1 or right.stride(0) == 0):  # one matrix for the whole batch
        left, right = left.flatten(0, 1), right[0]
    if right.dim() == 2:
        left, right = left[None], right[None]
    several, rest = divmod(right.shape[2], layer.rows)  # matrices of the stack, one after the other, with equal inputs
    if rest:
        return None
    if several > 1:
        try:
            right = right.mT.view(-1, layer.rows, right.shape[1]).mT
        except RuntimeError:  # their memory is laid out in another way
            return None
        left = left[:, None].expand(-1, several, -1, -1).flatten(0, 1)
    first = _place(matrices, right, factor)
    return None if first is None else [(first, left)]


def grouped_inputs(layer: Layer, weight: Tensor, factor: Tensor, args: Sequence[Any]) -> list[Inputs] | None:
    """Return the inputs of a call of `aten._grouped_mm`, in which each expert multiplies rows of its own."""
    rows, given, *rest = args
    matrices = _matrices(layer, weight)
    if matrices is None or given is not factor or rows.dim() != 2 or given.dim() != 3 or not rest:
        return None
    if len(given) != len(matrices) or _place(matrices, given, factor) != 0:
        return None
    ends = [0, *rest[0].tolist()]
    return [(e, rows[None, start:end]) for e, (start, end) in enumerate(pairwise(ends))]


def add_rows(first: int, inputs: Tensor, scale: float, grams: Tensor) -> None:
    """Add the inputs ``[experts, N, C]``, times a factor, of experts from `first` on to Gram matrices ``[G, C, C]``."""
    gram = grams[first : first + len(inputs)]
    scaled = inputs if scale == 1 else inputs.to(gram.dtype) * scale
    ops.gram_linear_(gram, summable(scaled, gram))


def chosen_experts(weight: Tensor, given: Tensor, function: Any, args: Sequence[Any]) -> Tensor | None:
    """Return which matrices of the stack a call copies: Tensor ``[copies]``; None if it does something else."""
    if weight.dim() != 3 or given.data_ptr() != weight.data_ptr() or not same_view(given, weight):
        return None
    numbers = None
    if function is torch.ops.aten.index and [place for place, one in enumerate(args[1]) if one is not None] == [0]:
        numbers = args[1][0]
    elif function is torch.ops.aten.index_select and args[1] in (0, -3):
        numbers = args[2]
    if numbers is None or numbers.dtype not in (torch.int32, torch.int64):
        return None
    return numbers.flatten() % len(weight)


def same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that start at the same address hold the same elements in the same order."""

    def geometry(tensor: Tensor) -> list[tuple[int, int]]:
        return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]

    return geometry(a) == geometry(b)


def _matrices(layer: Layer, weight: Tensor) -> Tensor | None:
    """Return a view ``[experts, C, R]`` of the weight; None if there is none."""
    if layer.taps != 1 or (weight.numel() < layer.numel and not layer.experts):
        return None
    shape = (layer.columns, layer.rows) if layer.transposed else (layer.rows, layer.columns)
    try:
        matrices = weight.view(-1, *shape)
    except RuntimeError:  # its memory is laid out in another way
        return None
    return matrices if layer.transposed else matrices.mT


def _place(matrices: Tensor, given: Tensor, factor: Tensor) -> int | None:
    """Return the number of the first of the `given` matrices, which start where `factor` does; None if it has none."""
    offset = (factor.data_ptr() - matrices.data_ptr()) // factor.itemsize
    first, rest = divmod(offset, matrices.stride(0)) if len(matrices) > 1 else (0, offset)
    if rest or not 0 <= first <= len(matrices) - len(given):
        return None
    own = matrices[first : first + len(given)]
    return first if own.shape == given.shape and same_view(own, given) else None
