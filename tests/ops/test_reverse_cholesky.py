"""reverse_cholesky, which has kernels for the CPU only, against the matrix and the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from backends import LEVELS
from problems import random_problem

from spade_fast import ops
from spade_fast.ops import reference

on_each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)


@on_each_level
@pytest.mark.parametrize("columns", [1, 2, 7, 12, 13, 33, 95, 96, 97, 130, 200])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_float64(backend, columns, damp):
    _, hessian, _ = random_problem(3, 1, columns, torch.float64, seed=columns)
    factor, info = ops.reverse_cholesky(hessian, damp)
    assert info.dtype == torch.int32 and (info == 0).all()
    assert torch.equal(factor, factor.tril()) and factor.is_contiguous()
    damped = hessian + damp * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(factor.mT @ factor, damped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor, reference.reverse_cholesky(hessian, damp)[0], rtol=1e-8, atol=1e-10)


@on_each_level
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_as_good_as_elimination_column_by_column(seed, backend):
    """Not beside torch.linalg.cholesky, whose error depends on the number of threads."""
    _, hessian, _ = random_problem(1, 1, 200, seed=seed, damp=1e-2)
    exact = hessian.double()
    plain = hessian[0].clone()
    for k in range(200):
        plain[k:, k] /= plain[k, k].sqrt()
        plain[k + 1 :, k + 1 :] -= torch.outer(plain[k + 1 :, k], plain[k + 1 :, k])
    plain = plain.tril().double()
    factor = ops.reverse_cholesky(hessian)[0].double()
    assert (factor.mT @ factor - exact).abs().max() <= (plain @ plain.mT - exact).abs().max()


@on_each_level
def test_deep_panels(backend):
    """Large matrices are factorised in panels of 192 rows instead of 96."""
    _, hessian, _ = random_problem(1, 1, 1537, seed=1)
    factor, info = ops.reverse_cholesky(hessian, 0.1)
    assert info[0] == 0
    damped = hessian.double() + 0.1 * torch.eye(1537, dtype=torch.float64)
    torch.testing.assert_close(factor.double().mT @ factor.double(), damped, rtol=0, atol=1e-6 * damped.max().item())


@pytest.mark.parametrize("columns", [20, 200])
def test_neither_threads_nor_other_problems_matter(columns):
    _, hessian, _ = random_problem(3, 1, columns, seed=columns)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([ops.reverse_cholesky(one)[0] for one in hessian.split(1)])
        torch.set_num_threads(2)
        shared = torch.cat([ops.reverse_cholesky(one)[0] for one in hessian.split(1)])
        together = ops.reverse_cholesky(hessian)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, shared) and torch.equal(alone, together)


@on_each_level
@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 3, 110, 199])
def test_info_counts_from_the_last_column(backend, bad, column):
    hessian = torch.eye(200)[None].clone()
    hessian[0, column, column] = bad
    assert ops.reverse_cholesky(hessian)[1].tolist() == [200 - column]


def test_empty():
    factor, info = ops.reverse_cholesky(torch.zeros(0, 5, 5))
    assert factor.shape == (0, 5, 5) and info.shape == (0,)
    factor, info = ops.reverse_cholesky(torch.zeros(2, 0, 0))
    assert factor.shape == (2, 0, 0) and info.tolist() == [0, 0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="reverse_cholesky: hessian must have shape"):
        ops.reverse_cholesky(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="hessian must be float32 or float64"):
        ops.reverse_cholesky(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="damp must have shape"):
        ops.reverse_cholesky(torch.zeros(2, 3, 3), torch.zeros(3))


def test_opcheck():
    _, hessian, _ = random_problem(2, 1, 6)
    torch.library.opcheck(torch.ops.spade_fast.reverse_cholesky, (hessian, torch.tensor([0.0, 0.1])))
