"""Weights at six sparsities from one exact path, against the normal equations of each row in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import textbook
import torch
from measuring import OURS, TEXTBOOK, THREADS, Case, best, by_implementation
from shapes import BYTES, Weights, inverse
from torch import Tensor

from spade_fast import ops, reference
from spade_fast.solvers import smallest

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_SHARE_OF_PATH = 0.15
_CHECKED_ROWS = 2


def _solution(shape: Weights) -> Case:
    columns, levels = shape.columns, len(SPARSITIES)
    kept, largest = columns * (1 - min(SPARSITIES)), 0.63 * columns
    return Case(
        "obs_solution at 6 sparsities",
        str(shape),
        shape,
        work=shape.rows * kept**3 / 3,
        stated=BYTES * (THREADS * largest * (largest + 100) + levels * shape.rows * columns),
        only=(OURS, TEXTBOOK),
    )


CASES = [_solution(Weights(32, 1024)), _solution(Weights(32, 2048)), _solution(Weights(32, 1152, block=9))]


@by_implementation(CASES)
def test_obs_solution(case: Case, implementation: str, report: Callable[..., None]) -> None:
    block = case.shape.block
    weight, hessian = case.shape.random_problem()
    hinv = inverse(hessian)
    order, losses = ops.obs_path(weight, hinv, block)
    counts = torch.stack([smallest(losses, math.ceil(losses.numel() * share)).sum(2) for share in SPARSITIES])
    steps = torch.arange(losses.shape[2]).expand_as(losses)
    removed = [
        torch.zeros_like(losses, dtype=torch.bool)
        .scatter_(2, order.long(), steps < level[..., None])
        .repeat_interleave(block, 2)
        for level in counts
    ]

    def ours() -> Tensor:
        return ops.obs_solution(weight, hessian, hinv, order, counts, block)

    def plain(rows: int | None = None) -> Tensor:
        return torch.stack([textbook.solution(weight[0, :rows], hessian[0], mask[0, :rows]) for mask in removed])

    def check(result: Tensor) -> None:
        rows = slice(0, _CHECKED_ROWS)
        few = (weight[:, rows], hessian, hinv, order[:, rows])
        truth = reference.obs_solution(*few, counts[:, :, rows], block)[:, 0]
        result = result.reshape(len(counts), *weight.shape[1:])[:, rows].double()
        bound = 2 * (plain(_CHECKED_ROWS).double() - truth).abs().max() + 1e-6 * truth.abs().max()
        assert bool((result - truth).abs().max() <= bound)
        assert torch.equal(result == 0, truth == 0)

    def of_path() -> dict[str, Any]:
        path = best(lambda: ops.obs_path(weight, hinv, block), 3)
        share = best(ours, 3) / path
        return {"share_of_path": share, "note": f"{share:.0%} of the path's time (goal at most {_SHARE_OF_PATH:.0%})"}

    if implementation == OURS:
        report(case, implementation, ours, check, facts=of_path)
    else:
        report(case, implementation, plain, check)
