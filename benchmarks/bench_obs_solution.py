"""Weights at six sparsities from one exact path, against the normal equations of each row in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import textbook
import torch
from device import to_device
from measuring import OURS, TEXTBOOK, THREADS, Case, best, by_implementation
from shapes import BYTES, Weights, inverse
from torch import Tensor

from spade_fast import ops
from spade_fast.ops import reference
from spade_fast.pruning.counts import smallest

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

    given = to_device(weight, hessian, hinv, order, counts)

    def ours() -> Tensor:
        return ops.obs_solution(*given, block)

    def plain(weight: Tensor, hessian: Tensor, *masks: Tensor) -> Tensor:
        return torch.stack([textbook.solution(weight[0], hessian[0], mask[0]) for mask in masks])

    def check(result: Tensor) -> None:
        rows = slice(0, _CHECKED_ROWS)
        few = (weight[:, rows], hessian, hinv, order[:, rows])
        truth = reference.obs_solution(*few, counts[:, :, rows], block)[:, 0]
        result = result.reshape(len(counts), *weight.shape[1:])[:, rows].double()
        same = plain(weight[:, rows], hessian, *(mask[:, rows] for mask in removed))
        bound = 2 * (same.double() - truth).abs().max() + 1e-6 * truth.abs().max()
        assert bool((result - truth).abs().max() <= bound)
        assert torch.equal(result == 0, truth == 0)

    def of_path() -> dict[str, Any]:
        on_device, _, inverted, *_ = given
        share = best(ours, 3) / best(lambda: ops.obs_path(on_device, inverted, block), 3)
        note = f"{share:.0%} of the path's time"
        return {"share_of_path": share, "note": note, "note_goal": f"at most {_SHARE_OF_PATH:.0%}"}

    if implementation == OURS:
        report(case, implementation, ours, check, facts=of_path)
    else:
        masked = to_device(weight, hessian, *removed)
        report(case, implementation, lambda: plain(*masked), check)
