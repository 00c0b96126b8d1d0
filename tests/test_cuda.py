"""What only a GPU can show: ops that never wait, captured graphs, streams, whole traces and explanations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import random_problem
from torch import Tensor, nn
from torch.utils import _pytree

import spade_fast
from spade_fast import ops
from spade_fast.cli import doctor
from spade_fast.compat import TrueOBS
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.solve import count_zeros, solve_layer

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def _to(device: str, values: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


def _calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    weight, hessian, hinv = random_problem(2, 70, 180)
    order = torch.rand(2, 70, 180).argsort(2).int()
    counts = torch.randint(0, 181, (3, 2, 70))
    removals = torch.full((2, 20), 300)
    factor = torch.linalg.cholesky(hinv, upper=True)
    conv = (torch.zeros(2, 1, 360, 360), torch.randn(4, 40, 9, 8), (3, 3), (1, 1), (1, 1))
    depthwise = (torch.zeros(2, 40, 9, 9), torch.randn(4, 40, 9, 8), (3, 3), (2, 2), (1, 1))
    return {
        "gram_linear_": (ops.gram_linear_, (torch.zeros(2, 180, 180), torch.randn(2, 500, 180))),
        "gram_conv2d_": (ops.gram_conv2d_, conv),
        "gram_conv2d_, depthwise": (ops.gram_conv2d_, depthwise),
        "mirror_upper_": (ops.mirror_upper_, (torch.randn(2, 3, 77, 77),)),
        "obs_path": (ops.obs_path, (weight, hinv)),
        "obs_path, blocks": (ops.obs_path, (weight, hinv, 9)),
        "nm_path": (ops.nm_path, (weight, hinv, 2, 4)),
        "obs_solution": (ops.obs_solution, (weight, hessian, hinv, order, counts)),
        "sparsegpt": (ops.sparsegpt, (weight, factor, removals, 9)),
        "inverse_cholesky": (ops.inverse_cholesky, (hessian, torch.tensor([0.0, 0.1]))),
        "inverse_cholesky, many": (ops.inverse_cholesky, (random_problem(9, 1, 600)[1], 0.1)),
    }


NAMES = list(_calls())


@contextmanager
def waiting(is_: str) -> Iterator[None]:
    """Let torch treat a wait for the GPU as "error", or "warn" of it."""
    torch.cuda.set_sync_debug_mode(is_)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_ops_stay_on_the_gpu_and_never_wait(name: str) -> None:
    op, arguments = _calls()[name]
    moved = _to(DEVICE, arguments)
    with waiting("error"):
        results = op(*moved)
    expected = op(*arguments)
    for mine, truth in zip(_pytree.tree_leaves(results), _pytree.tree_leaves(expected), strict=True):
        assert mine.device.type == DEVICE and mine.dtype == truth.dtype and mine.shape == truth.shape
        if truth.is_floating_point():
            error = (mine.cpu() - truth).abs()
            error = error.triu() if name.startswith("gram") else error
            flipped = 0.01 if name == "sparsegpt" else 0  # a mask may differ where scores are nearly tied
            assert (error > 1e-3 * truth.abs().max()).double().mean() <= flipped


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("inverse_cholesky")])
def test_ops_can_be_captured(name: str) -> None:
    op, arguments = _calls()[name]
    moved = _to(DEVICE, arguments)
    eager = _to("cpu", op(*_to(DEVICE, arguments)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*_to(DEVICE, arguments))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*moved)
    graph.replay()
    pairs = zip(_pytree.tree_leaves(_to("cpu", captured)), _pytree.tree_leaves(eager), strict=True)
    assert all(torch.equal(mine, truth) for mine, truth in pairs)


def test_tensors_of_different_devices_are_an_error() -> None:
    weight, _, hinv = random_problem(1, 2, 8)
    with pytest.raises(ValueError, match="obs_path: hinv must be on the device of weight"):
        torch.ops.spade_fast.obs_path(weight.to(DEVICE), hinv, 1)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_a_layer_is_looked_at_once(solver: str) -> None:
    layer = find_layers(nn.Conv2d(8, 16, 3))[0][0]
    x = torch.randn(2, 1, 300, 72, device=DEVICE)
    weight = torch.randn(1, 16, 72, device=DEVICE)
    arguments = dict(solver=solver, sparsity=0.5, zeros=count_zeros(weight))
    solve_layer(layer, weight, x.mT @ x, **arguments)
    with waiting("warn"), warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        pruned, _ = solve_layer(layer, weight, x.mT @ x, **arguments)
    assert pruned.device.type == DEVICE and (pruned == 0).sum().item() == 2 * 576
    assert len(waits) == 1, [str(wait.message) for wait in waits]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_trace_is_that_of_the_cpu(solver: str, precision: str) -> None:
    network, images = _network(), torch.randn(32, 3, 20, 20)
    expected = spade_fast.trace(network, images, sparsity=0.5, solver=solver, precision=precision)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.to(DEVICE)
    found = spade_fast.trace(network, images.to(DEVICE), sparsity=0.5, solver=solver, precision=precision)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in network.state_dict().items())
    for mine, truth in zip(found.reports, expected.reports, strict=True):
        assert mine.removed == truth.removed
        assert abs(mine.measured_error - truth.measured_error) <= 0.02 * truth.measured_error + 1e-4
    with found.applied(network):
        assert network(images.to(DEVICE)).isfinite().all()


def test_drop_in_solver_on_the_gpu() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(40, 12), torch.randn(200, 40)
    expected = TrueOBS(layer)
    expected.add_batch(inputs, None)
    expected.prepare_unstr()
    layer_on_gpu = nn.Linear(40, 12).to(DEVICE)
    layer_on_gpu.load_state_dict(layer.state_dict())
    found = TrueOBS(layer_on_gpu)
    found.add_batch(inputs.to(DEVICE), None)
    found.prepare_unstr()
    for mine, truth in zip(found.prune_unstr([0.5, 0.9]), expected.prune_unstr([0.5, 0.9]), strict=True):
        torch.testing.assert_close(mine.cpu(), truth, rtol=0, atol=1e-3)


def test_explain_on_the_gpu(small: str, photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    explain = pytest.importorskip("explaining").explain
    options = {"sparsity": 0.3, "augmentations": 8, "device": DEVICE, "methods": ("saliency",)}
    assert explain(photo, small, tmp_path / "out", **options).report["settings"]["device"] == DEVICE


def test_doctor() -> None:
    assert all(check.passed for check in doctor.check_ops(DEVICE))
