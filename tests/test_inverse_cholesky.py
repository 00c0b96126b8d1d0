"""inverse_cholesky against the inverse in float64."""

from __future__ import annotations

import pytest
import torch
from problems import random_problem

from spade_fast import ops, reference


@pytest.mark.parametrize("columns", [1, 2, 7, 16, 33, 130])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_float64(columns, damp):
    _, hessian, _ = random_problem(3, 1, columns, torch.float64, seed=columns)
    factor, info = ops.inverse_cholesky(hessian, damp)
    assert info.dtype == torch.int32 and (info == 0).all()
    assert torch.equal(factor, factor.triu())
    identity = torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(
        factor.mT @ factor @ (hessian + damp * identity), identity.expand_as(hessian), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(factor, reference.inverse_cholesky(hessian, damp)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_float32_is_as_good_as_the_published_chain(seed):
    """Cholesky, inverse, Cholesky in float32 is what the published code does; rule: at most twice its error."""
    _, hessian, _ = random_problem(1, 1, 200, seed=seed, damp=1e-2)
    truth, _ = reference.inverse_cholesky(hessian.double())
    chain = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    factor, _ = ops.inverse_cholesky(hessian)
    assert (factor - truth).abs().max() <= 2 * (chain - truth).abs().max() + 1e-6


def test_each_problem_has_its_own_damping_and_info():
    hessian = torch.stack([torch.eye(4), -torch.eye(4), -torch.eye(4), torch.ones(4, 4)])
    factor, info = ops.inverse_cholesky(hessian, torch.tensor([0.0, 0.0, 2.0, 0.0]))
    assert info[0] == 0 and info[1] != 0 and info[2] == 0 and info[3] != 0
    assert torch.equal(factor[0], torch.eye(4)) and torch.equal(factor[2], torch.eye(4))


def test_empty():
    factor, info = ops.inverse_cholesky(torch.zeros(0, 5, 5))
    assert factor.shape == (0, 5, 5) and info.shape == (0,)


def test_bad_arguments():
    with pytest.raises(ValueError, match="hessian must have shape"):
        ops.inverse_cholesky(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="hessian must be float32 or float64"):
        ops.inverse_cholesky(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="damp must have shape"):
        ops.inverse_cholesky(torch.zeros(2, 3, 3), torch.zeros(3))


def test_opcheck():
    _, hessian, _ = random_problem(2, 1, 6)
    torch.library.opcheck(torch.ops.spade_fast.inverse_cholesky, (hessian, torch.tensor([0.0, 0.1])))
