"""Counts of weights: how many to remove from a layer and each of its mask blocks, and which losses are the smallest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.pruning.layers import Layer


def removal_target(layer: Layer, sparsity: float, block: int) -> int:
    """Return the number of weights to remove: the multiple of `block` nearest to ``sparsity * numel``."""
    return round(sparsity * layer.numel / block) * block


def count_zeros(weight: Tensor) -> Tensor:
    """Count the zero weights in each column of a weight ``[G, R, C]``; the counts ``[G, C]`` are on the CPU."""
    return (weight == 0).sum(1).cpu()


def mask_block_counts(zeros: Tensor, rows: int, removed: int, block: int) -> Tensor:
    """Return the number of removals in each mask block of a layer, given the zero weights per column ``[G, C]``."""

    def by_block(of_columns: Tensor) -> Tensor:
        return F.pad(of_columns, (0, -of_columns.shape[1] % block)).unflatten(1, (-1, block)).sum(2)

    sizes = by_block(torch.full_like(zeros, rows))
    return removal_counts(removed, sizes.flatten(), by_block(zeros).flatten()).reshape(sizes.shape)


def removal_counts(total: int, sizes: Tensor, zeros: Tensor) -> Tensor:
    """Distribute removals over the mask blocks of a layer as evenly as integers allow.

    A block gets at least as many removals as it has zeros, because zeros stay zero in any case; the other blocks then
    get fewer, so that the total is exact.

    Parameters
    ----------
    total
        Number of weights to remove in the whole layer, at most all.
    sizes : Tensor ``[blocks]``, int64
        Number of weights in each mask block.
    zeros : Tensor ``[blocks]``, int64
        Number of weights in each mask block that are already zero.

    Returns
    -------
    Tensor ``[blocks]``, int64
        Number of removals in each mask block; the sum is `total`.
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
    """Return integers that sum to `total`, each within one of the block's proportional share."""
    ends = sizes.cumsum(0)
    size = max(1, int(sizes.sum()))
    return ((2 * total * ends + size) // (2 * size)).diff(prepend=ends.new_zeros(1))


def smallest(losses: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest entries of each sample; among equal entries, the first ones.

    Parameters
    ----------
    losses : Tensor ``[S, ...]``

    Returns
    -------
    Tensor ``[S, ...]``, bool
    """
    if count == 0:
        return torch.zeros_like(losses, dtype=torch.bool)
    flat = losses.flatten(1)
    if losses.is_cuda:  # where kthvalue is slow and not deterministic
        threshold = flat.sort(1).values[:, count - 1, None]
    else:
        threshold = flat.kthvalue(count, 1, keepdim=True).values
    chosen = flat < threshold
    ties = flat == threshold
    chosen |= ties & (ties.cumsum(1) <= count - chosen.sum(1, keepdim=True))
    return chosen.reshape(losses.shape)
