"""``SparseGPT`` and ``SparseGPTSuperFast`` on every kind of layer, their corner cases and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compat_layers import LAYERS, make, matrices, outputs_by_row
from torch import Tensor, nn

from spade_fast.compat import SparseGPT, SparseGPTSuperFast
from spade_fast.ops import reference

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
UNGROUPED = [name for name in LAYERS if getattr(make(name)[0], "groups", 1) == 1]


def collected(layer: nn.Module, x: Tensor) -> SparseGPT:
    solver = SparseGPT(layer)
    for part in x.chunk(2):
        solver.add_batch(part, None)
    return solver


def solution(
    weight: Tensor, hessian: Tensor, sparsity: float, blocksize: int, percdamp: float, n: int = 0, m: int = 0
) -> Tensor:
    """The published rule for one matrix ``[rows, columns]``, by the oracle."""
    factor, _ = reference.inverse_cholesky(hessian[None], percdamp * hessian.diagonal().mean())
    widths = [min(blocksize, weight.shape[1] - start) for start in range(0, weight.shape[1], blocksize)]
    counts = [min(int(weight.shape[0] * width * sparsity) + 1, weight.shape[0] * width) for width in widths]
    return reference.sparsegpt(weight[None], factor, torch.tensor([counts]), blocksize, n=n, m=m, include_ties=True)[0][
        0
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_hessian_gives_the_size_of_the_outputs(name: str) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    samples = 2 if x.dim() == 2 else x.shape[0]  # a two-dimensional batch is one sample
    assert solver.nsamples == samples
    assert solver.H.dtype == torch.float32
    weight = matrices(layer)
    power = ((weight @ solver.H.double().reshape(-1, solver.columns, solver.columns)) * weight).sum(2).flatten()
    torch.testing.assert_close(power, 2 / samples * outputs_by_row(layer, x).square().sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNGROUPED)
@pytest.mark.parametrize(("sparsity", "blocksize"), [(0.9, 1), (0.5, 9), (0.0, 128), (1, 5)])
def test_weights_agree_with_the_oracle(name: str, sparsity: float, blocksize: int) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    hessian, weight = solver.H.double(), matrices(layer)[0]
    solver.fasterprune(sparsity, blocksize=blocksize, percdamp=0.1)
    expected = solution(weight, hessian, sparsity, blocksize, 0.1)
    assert torch.equal(matrices(layer)[0] == 0, expected == 0)
    torch.testing.assert_close(matrices(layer)[0], expected, **CLOSE)
    torch.testing.assert_close(solver.H.double(), hessian)


@pytest.mark.parametrize("name", ["linear", "conv", "grouped", "depthwise", "transformers Conv1D"])
def test_nm_is_solved_group_by_group(name: str) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    weights, hessians = matrices(layer), solver.H.double().reshape(-1, solver.columns, solver.columns)
    m = 4 if solver.columns % 4 == 0 else 3
    solver.fasterprune(0, prunen=2, prunem=m)
    for weight, hessian, pruned in zip(weights, hessians, matrices(layer), strict=True):
        torch.testing.assert_close(pruned, solution(weight, hessian, 0, 128, 0.01, n=2, m=m), **CLOSE)


@pytest.mark.parametrize("name", ["grouped", "depthwise", "depthwise multiplier", "conv1d grouped"])
@pytest.mark.parametrize("blocksize", [1, 3, 128])
def test_groups_share_each_threshold(name: str, blocksize: int) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    before = matrices(layer)
    solver.fasterprune(0.5, blocksize=blocksize)
    after = matrices(layer)
    for start in range(0, solver.columns, blocksize):
        block = after[:, :, start : start + blocksize]
        assert (block == 0).sum() == block.numel() // 2 + 1
    for weight, hessian, pruned in zip(before, solver.H.double(), after, strict=True):
        # Given how many weights of each block this group lost, the oracle removes the same ones.
        factor, _ = reference.inverse_cholesky(hessian[None], 0.01 * hessian.diagonal().mean())
        counts = torch.stack([(block == 0).sum() for block in pruned.split(blocksize, 1)])
        expected, _ = reference.sparsegpt(weight[None], factor, counts[None], blocksize)
        torch.testing.assert_close(pruned, expected[0], **CLOSE)


def test_dead_columns() -> None:
    layer, x = make("linear")
    x[:, [2, 7]] = 0
    collected(layer, x).fasterprune(0.3, blocksize=4)
    assert (layer.weight[:, [2, 7]] == 0).all() and (layer.weight != 0).any()


def test_half_precision_weights_are_solved_in_float32() -> None:
    layer, x = make("conv")
    layer.half()
    hessian = collected(layer, x.half()).H.double()
    expected = solution(matrices(layer)[0], hessian, 0.5, 9, 0.01)
    collected(layer, x.half()).fasterprune(0.5, blocksize=9)
    assert layer.weight.dtype == torch.float16
    torch.testing.assert_close(matrices(layer)[0], expected, **CLOSE)


def test_singular_hessian_is_an_error_that_names_the_layer() -> None:
    layer, x = make("linear")
    solver = collected(layer, x)
    solver.H -= 100 * torch.eye(12)
    before = layer.weight.detach().clone()
    with pytest.raises(torch.linalg.LinAlgError, match=r"Linear layer with weight \(8, 12\).*percdamp=0.01"):
        solver.fasterprune(0.5)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["linear tokens", "conv", "depthwise", "transformers Conv1D"])
def test_super_fast_solves_each_sample_by_itself(name: str) -> None:
    layer, _ = make(name)
    batch = SparseGPTSuperFast(layer, 3)
    layers = [copy.deepcopy(layer) for _ in range(3)]
    for index in range(3):
        _, x = make(name)
        single = collected(copy.deepcopy(layer), x)
        assert batch.model_counter == index and batch.nsamples == 0
        for part in x.chunk(2):
            batch.add_batch(part, None)
        batch.inc_model_counter()
        torch.testing.assert_close(batch.H[index], single.H)
        single.fasterprune(0.6, blocksize=3)
        layers.append(single.layer)
    before = layer.weight.detach().clone()
    batch.fasterprune(0.6, layers[:3], blocksize=3)
    for ours, expected in zip(layers[:3], layers[3:], strict=True):
        assert torch.equal(ours.weight == 0, expected.weight == 0)
        torch.testing.assert_close(ours.weight, expected.weight, **CLOSE)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_super_fast_prunes_a_singular_sample_by_magnitude(name: str) -> None:
    layer, x = make(name)
    batch = SparseGPTSuperFast(layer, 2)
    batch.add_batch(x, None)
    batch.inc_model_counter()
    batch.add_batch(x, None)
    batch.H[1] -= 100 * torch.eye(batch.columns)
    layers = [copy.deepcopy(layer) for _ in range(2)]
    batch.fasterprune(0.5, layers)
    alone = SparseGPT(copy.deepcopy(layer))
    alone.add_batch(x, None)
    alone.fasterprune(0.5)
    torch.testing.assert_close(layers[0].weight, alone.layer.weight, **CLOSE)
    limit = layer.weight.abs().flatten().sort().values[layer.weight.numel() // 2]
    torch.testing.assert_close(layers[1].weight, layer.weight * (layer.weight.abs() > limit))


def test_super_fast_counts_its_samples() -> None:
    layer, x = make("linear")
    batch = SparseGPTSuperFast(layer, 1)
    batch.add_batch(x, None)
    batch.inc_model_counter()
    with pytest.raises(IndexError, match="sample 1 of 1"):
        batch.add_batch(x, None)
    with pytest.raises(ValueError, match="each of 1 samples, got 2"):
        batch.fasterprune(0.5, [layer, layer])
    with pytest.raises(ValueError, match="weight shape"):
        batch.fasterprune(0.5, [nn.Linear(3, 2)])
    with pytest.raises(ValueError, match="model_num"):
        SparseGPTSuperFast(layer, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.fasterprune(1.1), ValueError, "between 0 and 1, got 1.1"),
        (lambda s: s.fasterprune(0.5, blocksize=0), ValueError, "blocksize"),
        (lambda s: s.fasterprune(0.5, prunen=5, prunem=4), ValueError, "prunen=5, prunem=4"),
        (lambda s: s.fasterprune(0.5, prunem=4), ValueError, "prunen=0, prunem=4"),
        (lambda s: s.fasterprune(0.5, prunen=2, prunem=5), ValueError, "12 columns.*got 5"),
        (lambda s: s.fasterprune(0.5, prunen=2, prunem=4, blocksize=6), ValueError, "blocksize=6, got 4"),
        (lambda s: s.add_batch(torch.ones(3, 11), None), ValueError, r"got \(3, 11\)"),
        (lambda s: s.add_batch(torch.ones(0, 3, 12), None), ValueError, r"got \(0, 3, 12\)"),
        (lambda s: s.add_batch(torch.full((3, 12), float("inf")), None), ValueError, "infinite"),
        (lambda s: s.add_batch(None, None), TypeError, "NoneType"),
        (lambda s: (s.free(), s.fasterprune(0.5)), RuntimeError, "free"),
        (lambda s: (s.free(), s.add_batch(torch.ones(3, 12), None)), RuntimeError, "free"),
    ],
)
def test_errors(call: Callable[[SparseGPT], object], error: type[Exception], message: str) -> None:
    layer, x = make("linear")
    solver = collected(layer, x)
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=message):
        call(solver)
    assert torch.equal(layer.weight, before) and solver.nsamples == 2


def test_nothing_collected() -> None:
    with pytest.raises(RuntimeError, match="add_batch"):
        SparseGPT(nn.Linear(3, 2)).fasterprune(0.5)
