"""obs_solution against normal equations in float64."""

from __future__ import annotations

import pytest
import torch
from backends import examples
from hypothesis import given
from hypothesis import strategies as st
from problems import layer_errors, random_problem

from spade_fast import ops
from spade_fast.ops import reference


@pytest.mark.parametrize(("columns", "block"), [(1, 1), (2, 1), (9, 1), (17, 1), (18, 9), (100, 4), (150, 1)])
def test_float64(backend, columns, block):
    weight, hessian, hinv = random_problem(2, 3, columns, torch.float64, seed=columns)
    order, _ = ops.obs_path(weight, hinv, block)
    steps = order.shape[2]
    for counts in ([0, 1, steps], [steps // 3, steps // 2, steps - 1], [steps] * 3):
        counts = torch.tensor([counts, counts[::-1]])
        pruned = ops.obs_solution(weight, hessian, hinv, order, counts, block)
        truth = reference.obs_solution(weight, hessian, hinv, order, counts, block)
        torch.testing.assert_close(pruned, truth, rtol=1e-9, atol=1e-11)
        assert torch.equal((pruned == 0).sum(2), counts * block)


@pytest.mark.parametrize(("columns", "block"), [(1, 1), (24, 3), (110, 1), (230, 1)])
def test_levels_of_one_call(backend, columns, block):
    """Levels share factorisations; in any order, their results are those of single calls."""
    weight, hessian, hinv = random_problem(2, 3, columns, torch.float64, seed=columns)
    order, _ = ops.obs_path(weight, hinv, block)
    counts = torch.randint(0, columns // block + 1, (2, 4, 2, 3), generator=torch.Generator().manual_seed(columns))
    pruned = ops.obs_solution(weight, hessian, hinv, order, counts, block)
    truth = reference.obs_solution(weight, hessian, hinv, order, counts, block)
    torch.testing.assert_close(pruned, truth, rtol=1e-9, atol=1e-11)
    assert torch.equal((pruned == 0).sum(4), counts * block)
    assert ops.obs_solution(weight, hessian, hinv, order, counts[:0], block).shape == (0, 4, 2, 3, columns)


def test_float32_is_as_good_as_torch(backend):
    """Rule of the package: at most twice the error of plain float32 torch, both against float64."""
    weight, hessian, hinv = random_problem(1, 6, 140, seed=4)
    order, _ = ops.obs_path(weight, hinv)
    counts = torch.tensor([[5, 40, 69, 71, 100, 135]])
    truth = reference.obs_solution(weight, hessian, hinv, order, counts)
    plain = weight.clone()
    for r, count in enumerate(counts[0].tolist()):
        gone = order[0, r, :count].long()
        kept = torch.ones(140, dtype=torch.bool).index_fill(0, gone, False).nonzero().flatten()
        right = hessian[0][kept][:, gone] @ weight[0, r, gone]
        plain[0, r, kept] += torch.cholesky_solve(right[:, None], torch.linalg.cholesky(hessian[0][kept][:, kept]))[
            :, 0
        ]
        plain[0, r, gone] = 0
    bound = 2 * (plain - truth).abs().max() + 1e-6
    assert (ops.obs_solution(weight, hessian, hinv, order, counts) - truth).abs().max() <= bound
    levels = torch.stack([counts // 2, counts, 140 - (140 - counts) // 4])
    assert (ops.obs_solution(weight, hessian, hinv, order, levels)[1] - truth).abs().max() <= bound


def test_random_shapes(backend):
    @examples(25, backend)
    @given(
        problems=st.integers(0, 2),
        rows=st.integers(0, 3),
        count=st.integers(0, 14),
        block=st.integers(1, 4),
        seed=st.integers(0, 2**31),
        data=st.data(),
    )
    def agrees(problems, rows, count, block, seed, data):
        weight, hessian, hinv = random_problem(problems, rows, count * block, torch.float64, seed)
        order, losses = ops.obs_path(weight, hinv, block)
        counts = torch.tensor(
            data.draw(st.lists(st.integers(0, count), min_size=problems * rows, max_size=problems * rows)),
            dtype=torch.int32,
        ).reshape(problems, rows)
        pruned = ops.obs_solution(weight, hessian, hinv, order, counts, block)
        assert pruned.shape == weight.shape
        if weight.numel() == 0:
            return
        summed = torch.cat([torch.zeros(problems, rows, 1, dtype=torch.float64), losses.cumsum(2)], 2)
        expected = summed.gather(2, counts.long()[..., None])[..., 0]
        torch.testing.assert_close(layer_errors(weight, pruned, hessian), expected, rtol=1e-7, atol=1e-9)

    agrees()


def test_rows_without_removals_are_untouched_bits(backend):
    weight, hessian, hinv = random_problem(1, 2, 20, seed=9)
    order, _ = ops.obs_path(weight, hinv)
    pruned = ops.obs_solution(weight, hessian, hinv, order, torch.tensor([[0, 20]]))
    assert torch.equal(pruned[0, 0], weight[0, 0])
    assert (pruned[0, 1] == 0).all()
    assert pruned.data_ptr() != weight.data_ptr()


def test_threads_do_not_matter():
    weight, hessian, hinv = random_problem(2, 5, 90, seed=2)
    order, _ = ops.obs_path(weight, hinv)
    counts = torch.randint(0, 91, (2, 5))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.obs_solution(weight, hessian, hinv, order, counts))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(order=torch.zeros(1, 2, 4)), TypeError, "order must be int32 or int64"),
        (dict(order=torch.zeros(1, 3, 4, dtype=torch.int32)), ValueError, "order must have shape"),
        (dict(order=torch.tensor([[[0, 0, 1, 2]] * 2])), ValueError, "removes block 0 of a row twice"),
        (dict(order=torch.tensor([[[0, 9, 1, 2]] * 2])), ValueError, "order must hold block indices 0..3, got 9"),
        (dict(counts=torch.tensor([[5, 0]])), ValueError, r"counts must lie in 0..4 .*, got 5"),
        (dict(counts=torch.tensor([[1.0, 0]])), TypeError, "counts must be int32 or int64"),
        (dict(counts=torch.tensor([3, 2])), ValueError, r"counts must have shape \[..., 1, 2\], got \[2\]"),
        (dict(counts=torch.zeros(3, 2, 2, dtype=torch.int64)), ValueError, r"counts must have shape \[..., 1, 2\]"),
        (dict(hessian=torch.eye(3)[None]), ValueError, "hessian must have shape"),
        (
            dict(hessian=-torch.eye(4)[None], hinv=-torch.eye(4)[None]),
            torch.linalg.LinAlgError,
            "problem 0 .* row [01]",
        ),
        (dict(hinv=-torch.eye(4)[None], counts=torch.tensor([[0, 1]])), torch.linalg.LinAlgError, "problem 0 .* row 1"),
        (
            dict(hessian=-torch.eye(4)[None], counts=torch.tensor([[3, 0]])),
            torch.linalg.LinAlgError,
            "problem 0 .* row 0",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = dict(
        weight=torch.ones(1, 2, 4),
        hessian=torch.eye(4)[None],
        hinv=torch.eye(4)[None],
        order=torch.arange(4).expand(1, 2, 4),
        counts=torch.tensor([[3, 2]]),
    )
    with pytest.raises(error, match=message):
        ops.obs_solution(**(arguments | change))


@pytest.mark.parametrize("value", [2**32 + 1, -(2**32), 2**31, 2**62, -1])
def test_integers_are_not_cut_to_32_bits(value):
    weight, eye = torch.ones(1, 1, 4), torch.eye(4)[None]
    with pytest.raises(ValueError, match=f"order must hold block indices 0..3, got {value}"):
        ops.obs_solution(weight, eye, eye, torch.tensor([[[value]]]), torch.tensor([[1]]))
    with pytest.raises(ValueError, match=rf"counts must lie in 0..1 \(the length of order\), got {value}"):
        ops.obs_solution(weight, eye, eye, torch.tensor([[[2]]]), torch.tensor([[value]]))


def test_an_order_is_no_longer_than_a_row():
    weight, eye = torch.ones(1, 1, 4), torch.eye(4)[None]
    with pytest.raises(ValueError, match="order must have at most 2 blocks per row, got 3"):
        ops.obs_solution(weight, eye, eye, torch.tensor([[[0, 1, 1]]]), torch.tensor([[1]]), 2)
    with pytest.raises(ValueError, match="order must have at most 4 blocks per row, got 2147483648"):
        ops.obs_solution(weight, eye, eye, torch.zeros(1, dtype=torch.int64).expand(1, 1, 2**31), torch.tensor([[1]]))


def test_opcheck():
    weight, hessian, hinv = random_problem(2, 3, 12)
    order, _ = ops.obs_path(weight, hinv, 3)
    for counts in (torch.full((2, 3), 2), torch.full((4, 2, 3), 2)):
        torch.library.opcheck(torch.ops.spade_fast.obs_solution, (weight, hessian, hinv, order, counts, 3))
