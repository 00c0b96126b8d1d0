"""Upper factors of inverse Hessians, against Cholesky, inverse, Cholesky; the published code has no separate step."""

from __future__ import annotations

from collections.abc import Callable

import textbook
import torch
from device import to_device
from measuring import OURS, TEXTBOOK, THREADS, Case, by_implementation
from shapes import BYTES, Weights
from torch import Tensor

from spade_fast import ops


def _factor(problems: int, columns: int) -> Case:
    matrix = BYTES * columns**2
    return Case(
        "inverse_cholesky",
        f"{problems} x {columns}" if problems > 1 else f"{columns}",
        Weights(1, columns, problems=problems),
        work=problems * 2 * columns**3 / 3,
        stated=(problems + (THREADS if problems >= THREADS else 1)) * matrix,
        share_goal=0.6,
        only=(OURS, TEXTBOOK),
    )


CASES = [_factor(1, 1024), _factor(1, 2048), _factor(1, 4608), _factor(8, 1024), _factor(8, 2048)]


def _residual(hessian: Tensor, factor: Tensor) -> float:
    """``‖H UᵀU v - v‖ / ‖v‖`` for random v, in float64."""
    v = torch.randn(*hessian.shape[:2], 8, dtype=torch.float64)
    u = factor.double()
    return float((hessian.double() @ (u.mT @ (u @ v)) - v).norm() / v.norm())


@by_implementation(CASES)
def test_inverse_cholesky(case: Case, implementation: str, report: Callable[..., None]) -> None:
    _, hessian = case.shape.random_problem()
    (given,) = to_device(hessian)

    def check(factor: Tensor) -> None:
        assert not bool(factor.tril(-1).any())
        assert _residual(hessian, factor) <= 2 * _residual(hessian, textbook.inverse_cholesky(hessian)) + 1e-6

    if implementation == OURS:
        report(case, implementation, lambda: ops.inverse_cholesky(given)[0], check)
    else:
        report(case, implementation, lambda: textbook.inverse_cholesky(given), check)
