"""Prunes one layer from its Gram matrices: exact OBS or SparseGPT, for any number of samples in one call."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast import ops
from spade_fast.layers import Layer

SOLVERS = ("exact", "sparsegpt")

# A mask block of one column leaves no choice in a problem of one row: below this, all columns share one mask block.
_FEW_ROWS = 8
_FIRST_RETRY = 1e-6
_WORKING_BYTES = 1 << 30
_ENERGY_COLUMNS = 512
# Share of the largest weight that stands for weights of dead columns: they go before all but those that are zero
# already, and the mask can be read off the result.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class LayerReport:
    """How one layer of one sample was pruned.

    Attributes
    ----------
    name, shape
        The layer and its parameter's shape.
    sparsity, reached
        Share of weights to remove as asked, and share of weights that are zero now.
    removed
        Number of weights removed.
    solver, block
        ``"exact"`` or ``"sparsegpt"``; neighbouring columns removed together, or of a mask block.
    damping
        Largest share of a problem's mean diagonal that was added to its diagonal.
    retries
        Factorisations that failed for want of damping and were repeated with more.
    dead_columns
        Inputs that were zero in all calibration data (all groups together).
    predicted_error, measured_error
        Relative output error ``‖ΔW X‖ / ‖W X‖`` over the calibration data: summed from the solver's (damped) losses,
        and computed from the final weights.
    seconds
        Time of solving, shared evenly between the samples of a call.
    note
        Why the layer was left alone, or empty.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    reached: float
    removed: int
    solver: str
    block: int
    damping: float = 0.0
    retries: int = 0
    dead_columns: int = 0
    predicted_error: float = 0.0
    measured_error: float = 0.0
    seconds: float = 0.0
    note: str = ""


def default_block(layer: Layer, solver: str) -> int:
    """Return the number of neighbouring columns that are pruned together if nothing else is asked for.

    That is the choice of the published SPADE code: ``kh * kw`` for an ordinary convolution, 1 for linear, 1x1 and
    depthwise layers. SparseGPT takes all columns of a group where a group has fewer than 8 rows, since a mask block of
    one column leaves no choice there.
    """
    if solver == "sparsegpt" and layer.rows < _FEW_ROWS:
        return layer.columns
    return 1 if layer.columns == layer.taps else layer.taps


