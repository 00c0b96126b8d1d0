"""obs_path and nm_path against the textbook elimination in float64."""

from __future__ import annotations

import pytest
import torch
from backends import examples, in_turns
from hypothesis import given
from hypothesis import strategies as st
from problems import random_problem

from spade_fast import ops
from spade_fast.ops import reference

SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 66, 100, 129, 150]
BLOCKS = [(1, 9), (2, 9), (7, 9), (20, 9), (33, 2), (5, 25), (17, 4), (3, 49), (2, 70), (40, 3)]


def assert_path_agrees(weight, hinv, block, order, losses, band):
    """Orders are permutations, equal up to the first near-tie of each row, where two scores lie within `band`."""
    true_order, true_losses = reference.obs_path(weight.double(), hinv.double(), block)
    scale = true_losses.amax(2, keepdim=True)
    for b in range(order.shape[0]):
        for r in range(order.shape[1]):
            mine, truth = order[b, r], true_order[b, r]
            assert sorted(mine.tolist()) == list(range(mine.numel()))
            differs = (mine != truth).nonzero()
            end = int(differs[0]) if len(differs) else mine.numel()
            error = (losses[b, r, :end].double() - true_losses[b, r, :end]).abs() / scale[b, r]
            assert error.max() < band if end else True
            if end < mine.numel():
                assert abs(losses[b, r, end].double() - true_losses[b, r, end]) / scale[b, r] < band


@in_turns(columns=SIZES)
def test_unstructured_float64(backend, columns):
    weight, _, hinv = random_problem(2, 3, columns, torch.float64, seed=columns)
    order, losses = ops.obs_path(weight, hinv)
    true_order, true_losses = reference.obs_path(weight, hinv)
    assert torch.equal(order, true_order)
    torch.testing.assert_close(losses, true_losses, rtol=1e-8, atol=1e-12)


@in_turns(shape=BLOCKS)
def test_blocks_float64(backend, shape):
    count, block = shape
    weight, _, hinv = random_problem(2, 2, count * block, torch.float64, seed=count)
    order, losses = ops.obs_path(weight, hinv, block)
    true_order, true_losses = reference.obs_path(weight, hinv, block)
    assert torch.equal(order, true_order)
    torch.testing.assert_close(losses, true_losses, rtol=1e-8, atol=1e-12)


@in_turns(columns=SIZES)
def test_unstructured_float32(backend, columns):
    weight, _, hinv = random_problem(1, 4, columns, seed=100 + columns)
    assert_path_agrees(weight, hinv, 1, *ops.obs_path(weight, hinv), band=2e-5)


@in_turns(shape=BLOCKS)
def test_blocks_float32(backend, shape):
    count, block = shape
    weight, _, hinv = random_problem(1, 3, count * block, seed=200 + count)
    assert_path_agrees(weight, hinv, block, *ops.obs_path(weight, hinv, block), band=2e-5)


@in_turns(pattern=[(2, 4), (4, 8), (1, 4), (3, 4), (0, 4), (4, 4), (1, 1)], groups=[1, 5, 33])
def test_nm(backend, pattern, groups):
    n, m = pattern
    weight, _, hinv = random_problem(2, 3, m * groups, torch.float64, seed=groups)
    order, losses = ops.nm_path(weight, hinv, n, m)
    true_order, true_losses = reference.nm_path(weight, hinv, n, m)
    assert torch.equal(order, true_order)
    torch.testing.assert_close(losses, true_losses, rtol=1e-8, atol=1e-12)


def test_random_shapes(backend):
    @examples(25, backend)
    @given(
        problems=st.integers(0, 3),
        rows=st.integers(0, 4),
        count=st.integers(0, 20),
        block=st.integers(1, 6),
        seed=st.integers(0, 2**31),
    )
    def agrees(problems, rows, count, block, seed):
        weight, _, hinv = random_problem(problems, rows, count * block, torch.float64, seed)
        order, losses = ops.obs_path(weight, hinv, block)
        assert order.shape == losses.shape == (problems, rows, count)
        if order.numel():
            assert torch.equal(order, reference.obs_path(weight, hinv, block)[0])

    agrees()


@pytest.mark.parametrize("block", [1, 2, 4])
def test_as_many_rows_as_columns(block, backend):
    weight, _, hinv = random_problem(2, 8, 8, torch.float64, seed=block)
    assert torch.equal(ops.obs_path(weight, hinv, block)[0], reference.obs_path(weight, hinv, block)[0])


