"""Checks of results in float64, for problems too large for the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_greedy(
    weight: Tensor, hinv: Tensor, order: Tensor, losses: Tensor, block: int = 1, n: int = 0, m: int = 0
) -> None:
    """Check that each removal of the given rows was the cheapest at its step, and that its loss is right.

    With the columns in order of removal and ``H⁻¹ = L Lᵀ``, the score of a column (or block) after k removals follows
    from the first k columns of L alone, so one factorisation per row gives all scores at all steps.

    Parameters
    ----------
    weight : Tensor ``[R, C]``
    hinv : Tensor ``[C, C]``
    order, losses : Tensor ``[R, steps]``
        Results of `ops.obs_path` or `ops.nm_path`.
    """
    for w, path, loss in zip(weight.double(), order.long(), losses.double(), strict=True):
        scores = _scores_over_time(w, hinv.double(), path, block, n, m)
        taken = scores.diagonal()
        cheapest = scores.min(0).values
        torch.testing.assert_close(loss, taken / 2, rtol=5e-3, atol=1e-6 * float(taken.max()))
        assert bool((taken <= cheapest * 1.005 + 1e-6 * taken.max()).all()), "there was a cheaper removal"


def _scores_over_time(w: Tensor, hinv: Tensor, path: Tensor, block: int, n: int, m: int) -> Tensor:
    """Scores ``[blocks, steps]`` of all blocks, in order of removal, before each step; infinite if not removable."""
    blocks, steps = len(w) // block, len(path)
    assert len(path.unique()) == steps, "a block was removed twice"
    rest = torch.ones(blocks, dtype=torch.bool).index_fill_(0, path, False).nonzero().flatten()
    places = torch.cat([path, rest])
    columns = (places[:, None] * block + torch.arange(block)).flatten()
    lower = torch.linalg.cholesky(hinv[columns][:, columns])
    solved = torch.linalg.solve_triangular(lower, w[columns][:, None], upper=False)[:, 0]

    panels = lower.reshape(blocks, block, blocks, block).permute(0, 2, 1, 3)[:, :steps]  # [blocks, steps, block, block]
    values = (panels @ solved.reshape(blocks, 1, block, 1)[:steps].transpose(0, 1)).cumsum(1)[..., 0]
    values = w[columns].reshape(blocks, 1, block) - values.roll(1, 1).index_fill_(1, torch.tensor([0]), 0)
    pivots = (panels @ panels.mT).cumsum(1)
    start = hinv[columns][:, columns].reshape(blocks, block, blocks, block).permute(0, 2, 1, 3).diagonal()
    pivots = start.permute(2, 0, 1)[:, None] - pivots.roll(1, 1).index_fill_(1, torch.tensor([0]), 0)

    gone = torch.arange(blocks)[:, None] < torch.arange(steps)
    if m > 0:
        removed = torch.zeros(blocks // m, steps).index_put_((path // m, torch.arange(steps)), torch.tensor(1.0))
        full = removed.cumsum(1) - removed >= n
        gone |= full[places // m]
    pivots[gone] = torch.eye(block, dtype=torch.float64)
    weighted = values / pivots[..., 0] if block == 1 else torch.linalg.solve(pivots, values)
    scores = (values * weighted).sum(2)
    return scores.masked_fill(gone, torch.inf)


def layer_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """``1/2 δᵀHδ`` of all rows."""
    delta = (pruned - weight).double()
    return float((delta @ hessian.double() * delta).sum() / 2)


def assert_same_pruning(
    weight: Tensor, hessian: Tensor, pruned: Tensor, expected: Tensor, flips: float, error: float
) -> None:
    """Check that two float32 solvers agree in the error, and in the mask except for a share of near-ties."""
    assert float(((pruned == 0) != (expected == 0)).double().mean()) <= flips
    true = layer_error(weight, expected, hessian)
    assert abs(layer_error(weight, pruned, hessian) - true) <= error * true
