"""sparsegpt against the column-by-column sweep in float64."""

from __future__ import annotations

import pytest
import torch
from backends import examples, in_turns
from hypothesis import given
from hypothesis import strategies as st
from problems import layer_errors, random_problem

from spade_fast import ops
from spade_fast.ops import reference


def mask_counts(problems, rows, columns, mask_block, share):
    sizes = [min(columns, start + mask_block) - start for start in range(0, columns, mask_block)]
    return torch.tensor([int(share * rows * size) for size in sizes], dtype=torch.int64).expand(problems, -1)


def factor_of(hessian, of_inverse):
    if of_inverse:
        return ops.inverse_cholesky(hessian)[0]
    return reference.reverse_cholesky(hessian)[0].to(hessian.dtype)


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 7, 1),
    (2, 5, 17, 3),
    (1, 40, 200, 1),
    (2, 33, 270, 9),
    (1, 20, 300, 150),
    (1, 8, 300, 300),
]


@in_turns(shape=SHAPES, share=[0.0, 0.5, 0.9, 1.0], of_inverse=[True, False])
def test_float64(backend, shape, share, of_inverse):
    problems, rows, columns, mask_block = shape
    weight, hessian, _ = random_problem(problems, rows, columns, torch.float64, seed=columns)
    factor = factor_of(hessian, of_inverse)
    counts = mask_counts(problems, rows, columns, mask_block, share)
    pruned, losses = ops.sparsegpt(weight, factor, counts, mask_block, of_inverse=of_inverse)
    truth, true_losses = reference.sparsegpt(weight, factor, counts, mask_block, of_inverse=of_inverse)
    torch.testing.assert_close(pruned, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(losses, true_losses, rtol=1e-9, atol=1e-12)
    assert torch.equal((pruned == 0).sum((1, 2)), counts.sum(1))


@pytest.mark.parametrize("of_inverse", [True, False])
def test_float32_masks(backend, of_inverse):
    """Masks in float32 are those in float64 except for one weight in a thousand; the layer error is the same."""
    weight, hessian, _ = random_problem(2, 64, 256, seed=8)
    counts = mask_counts(2, 64, 256, 1, 0.8)
    pruned, _ = ops.sparsegpt(weight, factor_of(hessian, of_inverse), counts, 1, of_inverse=of_inverse)
    truth, _ = reference.sparsegpt(weight, reference.inverse_cholesky(hessian)[0], counts, 1)
    assert ((pruned == 0) != (truth == 0)).double().mean() <= 1e-3
    torch.testing.assert_close(
        layer_errors(weight, pruned, hessian).sum(1), layer_errors(weight, truth, hessian).sum(1), rtol=1e-3, atol=0
    )


def test_losses_are_the_layer_error(backend):
    weight, hessian, _ = random_problem(2, 6, 150, torch.float64, seed=6)
    factor, _ = ops.inverse_cholesky(hessian)
    pruned, losses = ops.sparsegpt(weight, factor, mask_counts(2, 6, 150, 1, 0.5), 1)
    torch.testing.assert_close(losses, layer_errors(weight, pruned, hessian))


@in_turns(pattern=[(2, 4), (4, 8), (1, 3), (0, 4), (4, 4)], groups=[1, 6, 40], of_inverse=[True, False])
def test_nm(backend, pattern, groups, of_inverse):
    n, m = pattern
    weight, hessian, _ = random_problem(2, 5, m * groups, torch.float64, seed=groups)
    given = weight, factor_of(hessian, of_inverse), torch.zeros(2, 0, dtype=torch.int64)
    pruned, losses = ops.sparsegpt(*given, 128, n=n, m=m, of_inverse=of_inverse)
    truth, true_losses = reference.sparsegpt(*given, m * groups, n=n, m=m, of_inverse=of_inverse)
    torch.testing.assert_close(pruned, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(losses, true_losses, rtol=1e-9, atol=1e-12)
    assert ((pruned.unflatten(2, (groups, m)) == 0).sum(3) == n).all()


def zeros_in(weight, share):
    """The weight with so many of its values zero, all of those of its first column and none of those of its last."""
    zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
    zero[..., 0], zero[..., -1] = True, False
    return weight.masked_fill(zero, 0)


@in_turns(shape=SHAPES[1:], share=[0.0, 0.3, 0.7], zeros=[0.1, 0.5], of_inverse=[True, False])
def test_kept_zeros(backend, shape, share, zeros, of_inverse):
    problems, rows, columns, mask_block = shape
    weight, hessian, _ = random_problem(problems, rows, columns, torch.float64, seed=columns)
    weight = zeros_in(weight, zeros)
    given = weight, factor_of(hessian, of_inverse), mask_counts(problems, rows, columns, mask_block, share), mask_block
    pruned, losses = ops.sparsegpt(*given, keep_zeros=True, of_inverse=of_inverse)
    truth, true_losses = reference.sparsegpt(*given, keep_zeros=True, of_inverse=of_inverse)
    torch.testing.assert_close(pruned, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(losses, true_losses, rtol=1e-9, atol=1e-12)
    assert not pruned[weight == 0].any()
    for block, start in enumerate(range(0, columns, mask_block)):
        before = (weight[..., start : start + mask_block] == 0).sum((1, 2))
        after = (pruned[..., start : start + mask_block] == 0).sum((1, 2))
        assert torch.equal(after, torch.maximum(before, given[2][:, block]))


@in_turns(pattern=[(2, 4), (1, 3), (0, 4), (4, 4)], zeros=[0.1, 0.6])
def test_kept_zeros_nm(backend, pattern, zeros):
    n, m = pattern
    weight, hessian, _ = random_problem(2, 5, m * 12, torch.float64, seed=m)
    weight = zeros_in(weight, zeros)
    factor, _ = ops.inverse_cholesky(hessian)
    none = torch.zeros(2, 0, dtype=torch.int64)
    pruned, losses = ops.sparsegpt(weight, factor, none, 128, n=n, m=m, keep_zeros=True)
    truth, true_losses = reference.sparsegpt(weight, factor, none, 12 * m, n=n, m=m, keep_zeros=True)
    torch.testing.assert_close(pruned, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(losses, true_losses, rtol=1e-9, atol=1e-12)
    before = (weight.unflatten(2, (-1, m)) == 0).sum(3)
    assert torch.equal((pruned.unflatten(2, (-1, m)) == 0).sum(3), before.clamp(min=n))


def test_nothing_to_keep_changes_no_bit(backend):
    weight, hessian, _ = random_problem(2, 9, 70, seed=4)
    factor, _ = ops.inverse_cholesky(hessian)
    for pattern in ({}, {"n": 1, "m": 2}):
        given = (weight, factor, mask_counts(2, 9, 70, 3, 0.5), 3)
        for plain, kept in zip(
            ops.sparsegpt(*given, **pattern), ops.sparsegpt(*given, **pattern, keep_zeros=True), strict=True
        ):
            assert torch.equal(plain, kept)


def test_kept_zeros_come_before_weights_of_score_zero(backend):
    """Squares of these weights are zero in float32, so that all scores are equal."""
    weight = torch.tensor([[[1e-30, 0.0, 2e-30, 0.0]]])
    pruned, _ = ops.sparsegpt(weight, torch.eye(4)[None], torch.tensor([[3]]), 4, keep_zeros=True)
    assert torch.equal(pruned == 0, torch.tensor([[[True, True, False, True]]]))


def test_ties(backend):
    weight, factor = torch.ones(1, 4, 6), torch.eye(6)[None]
    counts = torch.tensor([[3, 0]])
    pruned, _ = ops.sparsegpt(weight, factor, counts, 3)
    assert pruned[0, :, 0].tolist() == [0, 0, 0, 1] and (pruned[0, :, 1:] == 1).all()
    pruned, _ = ops.sparsegpt(weight, factor, counts, 3, include_ties=True)
    assert (pruned[0, :, :3] == 0).all() and (pruned[0, :, 3:] == 1).all()
    pruned, _ = ops.sparsegpt(weight, factor, torch.zeros(1, 0, dtype=torch.int64), 128, n=2, m=3)
    assert torch.equal(pruned[0], torch.tensor([0.0, 0, 1]).repeat(4, 2))


@pytest.mark.parametrize("of_inverse", [True, False])
def test_random_shapes(backend, of_inverse):
    @examples(25, backend)
    @given(
        problems=st.integers(0, 3),
        rows=st.integers(0, 6),
        columns=st.integers(0, 40),
        mask_block=st.integers(1, 45),
        share=st.floats(0, 1),
        seed=st.integers(0, 2**31),
    )
    def agrees(problems, rows, columns, mask_block, share, seed):
        weight, hessian, _ = random_problem(problems, rows, columns, torch.float64, seed)
        factor = factor_of(hessian, of_inverse)
        counts = mask_counts(problems, rows, columns, min(mask_block, max(columns, 1)), share)
        pruned, losses = ops.sparsegpt(weight, factor, counts, mask_block, of_inverse=of_inverse)
        assert pruned.shape == weight.shape and losses.shape == weight.shape[:2]
        if weight.numel():
            truth, _ = reference.sparsegpt(weight, factor, counts, mask_block, of_inverse=of_inverse)
            torch.testing.assert_close(pruned, truth, rtol=1e-8, atol=1e-10)

    agrees()


@pytest.mark.parametrize("of_inverse", [True, False])
def test_threads_do_not_matter(of_inverse):
    weight, hessian, _ = random_problem(3, 20, 300, seed=2)
    factor = factor_of(hessian, of_inverse)
    options = {"of_inverse": of_inverse}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            whole = ops.sparsegpt(weight, factor, mask_counts(3, 20, 300, 1, 0.7), 1, **options)[0]
            alone = ops.sparsegpt(weight[1:2], factor[1:2], mask_counts(1, 20, 300, 1, 0.7), 1, **options)[0]
            results += [whole[1:2], alone]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask_block=0), ValueError, "mask_block must be at least 1, got 0"),
        (
            dict(counts=torch.tensor([[9, 0]])),
            ValueError,
            r"counts must lie in 0..4 \(the weights of mask block 0\), got 9",
        ),
        (dict(counts=torch.tensor([[1]])), ValueError, "counts must have shape"),
        (dict(counts=torch.tensor([[1.0, 1.0]])), TypeError, "counts must be int32 or int64"),
        (dict(m=3, n=1), ValueError, "m must divide the 4 columns, got 3"),
        (dict(m=2, n=3), ValueError, "0 <= n <= m"),
        (dict(factor=torch.eye(3)[None]), ValueError, "factor must have shape"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = dict(
        weight=torch.ones(1, 2, 4), factor=torch.eye(4)[None], counts=torch.tensor([[1, 1]]), mask_block=2, n=0, m=0
    )
    with pytest.raises(error, match=message):
        ops.sparsegpt(**(arguments | change))


def test_opcheck():
    weight, hessian, _ = random_problem(2, 3, 12)
    factor, _ = ops.inverse_cholesky(hessian)
    counts = mask_counts(2, 3, 12, 3, 0.5).contiguous()
    torch.library.opcheck(torch.ops.spade_fast.sparsegpt, (weight, factor, counts, 3, 0, 0, False, True, True))
