"""How many weights to remove from a layer and from each mask block, and which losses are the smallest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.pruning.layers import Layer


def removal_target(layer: Layer, sparsity: float, block: int) -> int:
    """Return how many weights to remove: the multiple of `block` nearest to ``sparsity * numel``."""
    return round(sparsity * layer.numel / block) * block


def count_zeros(weight: Tensor) -> Tensor:
    """Count the zero weights of each column of a weight ``[groups, rows, columns]``, on the CPU."""
    return (weight == 0).sum(1).cpu()


def mask_block_counts(zeros: Tensor, rows: int, removed: int, block: int) -> Tensor:
    """Removals in each mask block of a layer, from the zero weights of its columns ``[groups, columns]``."""

    def by_block(of_columns: Tensor) -> Tensor:
        return F.pad(of_columns, (0, -of_columns.shape[1] % block)).unflatten(1, (-1, block)).sum(2)

    sizes = by_block(torch.full_like(zeros, rows))
    return removal_counts(removed, sizes.flatten(), by_block(zeros).flatten()).reshape(sizes.shape)


def removal_counts(total: int, sizes: Tensor, zeros: Tensor) -> Tensor:
    """Spread removals over the mask blocks of a layer, as evenly as whole numbers can be.

    A block gets at least as many as it has zeros, since these stay zero where a column is dead; the others then get
    fewer, so that the total is kept.

    Parameters
    ----------
    total
        Weights to remove in the whole layer, at most all.
    sizes : Tensor of int64
        Weights in each mask block.
    zeros : Tensor of int64
        Weights in each mask block that are already zero.

    Returns
    -------
    Tensor of int64
        Removals in each mask block; they add up to `total`.
    """
    if int(zeros.sum()) >= total:
        return _in_proportion(total, zeros)
    counts = zeros.clone()
    free = torch.ones_like(zeros, dtype=torch.bool)
    while True:
        shares = _in_proportion(total - int(zeros[~free].sum()), sizes[free])
        enough = shares >= zeros[free]
        if bool(enough.all()):
            counts[free] = shares
            return counts
        free[free.clone()] = enough


def _in_proportion(total: int, sizes: Tensor) -> Tensor:
    """Whole numbers that add up to `total`, each within one of its part by size."""
    ends = sizes.cumsum(0)
    size = max(1, int(sizes.sum()))
    return ((2 * total * ends + size) // (2 * size)).diff(prepend=ends.new_zeros(1))


def smallest(losses: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest entries of each sample; of equal ones, those that come first.

    Parameters
    ----------
    losses : Tensor, [samples, ...]

    Returns
    -------
    Tensor of bool, of the shape of `losses`
    """
    if count == 0:
        return torch.zeros_like(losses, dtype=torch.bool)
    flat = losses.flatten(1)
    if losses.is_cuda:  # where kthvalue is slow, and for torch not deterministic
        threshold = flat.sort(1).values[:, count - 1, None]
    else:
        threshold = flat.kthvalue(count, 1, keepdim=True).values
    chosen = flat < threshold
    ties = flat == threshold
    chosen |= ties & (ties.cumsum(1) <= count - chosen.sum(1, keepdim=True))
    return chosen.reshape(losses.shape)
