"""Prunes one layer from its Gram matrices: exact OBS or SparseGPT, for any number of samples in one call."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from spade_fast import ops
from spade_fast.layers import Layer
from spade_fast.removals import count_zeros, mask_block_counts, removal_target, smallest

SOLVERS = ("exact", "sparsegpt")

# A mask block of one column leaves no choice in a problem of one row: below this, all columns share one mask block.
_FEW_ROWS = 8
_FIRST_RETRY = 1e-6
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


def solve_layer(
    layer: Layer,
    weight: Tensor,
    hessians: Tensor,
    *,
    solver: str,
    sparsity: float,
    block: int | None = None,
    damping: float = 0.01,
    zeros: Tensor | None = None,
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
    zeros : Tensor, [groups, columns], or None
        Zero weights of each column, on the CPU, if they were counted before (:func:`count_zeros`).

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

    Notes
    -----
    On a GPU, whether all went well is looked at once, when the work of the layer is done; samples that failed are then
    solved again, one by one.
    """
    block = default_block(layer, solver) if block is None else block
    check_block(layer, block)
    start = time.perf_counter()
    removed = removal_target(layer, sparsity, block if solver == "exact" else 1)
    zeros = count_zeros(weight) if zeros is None else zeros
    settings = (removed, solver, block, zeros)
    chunk = max(1, _working_bytes(weight.device) // (4 * hessians[0].nbytes))
    parts: list[Tensor] = []
    tables: list[Tensor] = []
    for part in hessians.split(chunk):
        if 0 < removed < layer.numel:
            solution = _solve(layer, weight, part, *settings, damping, look=_looking_is_free(weight.device))
        else:
            solution = _all_or_nothing(weight, part, removed)
        parts.append(solution.pruned)
        tables.append(_table(weight, solution, part))
    pruned = torch.cat(parts)
    facts = _look(torch.cat(tables))
    for s, fact in enumerate(facts):
        if fact.failed:
            alone = _solve_stably(layer, weight, hessians[s : s + 1], settings, damping)
            pruned[s] = alone.pruned[0]
            (facts[s],) = _look(_table(weight, alone, hessians[s : s + 1]))
    seconds = (time.perf_counter() - start) / len(facts)
    reports = [
        LayerReport(
            name=layer.name,
            shape=layer.shape,
            sparsity=sparsity,
            reached=1 - fact.nonzero / layer.numel,
            removed=removed,
            solver=solver,
            block=block,
            damping=fact.damping,
            retries=int(fact.retries),
            dead_columns=int(fact.dead_columns),
            predicted_error=fact.relative_error(2 * fact.loss),
            measured_error=fact.relative_error(fact.energy_of_change),
            seconds=seconds,
        )
        for fact in facts
    ]
    return pruned, reports


def _working_bytes(device: torch.device) -> int:
    """Memory for samples that are solved together."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 1 << 30


def _looking_is_free(device: torch.device) -> bool:
    """Whether values can be looked at without waiting for queued work."""
    return device.type == "cpu"


@dataclass
class _Solution:
    """Weights ``[samples, groups, rows, columns]``, and for each sample what the solver says about them."""

    pruned: Tensor
    loss: Tensor
    damping: Tensor
    retries: Tensor
    dead_columns: Tensor
    failed: Tensor


class _Facts(NamedTuple):
    """What is to be known of one sample's solution on the host: a row of `_table`."""

    failed: float
    loss: float
    damping: float
    retries: float
    dead_columns: float
    nonzero: float
    energy: float
    energy_of_change: float

    def relative_error(self, energy: float) -> float:
        """Relative output error of a change of this energy."""
        return math.sqrt(max(0.0, energy) / self.energy) if self.energy > 0 else 0.0


def _table(weight: Tensor, solution: _Solution, hessians: Tensor) -> Tensor:
    """`_Facts` of all samples, ``[samples, facts]``, still on the device."""
    columns = (
        solution.failed,
        solution.loss,
        solution.damping,
        solution.retries,
        solution.dead_columns,
        solution.pruned.count_nonzero((1, 2, 3)),
        _energy(weight, hessians),
        _energy(solution.pruned - weight, hessians),
    )
    return torch.stack([column.double() for column in columns], 1)


def _look(table: Tensor) -> list[_Facts]:
    """Copy a table to the host, which on a GPU waits for all work before."""
    return [_Facts(*row) for row in table.tolist()]


def _all_or_nothing(weight: Tensor, hessians: Tensor, removed: int) -> _Solution:
    rest = weight if removed == 0 else torch.zeros_like(weight)
    none = torch.zeros(len(hessians), device=weight.device)
    loss = _energy(weight - rest, hessians) / 2
    dead = (hessians.diagonal(dim1=2, dim2=3) == 0).sum((1, 2))
    return _Solution(rest.repeat(len(hessians), 1, 1, 1), loss, none, none, dead, none)


def _solve_stably(
    layer: Layer, weight: Tensor, hessian: Tensor, settings: tuple[int, str, int, Tensor], damping: float
) -> _Solution:
    """Solve for one sample, with more damping for as long as there is no finite solution."""
    tries = 0
    while True:
        solution = _solve(layer, weight, hessian, *settings, damping, look=True)
        if not solution.failed.any():
            return replace(solution, retries=solution.retries + tries)
        damping = _more_damping(layer, damping)
        tries += 1


def _solve(
    layer: Layer,
    weight: Tensor,
    hessians: Tensor,
    removed: int,
    solver: str,
    block: int,
    zeros: Tensor,
    damping: float,
    *,
    look: bool,
) -> _Solution:
    """Solve for all samples; if it may `look`, factorisations that failed are repeated with more damping."""
    samples = len(hessians)
    natural = layer.natural_order(weight.device) if solver == "sparsegpt" and layer.taps > 1 else None
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
    try:
        factor, positive, shares, retries = _factorise(layer, hessian, scale, damping, look)
        if solver == "exact":
            inverse = ops.mirror_upper_(ops.gram_linear_(torch.zeros_like(factor), factor))
            del factor
            diagonal += (shares * scale)[:, None]
            pruned, losses = _exact(weights, hessian, inverse, samples, removed, block)
        else:
            counts = mask_block_counts(zeros, layer.rows, removed, block).to(weight.device, non_blocking=True)
            pruned, losses = ops.sparsegpt(weights, factor, counts.repeat(samples, 1), block)
    finally:
        diagonal.copy_(undamped)
    good = positive & torch.isfinite(pruned).all(2).all(1) & torch.isfinite(losses).all(1)
    pruned = torch.where(dead[:, None] & (pruned != 0), dense, pruned)
    if natural is not None:
        pruned = torch.empty_like(pruned).index_copy_(2, natural, pruned)
    pruned, losses, dead, shares, retries, good = (
        result.unflatten(0, (samples, layer.groups)) for result in (pruned, losses, dead, shares, retries, good)
    )
    return _Solution(
        pruned,
        losses.sum((1, 2), dtype=torch.float64),
        shares.amax(1),
        retries.sum(1),
        dead.sum((1, 2)),
        ~good.all(1),
    )


def _exact(
    weights: Tensor, hessian: Tensor, inverse: Tensor, samples: int, removed: int, block: int
) -> tuple[Tensor, Tensor]:
    """Exact OBS: weights after the removals of least loss of each sample, and the summed losses of each row."""
    order, losses = ops.obs_path(weights, inverse, block)
    counts = smallest(losses.unflatten(0, (samples, -1)), removed // block).sum(3).flatten(0, 1)
    try:
        pruned = ops.obs_solution(weights, hessian, inverse, order, counts, block)
    except torch.linalg.LinAlgError:  # on a GPU such rows are not a number instead
        pruned = torch.full_like(weights, math.nan)
    done = torch.arange(losses.shape[2], device=losses.device) < counts[:, :, None]
    return pruned, torch.where(done, losses, 0).sum(2)


def _factorise(
    layer: Layer, hessian: Tensor, scale: Tensor, damping: float, look: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of the damped inverses; for each problem whether it has one, its share of `scale`, and failed tries."""
    shares = torch.full_like(scale, damping)
    retries = torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
    factor, info = ops.inverse_cholesky(hessian, shares * scale)
    if not look:
        return factor, info == 0, shares, retries
    failed = info.nonzero().flatten()
    share = damping
    while failed.numel() > 0:
        share = _more_damping(layer, share)
        shares[failed] = share
        retries[failed] += 1
        again, info = ops.inverse_cholesky(hessian[failed], share * scale[failed])
        factor[failed] = again
        failed = failed[info != 0]
    return factor, torch.ones_like(scale, dtype=torch.bool), shares, retries


def _more_damping(layer: Layer, damping: float) -> float:
    """The next step of the damping ladder."""
    if damping >= 1:
        raise torch.linalg.LinAlgError(
            f"layer {layer.name!r}: the Hessian is not positive definite, even with damping {damping:g}"
        )
    return _FIRST_RETRY if damping < _FIRST_RETRY else min(10 * damping, 1.0)


def _energy(weight: Tensor, hessians: Tensor) -> Tensor:
    """``tr(W H Wᵀ)`` of each sample, all groups together; pairs of column blocks are multiplied once, not twice.

    Shapes: ``[(samples,) groups, rows, columns]``, ``[samples, groups, columns, columns]`` -> ``[samples]``.
    """
    total = torch.zeros(len(hessians), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[-1], _ENERGY_COLUMNS):
        block = slice(start, start + _ENERGY_COLUMNS)
        own = weight[..., block]
        product = own @ hessians[..., block, block]
        product += 2 * (weight[..., :start] @ hessians[..., :start, block])
        total += product.mul_(own).sum((1, 2, 3), dtype=torch.float64)
    return total
