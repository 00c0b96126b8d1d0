"""One solve of a layer for a batch of samples: factors of its Hessians, then its weights at one or more sparsities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spade_fast import ops
from spade_fast._util.errors import NotPositiveDefiniteError
from spade_fast.pruning.counts import mask_block_counts, smallest
from spade_fast.pruning.layers import Layer

_FIRST_RETRY = 1e-6
_ENERGY_COLUMNS = 512
# Weights in dead columns are replaced by this share of the largest weight: they are then removed before all others
# except zeros, and the result still shows which of them were removed.
_NEGLIGIBLE = 1e-12
# SparseGPT with the factor of the Hessian saves C³/3 operations of the factorisation, and adds R C times this to each
# sweep, which fills its vectors up to some rows (measured with one thread of an AMD EPYC of family 25, Zen 4).
_ADDED_BY_SWEEP = 128
_SWEPT_ROWS = 32


@dataclass(frozen=True)
class Problem:
    """A layer's weight ``[G, R, C]`` in solver order, how to prune it, and the zeros per column ``[G, C]``."""

    layer: Layer
    weight: Tensor
    solver: str
    block: int
    zeros: Tensor


@dataclass
class Solution:
    """Pruned weights ``[S, G, R, C]``, and the solver's figures ``[S]`` on how each sample was solved."""

    pruned: Tensor
    loss: Tensor
    damping: Tensor
    retries: Tensor
    dead_columns: Tensor
    failed: Tensor


@torch.no_grad()
def solve_once(
    problem: Problem, hessians: Tensor, removed: Sequence[int], damping: float, *, read: bool
) -> list[Solution]:
    """Solve for all samples, once for each of the numbers of weights to remove.

    Parameters
    ----------
    problem
        What to prune.
    hessians : Tensor ``[S, G, C, C]``
        Used as scratch space, and restored.
    removed
        Number of weights to remove at each sparsity.
    damping
        Share of a problem's mean diagonal added to its diagonal.
    read
        Whether values may be read, which synchronises on a GPU. If so, failed factorisations are repeated with more
        damping.

    Returns
    -------
    list of Solution
        One per sparsity. With exact OBS all follow from one path; with SparseGPT they share one factor, and each needs
        a sweep, because its masks depend on all earlier removals.

    Raises
    ------
    NotPositiveDefiniteError
        With `read`: a Hessian is not positive definite even with damping 1.
    """
    between = [count for count in removed if 0 < count < problem.layer.numel]
    solved = iter(_solve(problem, hessians, between, damping, read) if between else [])
    return [
        next(solved) if 0 < count < problem.layer.numel else _all_or_nothing(problem.weight, hessians, count)
        for count in removed
    ]


def _all_or_nothing(weight: Tensor, hessians: Tensor, removed: int) -> Solution:
    rest = weight if removed == 0 else torch.zeros_like(weight)
    none = torch.zeros(len(hessians), device=weight.device)
    loss = energy(weight - rest, hessians) / 2
    dead = (hessians.diagonal(dim1=2, dim2=3) == 0).sum((1, 2))
    return Solution(rest.repeat(len(hessians), 1, 1, 1), loss, none, none, dead, none)


