"""Whole traces: FastSPADE of ResNet-50 against the published pipeline, SPADE of EfficientNet-Lite0."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import published
import textbook
import torch
from checks import layer_error
from device import DEVICE, ON_CUDA
from measuring import OURS, PUBLISHED, TEXTBOOK, Case, best, by_implementation
from PIL import Image
from torch import Tensor, nn

import spade_fast
from spade_fast.inputs.networks import demo_photo, load_model
from spade_fast.ops import reference
from spade_fast.pruning.calibration import Calibration, calibrate
from spade_fast.pruning.counts import removal_counts
from spade_fast.pruning.layers import find_layers

_SPARSITY, _DAMPING = 0.9, 0.01
_BATCH = 64
_CHECKED = "layer2.0.conv1"  # a 1x1 convolution small enough for the oracle
_INNER_GOAL = 6

FAST = [
    Case(
        "FastSPADE trace",
        "ResNet-50, 64 images",
        64,
        ratio_goal=3,
        slow=(TEXTBOOK, PUBLISHED),
    )
]
EXACT = [
    Case("SPADE trace", "EfficientNet-Lite0, 64 images", 64, only=(OURS,)),
    Case("SPADE trace", "EfficientNet-Lite0, 1024 images", 1024, only=(OURS,), slow=(OURS,)),
]
_SECONDS_GOAL = {1024: 120}
BF16 = [Case("bf16 calibration", "ResNet-50, 64 images", 64, only=(OURS,))]
_BF16_GOAL = 1.8


def _layers(model: nn.Module) -> list[str]:
    """All linear and convolutional layers but the first."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][1:]


def _published_solver() -> tuple[Callable[[nn.Module], Any], Callable[[Any, float, int], object]]:
    solver_class = published.classes().SparseGPTSuperFast

    def prune(solver: Any, sparsity: float, block: int) -> None:
        solver.fasterprune(sparsity, [solver.layer], blocksize=block, percdamp=_DAMPING)

    return lambda layer: solver_class(layer, 1), prune


def _textbook_solver() -> tuple[Callable[[nn.Module], Any], Callable[[Any, float, int], object]]:
    return textbook.SparseGPT, lambda solver, sparsity, block: solver.fasterprune(sparsity, block)


