"""Prunes one layer given its Gram matrices, for one or more samples, with retries and a report per sample."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError
from spade_fast.pruning.counts import count_zeros, removal_target
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.solve_once import Problem, Solution, energy, more_damping, solve_once

# With one row, a mask block of one column leaves no choice. Groups with fewer rows than this use a single mask block.
_FEW_ROWS = 8


@dataclass(frozen=True)
class LayerReport:
    """How one layer of one sample was pruned.

    Attributes
    ----------
    name, shape
        Name of the layer, and shape of its parameter.
    sparsity, reached
        Requested share of weights to remove, and resulting share of weights that are zero.
    removed
        Number of weights removed.
    solver, block
        ``"exact"`` or ``"sparsegpt"``, and the number of neighbouring columns removed together or per mask block.
    damping
        Share of the mean diagonal that was added to the Hessian's diagonal; the largest over the groups.
    retries
        Number of failed factorisations that were repeated with more damping.
    dead_columns
        Number of inputs that were zero in all calibration data, over all groups.
    predicted_error, measured_error
        Relative output error ``‖ΔW X‖ / ‖W X‖`` over the calibration data: derived from the solver's (damped) losses,
        and measured with the final weights.
    seconds
        Solving time, divided evenly among the samples of a call.
    note
        Why the layer was skipped; empty if it was not.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace
    >>> sample_trace = trace(torch.nn.Linear(8, 4), torch.randn(64, 8), sparsity=0.5)
    >>> sample_trace.reports[0].removed
    16
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
    """Return the default number of neighbouring columns that are pruned together.

    This is the choice of the published SPADE code: ``kh * kw`` for an ordinary convolution, 1 for linear, 1x1 and
    depthwise layers. For SparseGPT it is all columns if a group has fewer than 8 rows, because a mask block of one
    column would leave little or no choice.
    """
    if solver == "sparsegpt" and layer.rows < _FEW_ROWS:
        return layer.columns
    return 1 if layer.columns == layer.taps else layer.taps