def _solve(problem: Problem, hessians: Tensor, removed: Sequence[int], damping: float, read: bool) -> list[Solution]:
    layer, weight, samples = problem.layer, problem.weight, len(hessians)
    natural = layer.natural_order(weight.device) if problem.solver == "sparsegpt" and layer.taps > 1 else None
    zeros = problem.zeros
    dense = weight if natural is None else weight[..., natural]
    dense = dense.expand(samples, *dense.shape).flatten(0, 1)
    hessian = hessians.flatten(0, 1)
    if natural is not None:
        zeros = zeros[:, layer.natural_order(zeros.device)]
        by_tap = hessian.unflatten(2, (layer.taps, -1)).unflatten(1, (layer.taps, -1))
        hessian = by_tap.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)

    diagonal = hessian.diagonal(dim1=1, dim2=2)
    undamped = diagonal.clone()
    dead = undamped == 0
    scale = undamped.sum(1) / (~dead).sum(1).clamp(min=1)
    diagonal += torch.where(dead, torch.where(scale > 0, scale, 1)[:, None], 0)
    weights = torch.where(dead[:, None], dense.sign() * (_NEGLIGIBLE * weight.abs().max()), dense)
    of_inverse = not _takes_factor_of_hessian(problem, hessian, len(removed))
    factors = ops.inverse_cholesky if of_inverse else ops.reverse_cholesky
    try:
        factor, positive, shares, retries = _factorise(factors, layer, hessian, scale, damping, read)
        if problem.solver == "exact":
            inverse = ops.mirror_upper_(ops.gram_linear_(torch.zeros_like(factor), factor))
            del factor
            diagonal += (shares * scale)[:, None]
            exact = _exact_beside_zeros if zeros.numpy().any() else _exact
            results = exact(weights, hessian, inverse, samples, removed, problem.block)
        else:
            results = []
            for count in removed:
                counts = mask_block_counts(zeros, layer.rows, count, problem.block)
                counts = counts.to(weight.device, non_blocking=True).repeat(samples, 1)
                given = (weights, factor, counts, problem.block)
                results.append(ops.sparsegpt(*given, keep_zeros=True, of_inverse=of_inverse))
    finally:
        diagonal.copy_(undamped)

    def by_sample(result: Tensor) -> Tensor:
        return result.unflatten(0, (samples, layer.groups))

    solutions = []
    for pruned, losses in results:
        good = positive & torch.isfinite(pruned).all(2).all(1) & torch.isfinite(losses).all(1)
        pruned = torch.where(dead[:, None] & (pruned != 0), dense, pruned)
        if natural is not None:
            pruned = torch.empty_like(pruned).index_copy_(2, natural, pruned)
        solution = Solution(
            by_sample(pruned),
            by_sample(losses).sum((1, 2), dtype=torch.float64),
            by_sample(shares).amax(1),
            by_sample(retries).sum(1),
            by_sample(dead).sum((1, 2)),
            ~by_sample(good).all(1),
        )
        solutions.append(solution)
    return solutions


