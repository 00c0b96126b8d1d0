"""inverse_cholesky against the inverse in float64."""

from __future__ import annotations

import pytest
import torch
from backends import LEVELS, in_turns
from problems import random_problem

from spade_fast import ops
from spade_fast.ops import reference


@in_turns(columns=[1, 2, 7, 12, 13, 33, 95, 96, 97, 130, 200], damp=[0.0, 0.3])
def test_float64(backend, columns, damp):
    _, hessian, _ = random_problem(3, 1, columns, torch.float64, seed=columns)
    factor, info = ops.inverse_cholesky(hessian, damp)
    assert info.dtype == torch.int32 and (info == 0).all()
    assert torch.equal(factor, factor.triu()) and factor.is_contiguous()
    identity = torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(
        factor.mT @ factor @ (hessian + damp * identity), identity.expand_as(hessian), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(factor, reference.inverse_cholesky(hessian, damp)[0], rtol=1e-8, atol=1e-10)


@in_turns(seed=range(8))
def test_float32_is_as_good_as_the_published_chain(seed, backend):
    """The published code computes Cholesky, inverse, Cholesky in float32; ours has at most twice its error."""
    _, hessian, _ = random_problem(1, 1, 200, seed=seed, damp=1e-2)
    truth, _ = reference.inverse_cholesky(hessian.double())
    chain = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    factor, _ = ops.inverse_cholesky(hessian)
    assert (factor - truth).abs().max() <= 2 * (chain - truth).abs().max() + 1e-6


@pytest.mark.parametrize("backend", LEVELS, indirect=True)
def test_deep_panels(backend):
    """Large matrices are factorised in panels of 192 rows instead of 96."""
    _, hessian, _ = random_problem(1, 1, 1537, seed=1)
    factor, info = ops.inverse_cholesky(hessian, 0.1)
    assert info[0] == 0
    full = factor[0].double()
    identity = torch.eye(1537, dtype=torch.float64)
    torch.testing.assert_close(full @ (hessian[0].double() + 0.1 * identity) @ full.mT, identity, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [20, 200])
def test_neither_threads_nor_other_problems_matter(columns):
    _, hessian, _ = random_problem(3, 1, columns, seed=columns)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([ops.inverse_cholesky(one)[0] for one in hessian.split(1)])
        torch.set_num_threads(2)
        shared = torch.cat([ops.inverse_cholesky(one)[0] for one in hessian.split(1)])
        together = ops.inverse_cholesky(hessian)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, shared) and torch.equal(alone, together)


@in_turns(bad=[-1.0, 0.0, float("nan"), float("inf")], column=[0, 3, 110, 199])
def test_info_counts_from_the_last_column(backend, bad, column):
    hessian = torch.eye(200)[None].clone()
    hessian[0, column, column] = bad
    assert ops.inverse_cholesky(hessian)[1].tolist() == [200 - column]


def test_each_problem_has_its_own_damping_and_info(backend):
    hessian = torch.stack([torch.eye(4), -torch.eye(4), -torch.eye(4), torch.ones(4, 4)])
    factor, info = ops.inverse_cholesky(hessian, torch.tensor([0.0, 0.0, 2.0, 0.0]))
    assert info[0] == 0 and info[1] != 0 and info[2] == 0 and info[3] != 0
    assert torch.equal(factor[0], torch.eye(4)) and torch.equal(factor[2], torch.eye(4))


def test_empty(device):
    factor, info = ops.inverse_cholesky(torch.zeros(0, 5, 5))
    assert factor.shape == (0, 5, 5) and info.shape == (0,)
    factor, info = ops.inverse_cholesky(torch.zeros(2, 0, 0))
    assert factor.shape == (2, 0, 0) and info.tolist() == [0, 0]


def test_bad_arguments(device):
    with pytest.raises(ValueError, match="hessian must have shape"):
        ops.inverse_cholesky(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="hessian must be float32 or float64"):
        ops.inverse_cholesky(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="damp must have shape"):
        ops.inverse_cholesky(torch.zeros(2, 3, 3), torch.zeros(3))


def test_opcheck():
    _, hessian, _ = random_problem(2, 1, 6)
    torch.library.opcheck(torch.ops.spade_fast.inverse_cholesky, (hessian, torch.tensor([0.0, 0.1])))
