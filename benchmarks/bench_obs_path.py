"""Paths of exact OBS, unstructured, in blocks and n:m; and whole solvers, from the Hessian to weights at 90 %.

The path alone shows its share of the floor. The solvers have the same inputs and outputs as the published one, so that
the ratio compares like with like.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import published
import textbook
from checks import assert_greedy, assert_same_pruning
from device import cuda_only, to_device
from measuring import OURS, PUBLISHED, TEXTBOOK, THREADS, Case, by_implementation
from shapes import BYTES, Weights, inverse
from torch import Tensor, nn

from spade_fast import compat, ops

_SPARSITY = 0.9
_CHECKED_ROWS = 2


def _path(shape: Weights, share_goal: float | None) -> Case:
    matrices = THREADS + (shape.block > 1)
    results = 2 * shape.rows * shape.steps
    return Case(
        "nm_path" if shape.m > 0 else "obs_path",
        str(shape),
        shape,
        work=shape.path_work(),
        stated=BYTES * (matrices * shape.columns**2 + results),
        share_goal=share_goal,
        only=(OURS,),
    )


def _solver(shape: Weights, ratio_goal: float | None, slow: tuple[str, ...] = ()) -> Case:
    return Case("exact solver", str(shape), shape, ratio_goal=ratio_goal, slow=slow)


PATHS = [
    _path(Weights(32, 1024), 0.6),
    _path(Weights(32, 2048), 0.6),
    _path(Weights(768, 768), None),  # ViT-B/16, projection of attention
    _path(Weights(32, 1152, block=9), 0.45),
    _path(Weights(64, 2304, block=9), 0.45),
    _path(Weights(32, 1024, n=2, m=4), 0.4),
    *cuda_only(_path(Weights(1000, 2048), None)),  # ResNet-50, classifier
]
SOLVERS = [
    _solver(Weights(32, 1024), 400),
    _solver(Weights(32, 2048), None, slow=(TEXTBOOK, PUBLISHED)),
    _solver(Weights(32, 1152, block=9), 60),
    _solver(Weights(64, 2304, block=9), 60, slow=(TEXTBOOK, PUBLISHED)),
    _solver(Weights(32, 1024, n=2, m=4), None),
    # small layers of ResNet-50 and EfficientNet-Lite0
    _solver(Weights(64, 64), 1),
    _solver(Weights(16, 32), 1),
    _solver(Weights(32, 27, block=9), 1),
]


@by_implementation(PATHS)
def test_path(case: Case, implementation: str, report: Callable[..., None]) -> None:
    shape: Weights = case.shape
    weight, hessian = shape.random_problem()
    hinv = inverse(hessian)
    given = to_device(weight, hinv)

    def path() -> tuple[Tensor, Tensor]:
        if shape.m > 0:
            return ops.nm_path(*given, shape.n, shape.m)
        return ops.obs_path(*given, shape.block)

    def check(result: tuple[Tensor, Tensor]) -> None:
        order, losses = (part[0, -_CHECKED_ROWS:] for part in result)
        assert_greedy(weight[0, -_CHECKED_ROWS:], hinv[0], order, losses, shape.block, shape.n, shape.m)

    report(case, implementation, path, check)


def _solve(solver_class: Any, shape: Weights, weight: Tensor, hessian: Tensor) -> Tensor:
    """Weights from a solver with the published interface."""
    layer = nn.Linear(shape.columns, shape.rows, bias=False, device=weight.device)
    layer.weight.data = weight.clone()
    solver = solver_class(layer, os.devnull)
    solver.H = hessian
    if shape.m > 0:
        solver.nmprune(shape.n, shape.m)
        return layer.weight.detach()
    if shape.block > 1:
        solver.prepare_blocked(shape.block)
    else:
        solver.prepare_unstr()
    return solver.prune_unstr([_SPARSITY])[0]


def _by_textbook(shape: Weights, weight: Tensor, hessian: Tensor) -> Tensor:
    losses, paths = textbook.obs_paths(weight, hessian.float(), shape.block, shape.n, shape.m)
    return textbook.pruned(losses, paths, 1.0 if shape.m > 0 else _SPARSITY)


def _on_small_problem(shape: Weights) -> Weights:
    """The same pruning of 16 rows by at most 96 columns, which the textbook solves in no time."""
    unit = max(shape.block, shape.m)
    return replace(shape, rows=min(16, shape.rows), columns=min(96 // unit * unit, shape.columns))


@by_implementation(SOLVERS)
def test_solver(case: Case, implementation: str, report: Callable[..., None]) -> None:
    shape: Weights = case.shape
    weight, hessian = (part[0] for part in shape.random_problem())
    hessian = hessian.double()
    given = to_device(weight, hessian)

    def check_ours(result: Tensor) -> None:
        small = _on_small_problem(shape)
        problem = [part[0] for part in small.random_problem()]
        ours = _solve(compat.TrueOBS, small, *to_device(problem[0], problem[1].double()))
        assert_same_pruning(*problem, ours.cpu(), _by_textbook(small, *problem), flips=2e-3, error=1e-3)
        assert abs(float((result == 0).double().mean()) - (shape.n / shape.m if shape.m > 0 else _SPARSITY)) < 0.02

    def check_other(result: Tensor) -> None:
        ours = _solve(compat.TrueOBS, shape, *given)
        assert_same_pruning(weight, hessian, ours.cpu(), result, flips=2e-3, error=1e-3)

    once = False if shape.columns <= 64 else None
    if implementation == OURS:
        report(case, implementation, lambda: _solve(compat.TrueOBS, shape, *given), check_ours)
    elif implementation == TEXTBOOK:
        report(case, implementation, lambda: _by_textbook(shape, *given), check_other, once=once)
    else:
        with published.running() as classes:
            report(case, implementation, lambda: _solve(classes.TrueOBS, shape, *given), check_other, once=once)