def _exact(
    weights: Tensor, hessian: Tensor, inverse: Tensor, samples: int, removed: Sequence[int], block: int
) -> list[tuple[Tensor, Tensor]]:
    """Run exact OBS; return the weights after each sample's removals of smallest loss, and the losses per row."""
    order, losses = ops.obs_path(weights, inverse, block)
    ranked = losses.unflatten(0, (samples, -1))
    counts = torch.stack([smallest(ranked, count // block).sum(3).flatten(0, 1) for count in removed])
    steps = torch.arange(losses.shape[2], device=losses.device)
    spent = [torch.where(steps < of_rows[:, :, None], losses, 0).sum(2) for of_rows in counts]
    return list(zip(_weights_after(weights, hessian, inverse, order, counts, block), spent, strict=True))


def _exact_beside_zeros(
    weights: Tensor, hessian: Tensor, inverse: Tensor, samples: int, removed: Sequence[int], block: int
) -> list[tuple[Tensor, Tensor]]:
    """Run exact OBS on weights some of which are zero, and keep those zero; return what `_exact` returns.

    The zeros of a row are removed first, also those in blocks that stay, and count among the removals. Blocks are
    removed in the order of their path as long as the number of removals is not exceeded.
    """
    order, losses = ops.obs_path(weights, inverse, block)
    columns = (order.long()[..., None] * block + torch.arange(block, device=order.device)).flatten(2)
    nonzero = (weights != 0).gather(2, columns)
    zeros = (~nonzero).sum(2)
    removals = nonzero.unflatten(2, (-1, block)).sum(3)  # of each block
    ranks = losses.sort(2).values.unflatten(0, (samples, -1)).flatten(1).argsort(dim=1, stable=True)
    total = zeros.unflatten(0, (samples, -1)).sum((1, 2))[:, None]
    total = total + removals.unflatten(0, (samples, -1)).flatten(1).gather(1, ranks).cumsum(1)
    counts = []
    for count in removed:
        chosen = torch.empty_like(ranks, dtype=torch.bool).scatter_(1, ranks, total <= count)
        blocks = chosen.reshape(losses.shape)
        counts.append(zeros + (removals * blocks).sum(2))
    zeros_first = columns.gather(2, nonzero.to(torch.uint8).argsort(dim=2, stable=True))
    solutions = _weights_after(weights, hessian, inverse, zeros_first, torch.stack(counts), 1)
    changes = [weights - pruned for pruned in solutions]
    return [
        (pruned, ((change @ hessian) * change).sum(2) / 2) for pruned, change in zip(solutions, changes, strict=True)
    ]


def _weights_after(
    weights: Tensor, hessian: Tensor, inverse: Tensor, order: Tensor, counts: Tensor, block: int
) -> Tensor:
    """Return the weights after `counts` ``[sparsities, B, R]`` removals; NaN where no solution exists."""
    try:
        pruned = ops.obs_solution(weights, hessian, inverse, order, counts, block)
        return pruned.reshape(len(counts), *weights.shape)
    except torch.linalg.LinAlgError:  # on a GPU, the rows concerned are NaN instead
        if len(counts) == 1:
            return torch.full_like(weights, math.nan)[None]
        alone = [_weights_after(weights, hessian, inverse, order, one, block) for one in counts.split(1)]
        return torch.cat(alone)


def _takes_factor_of_hessian(problem: Problem, hessian: Tensor, sweeps: int) -> bool:
    """Whether the factor of the Hessian itself, which only SparseGPT on the CPU can use, takes less time in all."""
    columns = hessian.shape[-1]
    added = sweeps * _ADDED_BY_SWEEP * max(problem.layer.rows, _SWEPT_ROWS) * columns
    return problem.solver == "sparsegpt" and hessian.device.type == "cpu" and added < columns**3 / 3


def _factorise(
    factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    layer: Layer,
    hessian: Tensor,
    scale: Tensor,
    damping: float,
    read: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors of the damped Hessians; per problem, whether it has one, its damping and its retries."""
    shares = torch.full_like(scale, damping)
    retries = torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
    factor, info = factors(hessian, shares * scale)
    if not read:
        return factor, info == 0, shares, retries
    failed = info.nonzero().flatten()
    share = damping
    while failed.numel() > 0:
        share = more_damping(layer, share)
        shares[failed] = share
        retries[failed] += 1
        again, info = factors(hessian[failed], share * scale[failed])
        factor[failed] = again
        failed = failed[info != 0]
    return factor, torch.ones_like(scale, dtype=torch.bool), shares, retries


def more_damping(layer: Layer, damping: float) -> float:
    """Return the next larger damping to try."""
    if damping >= 1:
        raise NotPositiveDefiniteError(
            f"layer {layer.name!r}: the Hessian is not positive definite, even with damping {damping:g}"
        )
    return _FIRST_RETRY if damping < _FIRST_RETRY else min(10 * damping, 1.0)


def energy(weight: Tensor, hessians: Tensor) -> Tensor:
    """Compute ``tr(W H Wᵀ)`` of each sample, summed over groups; each pair of column blocks is multiplied once.

    Parameters
    ----------
    weight : Tensor ``[G, R, C]`` or ``[S, G, R, C]``
    hessians : Tensor ``[S, G, C, C]``

    Returns
    -------
    Tensor ``[S]``, float64
    """
    total = torch.zeros(len(hessians), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[-1], _ENERGY_COLUMNS):
        block = slice(start, start + _ENERGY_COLUMNS)
        own = weight[..., block]
        product = own @ hessians[..., block, block]
        product += 2 * (weight[..., :start] @ hessians[..., :start, block])
        total += product.mul_(own).sum((1, 2, 3), dtype=torch.float64)
    return total
