"""The oracle itself, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spade_fast.ops import reference


def problem(problems: int, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, positive definite Hessians and their inverses, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(problems, 2 * columns + 3, columns, generator=generator, dtype=torch.float64)
    hessian = reference.gram_linear(x) / columns
    weight = torch.randn(problems, rows, columns, generator=generator, dtype=torch.float64)
    return weight, hessian, torch.linalg.inv(hessian)


def increase(hessian: Tensor, delta: Tensor) -> Tensor:
    """``1/2 δᵀHδ`` of each row."""
    return torch.einsum("brc,bcd,brd->br", delta, hessian, delta) / 2


def best_fit(hessian: Tensor, w: Tensor, removed: list[int]) -> Tensor:
    """Least-squares weights of one row with ``removed`` at zero, by a square root of the Hessian."""
    root = torch.linalg.cholesky(hessian).mT
    kept = [j for j in range(len(w)) if j not in removed]
    result = torch.zeros_like(w)
    result[kept] = torch.linalg.lstsq(root[:, kept], root @ w).solution
    return result


def test_gram_linear_is_a_sum_of_outer_products() -> None:
    x = torch.randn(2, 7, 5)
    by_hand = torch.stack([sum(torch.outer(v, v) for v in sample.double()) for sample in x])
    torch.testing.assert_close(reference.gram_linear(x), by_hand)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    channels=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_gram_conv2d_by_hand(
    samples: int,
    groups: int,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    x = torch.randn(samples * 2, groups * channels, 6, 7, dtype=torch.float64)
    gram = reference.gram_conv2d(x, groups, kernel, stride, padding, dilation, samples=samples)
    padded = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    size = [padded.shape[2 + a] - dilation[a] * (kernel[a] - 1) for a in (0, 1)]
    expected = torch.zeros_like(gram)
    for image, g, i, j in itertools.product(
        range(len(x)), range(groups), range(0, size[0], stride[0]), range(0, size[1], stride[1])
    ):
        patch = padded[image, g * channels : (g + 1) * channels]
        patch = patch[:, i : i + dilation[0] * kernel[0] : dilation[0], j : j + dilation[1] * kernel[1] : dilation[1]]
        column = patch[:, : kernel[0], : kernel[1]].permute(1, 2, 0).flatten()
        expected[image // 2, g] += torch.outer(column, column)
    torch.testing.assert_close(gram, expected)


def test_gram_conv2d_orders_columns_like_the_layer() -> None:
    layer = nn.Conv2d(4, 3, (3, 2), padding=1, bias=False, dtype=torch.float64)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    w = layer.weight.permute(0, 2, 3, 1).flatten(1)
    gram = reference.gram_conv2d(x, 1, (3, 2), padding=(1, 1))[0, 0]
    torch.testing.assert_close((w @ gram * w).sum(), layer(x).square().sum())


def test_inverse_cholesky() -> None:
    _, hessian, _ = problem(3, 1, 9)
    factor, info = reference.inverse_cholesky(hessian, torch.tensor([0.0, 0.1, 2.0]))
    damped = hessian + torch.tensor([0.0, 0.1, 2.0])[:, None, None] * torch.eye(9)
    assert info.tolist() == [0, 0, 0] and info.dtype == torch.int32
    torch.testing.assert_close(factor, factor.triu())
    torch.testing.assert_close(factor.mT @ factor, torch.linalg.inv(damped))


def test_inverse_cholesky_reports_the_singular_problem_alone() -> None:
    _, hessian, _ = problem(3, 1, 5)
    hessian[1] = -hessian[1]
    factor, info = reference.inverse_cholesky(hessian, 0.0)
    assert (info != 0).tolist() == [False, True, False]
    assert factor[[0, 2]].isfinite().all()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 6), block=st.integers(1, 3), seed=st.integers(0, 1000))
def test_each_removal_is_the_cheapest_and_costs_its_loss(rows: int, blocks: int, block: int, seed: int) -> None:
    weight, hessian, hinv = problem(2, rows, blocks * block, seed)
    order, losses = reference.obs_path(weight, hinv, block)
    assert order.dtype == torch.int32 and order.shape == losses.shape == (2, rows, blocks)
    for b, r in itertools.product(range(2), range(rows)):
        removed: list[int] = []
        total = 0.0
        for step in range(blocks):
            costs = {}
            for candidate in set(range(blocks)) - {j // block for j in removed}:
                columns = removed + list(range(candidate * block, (candidate + 1) * block))
                delta = best_fit(hessian[b], weight[b, r], columns) - weight[b, r]
                costs[candidate] = float(delta @ hessian[b] @ delta) / 2 - total
            chosen = int(order[b, r, step])
            assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-9)
            assert float(losses[b, r, step]) == pytest.approx(costs[chosen], rel=1e-6, abs=1e-9)
            total += costs[chosen]
            removed += range(chosen * block, (chosen + 1) * block)


def test_equal_scores_go_from_the_lowest_index() -> None:
    order, losses = reference.obs_path(torch.ones(1, 1, 4), torch.eye(4)[None])
    assert order.flatten().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(losses.flatten(), torch.full((4,), 0.5, dtype=torch.float64))


def test_zero_weights_go_first_and_for_free() -> None:
    weight, _, hinv = problem(1, 1, 6)
    weight[0, 0, [4, 1]] = 0
    order, losses = reference.obs_path(weight, hinv)
    assert order[0, 0, :2].tolist() == [1, 4]
    assert losses[0, 0, :2].tolist() == [0, 0]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 4)])
def test_nm_path_leaves_n_of_m(n: int, m: int) -> None:
    weight, hessian, hinv = problem(2, 3, 12)
    order, losses = reference.nm_path(weight, hinv, n, m)
    removed = torch.zeros(2, 3, 12).scatter_(2, order.long(), 1)
    assert (removed.unflatten(2, (-1, m)).sum(3) == n).all()
    solution = reference.obs_solution(weight, hessian, hinv, order, torch.full((2, 3), order.shape[2]))
    torch.testing.assert_close(increase(hessian, solution - weight), losses.sum(2))


def test_nm_path_of_everything_is_the_plain_path() -> None:
    weight, _, hinv = problem(1, 2, 8)
    for ours, plain in zip(reference.nm_path(weight, hinv, 8, 8), reference.obs_path(weight, hinv), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("block", [1, 3])
def test_obs_solution_is_the_least_squares_fit(block: int) -> None:
    weight, hessian, hinv = problem(2, 4, 9)
    order, losses = reference.obs_path(weight, hinv, block)
    for count in range(9 // block + 1):
        counts = torch.full((2, 4), count)
        counts[1, 3] = 0
        solution = reference.obs_solution(weight, hessian, hinv, order, counts, block)
        for b, r in itertools.product(range(2), range(4)):
            blocks = order[b, r, : counts[b, r]].tolist()
            removed = [j for start in blocks for j in range(start * block, (start + 1) * block)]
            torch.testing.assert_close(solution[b, r], best_fit(hessian[b], weight[b, r], removed))
            assert (solution[b, r, removed] == 0).all()
        expected = torch.stack([losses[b, r, : counts[b, r]].sum() for b in range(2) for r in range(4)]).reshape(2, 4)
        torch.testing.assert_close(increase(hessian, solution - weight), expected)


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 8), mask_block=st.integers(1, 9), seed=st.integers(0, 1000))
def test_sparsegpt_fits_the_later_columns(columns: int, mask_block: int, seed: int) -> None:
    """The last kept columns are optimal for the mask, and the losses add up to the whole increase."""
    weight, hessian, _ = problem(2, 3, columns, seed)
    factor, _ = reference.inverse_cholesky(hessian, 0.0)
    blocks = -(-columns // mask_block)
    widths = [min(mask_block, columns - i * mask_block) for i in range(blocks)]
    counts = torch.tensor([[3 * width // 2 for width in widths]] * 2)
    pruned, losses = reference.sparsegpt(weight, factor, counts, mask_block)
    assert (pruned == 0).flatten(1).sum(1).tolist() == counts.sum(1).tolist()
    torch.testing.assert_close(increase(hessian, pruned - weight), losses)
    for b, r in itertools.product(range(2), range(3)):
        # Column j is final once the sweep has passed it: columns after the last removed one fit given all others.
        gone = (pruned[b, r] == 0).nonzero().flatten().tolist()
        after = range(gone[-1] + 1 if gone else columns, columns)
        gradient = hessian[b] @ (pruned[b, r] - weight[b, r])
        torch.testing.assert_close(gradient[list(after)], torch.zeros(len(after), dtype=torch.float64))


def test_sparsegpt_removes_the_smallest_scores_of_each_mask_block() -> None:
    weight = torch.tensor([[[3.0, 1.0, 2.0, 5.0], [1.5, 4.0, 6.0, 0.5]]])
    factor = torch.diag(torch.tensor([1.0, 1.0, 2.0, 1.0]))[None]
    pruned, losses = reference.sparsegpt(weight, factor, torch.tensor([[2, 1]]), 2)
    assert pruned.tolist() == [[[3, 0, 2, 5], [0, 4, 6, 0]]]
    assert losses.tolist() == [[0.5, 1.125 + 0.125]]


def test_sparsegpt_ties() -> None:
    weight, factor = torch.ones(1, 2, 3), torch.eye(3)[None]
    exact, _ = reference.sparsegpt(weight, factor, torch.tensor([[3]]), 3)
    assert exact.tolist() == [[[0, 0, 1], [0, 1, 1]]]
    tied, _ = reference.sparsegpt(weight, factor, torch.tensor([[1]]), 3, include_ties=True)
    assert tied.tolist() == [[[0, 0, 0], [0, 0, 0]]]
    none, _ = reference.sparsegpt(weight, factor, torch.tensor([[0]]), 3, include_ties=True)
    assert none.tolist() == weight.tolist()


def test_sparsegpt_keeps_zeros() -> None:
    weight = torch.tensor([[[0.0, 3.0, 2.0, 0.0], [1.0, 0.0, 0.0, 4.0]]])
    factor = torch.eye(4)[None] + 0.5 * torch.ones(4, 4).triu(1)
    given = {"counts": torch.tensor([[3, 1]]), "mask_block": 2}
    changed, _ = reference.sparsegpt(weight, factor, **given)
    assert changed.tolist() == [[[0, 3, 2, 0], [0, 0, -0.25, 3.75]]]
    kept, losses = reference.sparsegpt(weight, factor, **given, keep_zeros=True)
    assert kept.tolist() == [[[0, 3, 2, 0], [0, 0, 0, 3.875]]]
    assert losses.tolist() == [[0, 0.5 + 0.125 + 0.03125]]
    pattern, _ = reference.sparsegpt(weight, factor, **given, n=1, m=4, keep_zeros=True)
    assert (pattern == 0).tolist() == [[[True, False, False, True], [False, True, True, False]]]


def test_sparsegpt_nm_restarts_at_each_mask_block() -> None:
    weight, hessian, _ = problem(1, 4, 12)
    factor, _ = reference.inverse_cholesky(hessian, 0.0)
    pruned, _ = reference.sparsegpt(weight, factor, torch.zeros(1, 2, dtype=torch.long), 6, n=2, m=4)
    removed = (pruned == 0)[0]
    for start, stop, expected in [(0, 4, 2), (4, 6, 2), (6, 10, 2), (10, 12, 2)]:
        assert (removed[:, start:stop].sum(1) == expected).all()