def check_block(layer: Layer, block: int) -> None:
    """Raise ValueError if `block` does not divide the layer's number of columns."""
    if layer.columns % block:
        raise InvalidValueError(f"block {block} does not divide the {layer.columns} columns of layer {layer.name!r}")


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

    Both solvers remove exactly ``round(sparsity * numel)`` weights; exact OBS with blocks removes the nearest whole
    number of blocks. Exact OBS ranks the removals of all rows and groups of the layer together. SparseGPT removes the
    same share of each mask block, with columns in the order (in-channel, kh, kw) of the published code. Weights that
    are already zero stay zero and count as removed; if they are more than that number, nothing else is removed. In
    addition to single zeros, exact OBS with blocks removes as many whole blocks as the number allows. In dead columns
    (inputs that are always zero) removals cost nothing, and surviving weights keep their values.

    Parameters
    ----------
    layer
        Geometry of the layer.
    weight : Tensor ``[G, R, C]``
        Dense weight in solver order, float32 or float64.
    hessians : Tensor ``[S, G, C, C]``
        Gram matrices or Hessians; a factor common to all groups of a sample has no effect. Used as scratch space, and
        restored.
    solver : "exact" or "sparsegpt"
    sparsity : float
        Between 0 and 1.
    block : int or None
        Number of neighbouring columns removed together (exact OBS) or per mask block (SparseGPT); None for
        :func:`default_block`.
    damping : float
        Share of a problem's mean diagonal (over columns that are not dead) added to its diagonal. A problem that cannot
        be factorised is retried with ten times more (at least 1e-6), and so on up to 1. So is a sample whose solution
        fails later.
    zeros : Tensor ``[G, C]`` or None
        Number of zero weights in each column, on the CPU; None to count them (:func:`count_zeros`).

    Returns
    -------
    pruned : Tensor ``[S, G, R, C]``
    reports : list of LayerReport
        One per sample.

    Raises
    ------
    ValueError
        `block` does not divide the number of columns.
    NotPositiveDefiniteError
        A Hessian is not positive definite even with damping 1.

    Notes
    -----
    On a GPU the host synchronises once, at the end of the layer's work, to read whether every sample was solved;
    samples that failed are then solved again one by one.
    """
    ((pruned, reports),) = solve_sparsities(
        layer, weight, hessians, solver=solver, sparsities=[sparsity], block=block, damping=damping, zeros=zeros
    )
    return pruned, reports


@torch.no_grad()
def solve_sparsities(
    layer: Layer,
    weight: Tensor,
    hessians: Tensor,
    *,
    solver: str,
    sparsities: Sequence[float],
    block: int | None = None,
    damping: float = 0.01,
    zeros: Tensor | None = None,
) -> list[tuple[Tensor, list[LayerReport]]]:
    """Prune one layer to several sparsities; return for each what :func:`solve_layer` returns, up to rounding.

    With exact OBS the sparsities share one path per sample, and their solutions share factorisations (OBC,
    arXiv 2208.11580). With SparseGPT, which has no path, they share one factor per sample, and each needs a sweep.
    Other parameters, errors and notes are those of :func:`solve_layer`; `seconds` of the reports is the time for all
    sparsities.
    """
    block = default_block(layer, solver) if block is None else block
    check_block(layer, block)
    start = time.perf_counter()
    removed = [removal_target(layer, sparsity, block if solver == "exact" else 1) for sparsity in sparsities]
    problem = Problem(layer, weight, solver, block, count_zeros(weight) if zeros is None else zeros)
    chunk = max(1, _working_bytes(weight.device) // (4 * hessians[0].nbytes))
    parts: list[list[Tensor]] = [[] for _ in sparsities]
    tables: list[list[Tensor]] = [[] for _ in sparsities]
    for part in hessians.split(chunk):
        solutions = solve_once(problem, part, removed, damping, read=_reading_is_free(weight.device))
        dense = energy(weight, part)
        for level, solution in enumerate(solutions):
            parts[level].append(solution.pruned)
            tables[level].append(_table(weight, solution, part, dense))
    pruned = [torch.cat(of_level) for of_level in parts]
    facts = _read(torch.stack([torch.cat(of_level) for of_level in tables]))
    for level, count in enumerate(removed):
        for s, fact in enumerate(facts[level]):
            if fact.failed:
                alone = _solve_stably(problem, hessians[s : s + 1], count, damping)
                pruned[level][s] = alone.pruned[0]
                hessian = hessians[s : s + 1]
                ((facts[level][s],),) = _read(_table(weight, alone, hessian, energy(weight, hessian))[None])
    seconds = (time.perf_counter() - start) / len(hessians)
    reports = [
        [
            LayerReport(
                name=layer.name,
                shape=layer.shape,
                sparsity=sparsity,
                reached=1 - fact.nonzero / layer.numel,
                removed=count,
                solver=solver,
                block=block,
                damping=fact.damping,
                retries=int(fact.retries),
                dead_columns=int(fact.dead_columns),
                predicted_error=fact.relative_error(2 * fact.loss),
                measured_error=fact.relative_error(fact.energy_of_change),
                seconds=seconds,
            )
            for fact in of_level
        ]
        for sparsity, count, of_level in zip(sparsities, removed, facts, strict=True)
    ]
    return list(zip(pruned, reports, strict=True))


def _working_bytes(device: torch.device) -> int:
    """Return the memory, in bytes, available to the samples of one solve."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 1 << 30


def _reading_is_free(device: torch.device) -> bool:
    """Whether values can be read without waiting for queued GPU work."""
    return device.type == "cpu"


class _Facts(NamedTuple):
    """The values of one sample's solution that the host reads: one row of `_table`."""

    failed: float
    loss: float
    damping: float
    retries: float
    dead_columns: float
    nonzero: float
    energy: float
    energy_of_change: float

    def relative_error(self, energy: float) -> float:
        """Return the relative output error of a weight change with this energy."""
        return math.sqrt(max(0.0, energy) / self.energy) if self.energy > 0 else 0.0


def _table(weight: Tensor, solution: Solution, hessians: Tensor, dense: Tensor) -> Tensor:
    """Collect the `_Facts` of all samples, ``[S, facts]``, on the device, given the energies of the dense weight."""
    columns = (
        solution.failed,
        solution.loss,
        solution.damping,
        solution.retries,
        solution.dead_columns,
        solution.pruned.count_nonzero((1, 2, 3)),
        dense,
        energy(solution.pruned - weight, hessians),
    )
    return torch.stack([column.double() for column in columns], 1)


def _read(tables: Tensor) -> list[list[_Facts]]:
    """Copy tables ``[sparsities, S, facts]`` to the host, which synchronises on a GPU."""
    return [[_Facts(*row) for row in table] for table in tables.tolist()]


def _solve_stably(problem: Problem, hessian: Tensor, removed: int, damping: float) -> Solution:
    """Solve for one sample, increasing the damping until the solution is finite."""
    tries = 0
    while True:
        (solution,) = solve_once(problem, hessian, [removed], damping, read=True)
        if not solution.failed.any():
            return replace(solution, retries=solution.retries + tries)
        damping = more_damping(problem.layer, damping)
        tries += 1