def _input_hessian(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """Gram matrix of the inputs of a 1x1 convolution or linear layer, in float64."""
    hessian: Any = 0.0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal hessian
        x = inputs[0].double().movedim(1, -1).flatten(0, -2)
        hessian = hessian + x.t() @ x

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for part in images.split(_BATCH):
            model(part)
    handle.remove()
    return hessian


def _oracle(weight: Tensor, hessian: Tensor) -> Tensor:
    """SparseGPT in float64 as `trace` calls it: exactly the requested share, damped by the mean over live columns."""
    rows, columns = weight.shape
    counts = removal_counts(
        round(_SPARSITY * weight.numel()), torch.full((columns,), rows), torch.zeros(columns).long()
    )
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    scale = diagonal.sum() / (~dead).sum()
    damped = hessian + torch.diag(torch.where(dead, scale, 0) + _DAMPING * scale)
    factor, _ = reference.inverse_cholesky(damped[None])
    return reference.sparsegpt(weight[None], factor, counts[None], 1)[0][0]


@by_implementation(FAST)
def test_fast_trace(case: Case, implementation: str, report: Callable[..., None]) -> None:
    model = load_model("torchvision:resnet50:none").module.to(DEVICE)
    images = torch.randn(case.shape, 3, 224, 224).to(DEVICE)
    layers = _layers(model)
    inner: dict[str, float] = {}

    def ours() -> dict[str, Tensor]:
        trace = spade_fast.trace(model, images, sparsity=_SPARSITY, solver="sparsegpt", layers=layers)
        seconds = trace.header["seconds"]
        inner["seconds"] = seconds["gram"] + seconds["solve"]
        with trace.applied(model):
            return {name: model.get_submodule(name).weight.detach().clone() for name in layers}

    def other() -> dict[str, Tensor]:
        solver = _published_solver() if implementation == PUBLISHED else _textbook_solver()
        network = copy.deepcopy(model)
        weights, inner["seconds"] = textbook.prune_by_hooks(network, images, _BATCH, layers, _SPARSITY, *solver)
        return weights

    def check(weights: dict[str, Tensor]) -> None:
        for name in layers:
            # The published code removes one more weight of each mask block: one of 64 in the smallest.
            assert -0.001 < float((weights[name] == 0).double().mean()) - _SPARSITY < 0.02
        dense = model.get_submodule(_CHECKED).weight.detach().flatten(1).cpu()
        hessian = _input_hessian(model, images, _CHECKED).cpu()
        if implementation == OURS:
            expected = _oracle(dense, hessian)
        else:
            expected = textbook.sparsegpt(dense, hessian.float(), _SPARSITY, 1, _DAMPING)
        ratio = layer_error(dense, weights[_CHECKED].flatten(1), hessian) / layer_error(dense, expected, hessian)
        assert 0.98 < ratio < 1.02

    def facts() -> dict[str, Any]:
        if ON_CUDA:  # the seconds of a trace's stages are not synchronised with the GPU
            return {}
        return {"inner_seconds": inner["seconds"], "inner_goal": _INNER_GOAL}

    if implementation == OURS:
        report(case, implementation, ours, check, once=True, facts=facts)
    else:
        with published.running() if implementation == PUBLISHED else torch.no_grad():
            report(case, implementation, other, check, facts=facts)


@by_implementation(EXACT)
def test_exact_trace(case: Case, implementation: str, report: Callable[..., None]) -> None:
    network = load_model("demo")
    model, layers = network.module.to(DEVICE), _layers(network.module)
    image = network.preprocess(Image.open(demo_photo()))[0].to(DEVICE)
    augmenter = spade_fast.ImageAugmenter(n=case.shape, mean=network.mean, std=network.std, seed=0)

    def ours() -> Any:
        return spade_fast.trace(model, augmenter(image), sparsity=_SPARSITY, solver="exact", layers=layers)

    def check(trace: Any) -> None:
        assert len(trace.reports) == len(layers)
        for layer in trace.reports:
            assert abs(layer.reached - _SPARSITY) < 0.01
            # The error predicted by the solver's losses is the error of the weights on the calibration data.
            assert layer.measured_error <= layer.predicted_error * 1.01

    goal = _SECONDS_GOAL.get(case.shape)
    note = {"note_goal": f"under {goal} s"} if goal else {}
    report(case, implementation, ours, check, once=True, facts=lambda: note)


@by_implementation(BF16)
def test_bf16_calibration(case: Case, implementation: str, report: Callable[..., None]) -> None:
    model = load_model("torchvision:resnet50:none").module.to(DEVICE)
    images = torch.randn(case.shape, 3, 224, 224).to(DEVICE)
    layers, _ = find_layers(model)

    def run(precision: str) -> Calibration:
        return calibrate(model, images, layers, precision=precision)

    def check(calibration: Calibration) -> None:
        expected = run("float32").grams
        for name, gram in calibration.grams.items():
            assert float((gram - expected[name]).norm() / expected[name].norm()) < 0.02

    def facts() -> dict[str, Any]:
        pairs = [(best(lambda: run("float32"), 1), best(lambda: run("bf16"), 1)) for _ in range(3)]
        ratio = statistics.median(plain / low for plain, low in pairs)
        agreement = ", ".join(f"{solver} {_mask_agreement(solver):.1%}" for solver in ("exact", "sparsegpt"))
        note = f"demo network's masks agree with float32's: {agreement}; {ratio:.1f} times float32"
        return {"ratio_to_float32": ratio, "note": note, "note_goal": f"{_BF16_GOAL:g}"}

    report(case, implementation, lambda: run("bf16"), check, facts=facts)


def _mask_agreement(solver: str) -> float:
    """Share of the demo network's weights whose masks agree between calibration in bfloat16 and in float32."""
    network = load_model("demo")
    network.module.to(DEVICE)
    image = network.preprocess(Image.open(demo_photo()))[0].to(DEVICE)
    batches = list(spade_fast.ImageAugmenter(n=64, mean=network.mean, std=network.std, seed=0)(image))
    layers = _layers(network.module)
    masks = []
    for precision in ("float32", "bf16"):
        trace = spade_fast.trace(
            network.module, batches, sparsity=0.5, solver=solver, layers=layers, precision=precision
        )
        with trace.applied(network.module):
            masks.append(torch.cat([network.module.get_submodule(name).weight.flatten() == 0 for name in layers]))
    return float((masks[0] == masks[1]).double().mean())