def check_block(layer: Layer, block: int) -> None:
    """Raise ValueError if `block` columns do not divide those of the layer."""
    if layer.columns % block:
        raise ValueError(f"block {block} does not divide the {layer.columns} columns of layer {layer.name!r}")


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
        Weights in each mask block that are zero before.

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
    """Mark the `count` smallest entries of a tensor; of equal ones, those that come first.

    Returns
    -------
    Tensor of bool, of the shape of `losses`
    """
    flat = losses.flatten()
    if count == 0:
        return torch.zeros_like(losses, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero()[: count - int(chosen.sum())]
    chosen[ties] = True
    return chosen.reshape(losses.shape)


def solve_layer(
    layer: Layer,
    weight: Tensor,
    hessians: Tensor,
    *,
    solver: str,
    sparsity: float,
    block: int | None = None,
    damping: float = 0.01,
) -> tuple[Tensor, list[LayerReport]]:
    """Prune one layer for one or more samples.

    Both solvers remove exactly ``round(sparsity * numel)`` weights; exact OBS in blocks removes the nearest whole
    number of blocks. Exact OBS ranks the removals of all rows and groups of the layer together. SparseGPT removes the
    same share of each mask block, of columns in the order (in-channel, kh, kw) of the published code. Weights that are
    zero already count. In dead columns (inputs that are always zero) removal costs nothing, and what survives keeps its
    value.

    Parameters
    ----------
    layer
        Geometry of the layer.
    weight : Tensor, [groups, rows, columns]
        Dense weight in solver order, float32 or float64.
    hessians : Tensor, [samples, groups, columns, columns]
        Gram matrices or Hessians: a factor common to all groups of a sample changes nothing. Used as scratch space, but
        as before afterwards.
    solver : "exact" or "sparsegpt"
    sparsity : float
        Between 0 and 1.
    block : int or None
        Neighbouring columns that go together (exact OBS), or columns of a mask block (SparseGPT); see
        :func:`default_block`.
    damping : float
        Share of a problem's mean diagonal (over inputs that are not dead) added to its diagonal. A problem that cannot
        be factorised is tried again with ten times more (at least 1e-6), and so on up to 1; a sample whose solution
        fails later, likewise.

    Returns
    -------
    pruned : Tensor, [samples, groups, rows, columns]
    reports : list of LayerReport, one a sample

    Raises
    ------
    ValueError
        `block` does not divide the columns.
    torch.linalg.LinAlgError
        A Hessian is not positive definite even with damping 1.
    """
    block = default_block(layer, solver) if block is None else block
    check_block(layer, block)
    start = time.perf_counter()
    removed = removal_target(layer, sparsity, block if solver == "exact" else 1)
    chunk = max(1, _WORKING_BYTES // (4 * hessians[0].nbytes))
    solutions: list[_Solution] = []
    for part in hessians.split(chunk):
        if 0 < removed < layer.numel:
            solutions += _solve_stably(layer, weight, part, removed, solver, block, damping)
        else:
            rest = weight.clone() if removed == 0 else torch.zeros_like(weight)
            dead = (part.diagonal(dim1=2, dim2=3) == 0).sum((1, 2)).tolist()
            losses = [_energy(weight - rest, hessian) / 2 for hessian in part]
            solutions += [_Solution(rest, loss, 0.0, 0, d) for loss, d in zip(losses, dead, strict=True)]
    pruned = torch.stack([solution.pruned for solution in solutions])
    errors = [_relative_errors(weight, *pair) for pair in zip(solutions, hessians, strict=True)]
    seconds = (time.perf_counter() - start) / len(solutions)
    reports = [
        LayerReport(
            name=layer.name,
            shape=layer.shape,
            sparsity=sparsity,
            reached=1 - int(solution.pruned.count_nonzero()) / layer.numel,
            removed=removed,
            solver=solver,
            block=block,
            damping=solution.damping,
            retries=solution.retries,
            dead_columns=solution.dead_columns,
            predicted_error=predicted,
            measured_error=measured,
            seconds=seconds,
        )
        for solution, (predicted, measured) in zip(solutions, errors, strict=True)
    ]
    return pruned, reports


def removal_target(layer: Layer, sparsity: float, block: int) -> int:
    """Return how many weights to remove: the multiple of `block` nearest to ``sparsity * numel``."""
    return round(sparsity * layer.numel / block) * block


@dataclass
class _Solution:
    """One sample's weights ``[groups, rows, columns]`` and what the solver says about them."""

    pruned: Tensor
    loss: float
    damping: float
    retries: int
    dead_columns: int


class _UnstableError(Exception):
    """The factorisation went well, but not what is computed from it."""


def _solve_stably(
    layer: Layer, weight: Tensor, hessians: Tensor, removed: int, solver: str, block: int, damping: float
) -> list[_Solution]:
    """Solve, with more damping for each sample that would have no finite solution."""
    settings = (removed, solver, block)
    try:
        return _solve(layer, weight, hessians, *settings, damping)
    except _UnstableError:
        if len(hessians) > 1:
            alone = [_solve_stably(layer, weight, one, *settings, damping) for one in hessians.split(1)]
            return [solution for (solution,) in alone]
        (solution,) = _solve_stably(layer, weight, hessians, *settings, _more_damping(layer, damping))
        return [replace(solution, retries=solution.retries + 1)]


def _solve(
    layer: Layer, weight: Tensor, hessians: Tensor, removed: int, solver: str, block: int, damping: float
) -> list[_Solution]:
    samples = len(hessians)
    natural = layer.natural_order(weight.device) if solver == "sparsegpt" and layer.taps > 1 else None
    dense = weight if natural is None else weight[..., natural]
    dense = dense.expand(samples, *dense.shape).flatten(0, 1)
    hessian = hessians.flatten(0, 1)
    if natural is not None:
        by_tap = hessian.unflatten(2, (layer.taps, -1)).unflatten(1, (layer.taps, -1))
        hessian = by_tap.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)

    diagonal = hessian.diagonal(dim1=1, dim2=2)
    undamped = diagonal.clone()
    dead = undamped == 0
    scale = undamped.sum(1) / (~dead).sum(1).clamp(min=1)
    diagonal += torch.where(dead, torch.where(scale > 0, scale, 1)[:, None], 0)
    weights = torch.where(dead[:, None], dense.sign() * (_NEGLIGIBLE * weight.abs().max()), dense)
    try:
        factor, shares, retries = _factorise(layer, hessian, scale, damping)
        if solver == "exact":
            inverse = ops.mirror_upper_(ops.gram_linear_(torch.zeros_like(factor), factor))
            del factor
            diagonal += (shares * scale)[:, None]
            pruned, losses = _exact(weights, hessian, inverse, samples, removed, block)
        else:
            counts = _mask_block_counts(dense[: layer.groups], removed, block)
            pruned, losses = ops.sparsegpt(weights, factor, counts.repeat(samples, 1), block)
    finally:
        diagonal.copy_(undamped)
    if not bool(torch.isfinite(pruned).all() & torch.isfinite(losses).all()):
        raise _UnstableError
    pruned = torch.where(dead[:, None] & (pruned != 0), dense, pruned)
    if natural is not None:
        pruned = torch.empty_like(pruned).index_copy_(2, natural, pruned)

    pruned, losses, dead, shares, retries = (
        result.unflatten(0, (samples, layer.groups)) for result in (pruned, losses, dead, shares, retries)
    )
    return [
        _Solution(
            pruned[s],
            float(losses[s].sum(dtype=torch.float64)),
            float(shares[s].max()),
            int(retries[s].sum()),
            int(dead[s].sum()),
        )
        for s in range(samples)
    ]


def _exact(
    weights: Tensor, hessian: Tensor, inverse: Tensor, samples: int, removed: int, block: int
) -> tuple[Tensor, Tensor]:
    """Exact OBS: weights after the removals of least loss of each sample, and the summed losses of each row."""
    order, losses = ops.obs_path(weights, inverse, block)
    by_sample = losses.unflatten(0, (samples, -1))
    counts = torch.cat([smallest(of_sample, removed // block).sum(2) for of_sample in by_sample])
    try:
        pruned = ops.obs_solution(weights, hessian, inverse, order, counts, block)
    except torch.linalg.LinAlgError as error:
        raise _UnstableError from error
    done = torch.arange(losses.shape[2], device=losses.device) < counts[:, :, None]
    return pruned, torch.where(done, losses, 0).sum(2)


def _mask_block_counts(weight: Tensor, removed: int, block: int) -> Tensor:
    """Removals in each mask block of a layer's weight ``[groups, rows, columns]``."""

    def by_block(of_columns: Tensor) -> Tensor:
        return F.pad(of_columns, (0, -of_columns.shape[1] % block)).unflatten(1, (-1, block)).sum(2).cpu()

    zeros = by_block((weight == 0).sum(1))
    sizes = by_block(torch.ones_like(weight, dtype=torch.int64).sum(1))
    return removal_counts(removed, sizes.flatten(), zeros.flatten()).reshape(sizes.shape).to(weight.device)


def _factorise(layer: Layer, hessian: Tensor, scale: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the damped inverses, the share of `scale` that damps each problem, and failed tries of each."""
    shares = torch.full_like(scale, damping)
    retries = torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
    factor, info = ops.inverse_cholesky(hessian, shares * scale)
    failed = info.nonzero().flatten()
    share = damping
    while failed.numel() > 0:
        share = _more_damping(layer, share)
        shares[failed] = share
        retries[failed] += 1
        again, info = ops.inverse_cholesky(hessian[failed], share * scale[failed])
        factor[failed] = again
        failed = failed[info != 0]
    return factor, shares, retries


def _more_damping(layer: Layer, damping: float) -> float:
    """The next step of the damping ladder."""
    if damping >= 1:
        raise torch.linalg.LinAlgError(
            f"layer {layer.name!r}: the Hessian is not positive definite, even with damping {damping:g}"
        )
    return _FIRST_RETRY if damping < _FIRST_RETRY else min(10 * damping, 1.0)


def _energy(weight: Tensor, hessian: Tensor) -> float:
    """``tr(W H Wᵀ)``, all groups together; pairs of column blocks are multiplied once, not once each way round."""
    total = 0.0
    for start in range(0, weight.shape[2], _ENERGY_COLUMNS):
        block = slice(start, start + _ENERGY_COLUMNS)
        own = weight[..., block]
        product = own @ hessian[:, block, block]
        product += 2 * (weight[..., :start] @ hessian[:, :start, block])
        total += float(product.mul_(own).sum(dtype=torch.float64))
    return max(0.0, total)


def _relative_errors(weight: Tensor, solution: _Solution, hessian: Tensor) -> tuple[float, float]:
    """Predicted and measured ``‖ΔW X‖ / ‖W X‖``."""
    output = _energy(weight, hessian)
    if output == 0:
        return 0.0, 0.0
    measured = _energy(solution.pruned - weight, hessian)
    return math.sqrt(2 * solution.loss / output), math.sqrt(measured / output)