def test_ties_go_to_the_lowest_index(backend):
    weight = torch.ones(1, 2, 40)
    order, losses = ops.obs_path(weight, torch.eye(40)[None])
    assert torch.equal(order, torch.arange(40, dtype=torch.int32).expand(1, 2, 40))
    assert torch.equal(losses, torch.full((1, 2, 40), 0.5))


def test_without_finite_scores_the_lowest_index_goes(backend):
    for value in (1e30, float("nan")):  # the square of the first is infinite
        order, losses = ops.obs_path(torch.full((1, 2, 40), value), torch.eye(40)[None])
        assert torch.equal(order, torch.arange(40, dtype=torch.int32).expand(1, 2, 40))
        assert not losses.isfinite().any()


def test_zero_weights_go_first_at_no_loss(backend):
    weight, _, hinv = random_problem(1, 3, 70, torch.float64, seed=5)
    zero = [3, 4, 40, 69]
    weight[:, :, zero] = 0
    order, losses = ops.obs_path(weight, hinv)
    assert torch.equal(order[..., :4], torch.tensor(zero, dtype=torch.int32).expand(1, 3, 4))
    assert (losses[..., :4] == 0).all() and (losses[..., 4:] > 0).all()


def test_nearly_singular_hessian_gives_a_permutation(backend):
    inputs = torch.randn(1, 50, 10)
    hessian = inputs @ inputs.mT + 1e-5 * torch.eye(50)
    hinv = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double())).float()
    for block in (1, 5):
        order, losses = ops.obs_path(torch.randn(1, 4, 50), hinv, block)
        assert torch.equal(order.sort(2).values, torch.arange(50 // block, dtype=torch.int32).expand_as(order))
        assert losses.isfinite().all()


def test_a_row_does_not_depend_on_other_rows():
    weight, _, hinv = random_problem(2, 9, 150, seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        order, losses = ops.obs_path(weight, hinv)
        torch.set_num_threads(2)
        again = ops.obs_path(weight, hinv)
        alone = ops.obs_path(weight[1:, 4:5], hinv[1:])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(order, again[0]) and torch.equal(losses, again[1])
    assert torch.equal(order[1:, 4:5], alone[0]) and torch.equal(losses[1:, 4:5], alone[1])


def test_inputs_may_be_strided(backend):
    weight, _, hinv = random_problem(2, 3, 18, torch.float64, seed=1)
    strided = torch.empty(2, 18, 3, dtype=torch.float64).mT.copy_(weight)
    for block in (1, 9):
        assert torch.equal(ops.obs_path(strided, hinv.mT, block)[0], ops.obs_path(weight, hinv, block)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=torch.zeros(1, 2, 4, dtype=torch.float16)), TypeError, "weight must be float32 or float64"),
        (dict(hinv=torch.zeros(1, 4, 4, dtype=torch.float64)), TypeError, "hinv must have the dtype of weight"),
        (dict(hinv=torch.zeros(1, 4, 3)), ValueError, r"hinv must have shape \[1, 4, 4\], got \[1, 4, 3\]"),
        (dict(weight=torch.zeros(2, 4)), ValueError, "weight must have shape"),
        (dict(block=3), ValueError, "block must divide the 4 columns, got 3"),
        (dict(block=0), ValueError, "block must divide"),
    ],
)
def test_bad_arguments(change, error, message, device):
    arguments = dict(weight=torch.zeros(1, 2, 4), hinv=torch.eye(4)[None], block=1) | change
    with pytest.raises(error, match=message):
        ops.obs_path(**arguments)


def test_bad_nm(device):
    weight, hinv = torch.zeros(1, 2, 6), torch.eye(6)[None]
    with pytest.raises(ValueError, match="m must divide the 6 columns, got 4"):
        ops.nm_path(weight, hinv, 2, 4)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.m = 3, got 4"):
        ops.nm_path(weight, hinv, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    weight, _, hinv = random_problem(2, 3, 12, dtype)
    torch.library.opcheck(torch.ops.spade_fast.obs_path, (weight, hinv, 3))
    torch.library.opcheck(torch.ops.spade_fast.nm_path, (weight, hinv, 2, 4))


def test_compiles():
    weight, _, hinv = random_problem(1, 3, 12)
    compiled = torch.compile(lambda w, h: ops.obs_path(w * 1, h, 3), fullgraph=True, backend="aot_eager")
    for mine, truth in zip(compiled(weight, hinv), ops.obs_path(weight, hinv, 3), strict=True):
        assert torch.equal(mine, truth)
