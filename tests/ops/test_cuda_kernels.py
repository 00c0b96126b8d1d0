"""What only the CUDA kernels do: orders of execution, wide tiles, work in parts, values that no host code reads.

The tests of each op (test_gram.py, test_obs_path.py, ...) run on them as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import CUDA, running_on
from problems import random_problem
from simt import emulator
from test_gram import Conv, assert_upper_close
from torch import Tensor

from spade_fast import ops
from spade_fast.ops import reference


@pytest.fixture(params=CUDA, autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_on(request.param):
        yield request.param


def gram(conv: Conv, dtype: torch.dtype = torch.float32, layout: str = "nchw") -> tuple[Tensor, Tensor]:
    """Gram matrices of a convolution's random input, and the truth."""
    x = conv.input(dtype, layout)
    return ops.gram_conv2d_(torch.zeros(conv.gram_shape, dtype=dtype), x, *conv.geometry), conv.truth(x)


def sparsegpt(rows: int, columns: int, mask_block: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, hessian, _ = random_problem(2, rows, columns, dtype, seed=columns)
    factor, _ = ops.inverse_cholesky(hessian)
    sizes = [rows * (min(columns, first + mask_block) - first) for first in range(0, columns, mask_block)]
    counts = torch.tensor([size // 2 for size in sizes]).expand(2, -1)
    return ops.sparsegpt(weight, factor, counts, mask_block)


def path_and_solution(block: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, hessian, hinv = random_problem(2, 3, 108, seed=block)
    order, losses = ops.obs_path(weight, hinv, block)
    counts = torch.tensor([[[9, 0, 5], [1, 7, 12]], [[2, 8, 12], [6, 6, 3]]])
    return order, losses, ops.obs_solution(weight, hessian, hinv, order, counts, block)


WORK: dict[str, Callable[[], Any]] = {
    "gram of cells": lambda: gram(Conv(1, 40, (7, 6), (3, 3), padding=(1, 1), samples=2)),
    "gram by im2col": lambda: gram(Conv(2, 9, (9, 8), (3, 3), (2, 1), (1, 0), samples=2)),
    "gram of small groups": lambda: gram(Conv(50, 1, (20, 20), (3, 3), padding=(1, 1), samples=2)),
    "path and solution": lambda: path_and_solution(1),
    "path and solution in blocks": lambda: path_and_solution(9),
    "sparsegpt": lambda: sparsegpt(37, 70, 3),
    "sparsegpt in large mask blocks": lambda: sparsegpt(5, 80, 40),
}


@pytest.mark.parametrize("name", WORK)
def test_the_order_of_blocks_and_threads_does_not_matter(name: str, kernels: str) -> None:
    results = []
    for seed in range(3):
        torch.manual_seed(0)
        if kernels == "emulated":
            emulator.set_seed(seed)
        results.append(WORK[name]())
    emulator.set_seed(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", WORK)
def test_as_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    found = WORK[name]()
    torch.manual_seed(0)
    with running_on(ops.simd_level()):
        expected = WORK[name]()
    for mine, truth in zip(found, expected, strict=True):
        if not truth.is_floating_point():
            assert torch.equal(mine, truth)
        elif name.startswith("gram"):
            assert_upper_close(mine, truth.double(), 4e-6)
        else:
            torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-4)
            assert torch.equal(mine == 0, truth == 0)


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "nchw"), (torch.float64, "channels_last")])
def test_wide_gram_tiles(dtype: torch.dtype, layout: str) -> None:
    tolerance = 4e-6 if dtype == torch.float32 else 1e-13
    assert_upper_close(*gram(Conv(1, 200, (4, 3), (3, 3), padding=(1, 1)), dtype, layout), tolerance)
    assert_upper_close(*gram(Conv(1, 330, (5, 4), (1, 1), (2, 2)), dtype, layout), tolerance)


def test_sums_in_parts() -> None:
    """Long sums are split, to limit rounding errors and to occupy all multiprocessors."""
    x = torch.randn(2, 20001, 5)
    assert_upper_close(ops.gram_linear_(torch.zeros(2, 5, 5), x), reference.gram_linear(x), 2e-6)
    assert_upper_close(*gram(Conv(1, 7, (70, 60), (3, 3), padding=(1, 1))), 2e-6)
    assert_upper_close(*gram(Conv(1, 33, (40, 40), (3, 3), padding=(1, 1))), 2e-6)


def test_samples_in_parts() -> None:
    """The sums of the cells of seven samples do not fit into the emulator's working memory at once."""
    assert_upper_close(*gram(Conv(1, 40, (6, 5), (3, 3), padding=(1, 1), samples=7, images=1)), 2e-6)


@pytest.mark.parametrize(("rows", "columns", "block"), [(11, 330, 1), (5, 330, 5)])
def test_wide_flush_tiles_and_rows_in_parts(rows: int, columns: int, block: int) -> None:
    weight, _, hinv = random_problem(1, rows, columns, seed=1)
    order, losses = ops.obs_path(weight, hinv, block)
    with running_on(ops.simd_level()):
        expected, _ = ops.obs_path(weight.double(), hinv.double(), block)
    assert torch.equal(order.sort(2).values, expected.sort(2).values)
    agree = (order == expected).double().mean()
    assert agree > 0.9
    assert losses.isfinite().all()
    assert torch.equal(ops.obs_path(weight[:, -1:], hinv, block)[0], order[:, -1:])


def test_solutions_in_parts() -> None:
    weight, hessian, hinv = random_problem(2, 20, 300, torch.float64)
    order = torch.rand(2, 20, 300).argsort(2)
    counts = torch.randint(0, 301, (2, 20))
    pruned = ops.obs_solution(weight, hessian, hinv, order, counts)
    truth = reference.obs_solution(weight, hessian, hinv, order, counts)
    torch.testing.assert_close(pruned, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block", [1, 9])
def test_a_row_does_not_depend_on_other_rows(block: int) -> None:
    weight, hessian, hinv = random_problem(2, 6, 135, seed=3)
    order, losses = ops.obs_path(weight, hinv, block)
    alone = ops.obs_path(weight[1:, 4:5], hinv[1:], block)
    assert torch.equal(order[1:, 4:5], alone[0]) and torch.equal(losses[1:, 4:5], alone[1])
    counts = torch.randint(0, 135 // block + 1, (2, 6))
    pruned = ops.obs_solution(weight, hessian, hinv, order, counts, block)
    row = ops.obs_solution(weight[1:, 4:5], hessian[1:], hinv[1:], order[1:, 4:5], counts[1:, 4:5], block)
    assert torch.equal(pruned[1:, 4:5], row)


def test_a_problem_does_not_depend_on_the_batch() -> None:
    weight, hessian, _ = random_problem(3, 20, 90, seed=2)
    factor, _ = ops.inverse_cholesky(hessian)
    counts = torch.full((3, 90), 12)
    whole = ops.sparsegpt(weight, factor, counts, 1)
    alone = ops.sparsegpt(weight[1:2], factor[1:2], counts[1:2], 1)
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("removed", [2, 7])
def test_rows_without_a_solution_are_nan(removed: int) -> None:
    """On the CPU this is an error; on a GPU no value is read before the caller reads the result."""
    weight = torch.ones(2, 2, 9)
    hessian = torch.stack([torch.eye(9), -torch.eye(9)])
    order = torch.arange(9).expand(2, 2, 9)
    counts = torch.tensor([[removed, removed], [0, removed]])
    pruned = ops.obs_solution(weight, hessian, hessian, order, counts)
    kept = pruned[..., removed:]
    assert torch.equal(kept[0], torch.ones(2, 9 - removed)) and torch.equal(pruned[1, 0], torch.ones(9))
    assert kept[1, 1].isnan().all()
    assert (pruned[0, :, :removed] == 0).all() and (pruned[1, 1, :removed] == 0).all()


def test_counts_and_orders_out_of_range_touch_no_other_memory() -> None:
    """Values are not checked here, and their results are unspecified, but the emulator checks every access."""
    weight, hessian, hinv = random_problem(1, 3, 12)
    order = torch.tensor([[[0, 0, 1, 99], [-5, 2, 3, 4], [11, 10, 9, 8]]])
    for counts in ([4, 4, 4], [99, -1, 2]):
        pruned = ops.obs_solution(weight, hessian, hinv, order, torch.tensor([counts]))
        assert torch.equal((pruned[0, 2] == 0).nonzero().flatten(), torch.arange(12 - min(counts[2], 4), 12))
    pruned, _ = ops.sparsegpt(weight, ops.inverse_cholesky(hessian)[0], torch.full((1, 12), 99), 1)
    assert (pruned == 0).all()


def test_dead_columns() -> None:
    """Columns whose inputs are always zero, with the diagonal that the solvers give them."""
    weight, hessian, _ = random_problem(1, 4, 40, torch.float64, seed=4)
    dead = torch.tensor([0, 7, 39])
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    hessian[:, dead, dead] = hessian.diagonal(dim1=1, dim2=2).mean()
    hinv = torch.linalg.inv(hessian)
    weight[..., dead] *= 1e-12
    order, _ = ops.obs_path(weight, hinv)
    assert torch.equal(order, reference.obs_path(weight, hinv)[0])
    assert torch.equal(order[..., :3].sort(2).values.long(), dead.expand(1, 4, 3))
