"""Every call of an activation has the rule of guided backpropagation and DeepLIFT, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("captum.attr")

from captum.attr import (
    Deconvolution,
    DeepLift,
    GuidedBackprop,
    Saliency,
)

from spade_fast.attribution import prepare_for_attribution

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor", "ignore:Setting (backward|forward)")

Function = Callable[[Tensor], Tensor]


class Branches(nn.Module):
    """Calls a function twice, in a forward pass that depends on the data."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.conv1(x))
        if x.sum() > 1e9:
            return x
        x = self.function(self.conv2(x) + x)
        return self.head(x.mean((2, 3)))


class Modules(nn.Module):
    """The same network with a module for each activation."""

    def __init__(self, like: Branches, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = like.conv1, like.conv2, like.head
        self.first, self.second = activation(), activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv1(x))
        return self.head(self.second(self.conv2(x) + x).mean((2, 3)))


def branches(function: Function) -> Branches:
    torch.manual_seed(0)
    return Branches(function).eval().double()


IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BLACK = torch.full_like(IMAGES, -0.3)


def delta(model: nn.Module) -> float:
    """The largest convergence delta, as a share of the outputs' changes."""
    _, found = DeepLift(model).attribute(IMAGES, BLACK, target=1, return_convergence_delta=True)
    with torch.no_grad():
        return float((found / (model(IMAGES) - model(BLACK))[:, 1]).abs().max())


def statement(code: str) -> Function:
    """A function that changes x by a statement."""

    def run(x: Tensor) -> Tensor:
        names = {"x": x, "F": F, "torch": torch}
        exec(code, names)
        return names["x"]

    return run


RELUS: dict[str, Function] = {
    "F.relu": F.relu,
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "relu_, result not used": statement("x.relu_()"),
    "made in the forward pass": lambda x: nn.ReLU()(x),
    "one module, in place": nn.ReLU(inplace=True),
    "clamp": lambda x: x.clamp(min=0),
    "clamp, positional": lambda x: torch.clamp(x, 0.0),
    "clamp, tensor": lambda x: x.clamp(min=torch.zeros((), dtype=x.dtype)),
    "clamp_, result not used": statement("x.clamp_(min=0)"),
    "clip": lambda x: torch.clip(x, 0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "nn.Threshold": nn.Threshold(0, 0, inplace=True),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "maximum of zero": lambda x: torch.maximum(torch.tensor(0.0), x),
    "max": lambda x: x.max(torch.tensor(0.0)),
    "hardtanh": lambda x: F.hardtanh(x, 0, 1e9),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where, method": lambda x: x.where(x > 0, 0.0),
    "where, method, the other way": lambda x: torch.zeros(()).to(x).where(x < 0, x),
    "where, keywords": lambda x: torch.where(input=x, condition=x > 0, other=torch.zeros(()).to(x)),
    "where, the other way": lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "index": statement("x[x < 0] = 0"),
    "mask": lambda x: x * (x > 0),
    "mask, in place": statement("x *= x > 0"),
    "leaky_relu without a slope": lambda x: F.leaky_relu(x, 0.0),
    "aten": lambda x: torch.ops.aten.relu(x),
}


@pytest.mark.parametrize("name", RELUS)
def test_every_relu_is_one(name: str) -> None:
    model = branches(RELUS[name])
    prepared, explicit = prepare_for_attribution(model), Modules(model, nn.ReLU)
    assert torch.equal(prepared(IMAGES), model(IMAGES))
    for method in (GuidedBackprop, Deconvolution):
        found = method(prepared).attribute(IMAGES, target=1)
        assert torch.equal(found, method(explicit).attribute(IMAGES, target=1))
        assert not torch.allclose(found, Saliency(explicit).attribute(IMAGES, target=1, abs=False))
    expected = DeepLift(explicit).attribute(IMAGES, BLACK, target=1)
    assert torch.allclose(DeepLift(prepared).attribute(IMAGES, BLACK, target=1), expected, rtol=1e-9)
    assert delta(prepared) < 1e-9


@pytest.mark.parametrize(
    "function",
    [F.relu6, lambda x: x.clamp(0, 0.3), lambda x: F.hardtanh(x, 0, 0.3), nn.ReLU6(inplace=True), nn.Hardtanh(0, 0.3)],
)
def test_relu_up_to_a_bound_counts_as_relu(function: Function) -> None:
    """By hand: each gradient is clipped where it is, before the activation."""
    model = branches(function)
    x = IMAGES.clone().requires_grad_()
    first = model.conv1(x)
    first.register_hook(F.relu)
    hidden = function(first.clone())
    second = model.conv2(hidden) + hidden
    second.register_hook(F.relu)
    output = model.head(function(second.clone()).mean((2, 3)))
    (expected,) = torch.autograd.grad(output[:, 1].sum(), x)
    prepared = prepare_for_attribution(model)
    assert torch.allclose(GuidedBackprop(prepared).attribute(IMAGES, target=1), expected, rtol=1e-9)
    assert delta(prepared) < 1e-9


CAPTUM_KNOWS: dict[str, tuple[Function, Callable[[], nn.Module]]] = {
    "leaky_relu": (F.leaky_relu, nn.LeakyReLU),
    "elu": (F.elu, nn.ELU),
    "softplus": (F.softplus, nn.Softplus),
    "tanh": (torch.tanh, nn.Tanh),
    "tanh_": (statement("x.tanh_()"), nn.Tanh),
    "sigmoid": (lambda x: x.sigmoid(), nn.Sigmoid),
    "expit": (torch.special.expit, nn.Sigmoid),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2).repeat(1, 1, 2, 2), lambda: nn.Sequential(nn.MaxPool2d(2), Repeat())),
}


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, 2, 2)


@pytest.mark.parametrize("name", CAPTUM_KNOWS)
def test_deep_lift_has_captums_rule_for_functions(name: str) -> None:
    function, module = CAPTUM_KNOWS[name]
    model = branches(function)
    prepared, explicit = prepare_for_attribution(model), Modules(model, module)
    found = DeepLift(prepared).attribute(IMAGES, BLACK, target=1)
    assert torch.allclose(found, DeepLift(explicit).attribute(IMAGES, BLACK, target=1), rtol=1e-8)
    assert delta(prepared) < 1e-9


OTHERS: dict[str, Function] = {
    "gelu": F.gelu,
    "gelu, tanh": nn.GELU("tanh"),
    "silu_": lambda x: F.silu(x, inplace=True),
    "mish": F.mish,
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(9 * x),
    "hardtanh": F.hardtanh,
    "selu": F.selu,
    "celu": F.celu,
    "prelu": nn.PReLU(),
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "clamp": lambda x: x.clamp(-0.2, 0.3),
    "minimum": lambda x: torch.minimum(x, torch.tensor(0.1)),
    "square": lambda x: x**2,
    "abs": abs,
    "logistic by hand": lambda x: 1 / (1 + torch.exp(-x)),
    "swish by hand": lambda x: x * torch.sigmoid(x),
    "swish by hand, in place": statement("x *= torch.sigmoid(x)"),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "lgamma": lambda x: torch.lgamma(x.abs() + 1),
    "frac": lambda x: (5 * x).frac(),
    "Bessel function": torch.special.i0e,
    "copysign": lambda x: x.copysign(torch.ones(()).to(x)),
    "arctan": lambda x: torch.arctan(3 * x),
    "filter in the frequency domain": lambda x: F.relu(torch.fft.irfft2(torch.fft.rfft2(x) * (1 + 1j), x.shape[2:])),
    "index of the samples": lambda x: F.relu(x)[torch.arange(len(x)), :],
    "index of as many channels as samples": lambda x: F.relu(x) + F.relu(x)[:, torch.tensor([3, 1])].mean(1, True),
    "index_select": lambda x: F.relu(x).index_select(1, torch.tensor([3, 1, 5, 5, 2, 0])),
    "gather": lambda x: F.relu(x).gather(1, torch.arange(6).flip(0).view(1, 6, 1, 1).expand(x.shape)),
    "index of the channels": lambda x: F.relu(x)[:, torch.tensor([3, 1, 5, 5, 2, 0])],
    "shapes": lambda x: torch.stack([*F.relu(x).permute(2, 0, 1, 3).flip(0)]).movedim(0, 2).contiguous().to(x.dtype),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax, method": lambda x: x.softmax(dim=-1).cumsum(-1),
    "max_pool2d, windows that overlap": lambda x: F.max_pool2d(x, 3, 1, 1),
    "nn.MaxPool2d": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 1, 1).view_as(x),
}


@pytest.mark.parametrize("name", OTHERS)
def test_deep_lift_is_complete_for(name: str) -> None:
    model = branches(OTHERS[name]).double()
    if name == "nn.MaxPool2d":
        model = nn.Sequential(model.conv1, OTHERS[name], nn.Conv2d(6, 4, 3), nn.Flatten()).double()
    prepared = prepare_for_attribution(model)
    assert torch.equal(prepared(IMAGES), model(IMAGES)) and delta(prepared) < 1e-8
    together = DeepLift(prepared).attribute(IMAGES, BLACK, target=1)
    alone = DeepLift(prepared).attribute(IMAGES[1:], BLACK[1:], target=1)
    assert torch.allclose(together[1:], alone, rtol=1e-8), "samples have nothing to do with each other"
    with torch.no_grad():
        assert not torch.allclose(together, (IMAGES - BLACK) * plain_gradient(model), rtol=1e-3)


def plain_gradient(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        return Saliency(model).attribute(IMAGES.clone(), target=1, abs=False)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (normalised, "layer_norm, called at .*test_stand_ins.py:"),
        (lambda x: F.adaptive_max_pool2d(x, x.shape[2:]), "adaptive_max_pool2d, called at .*test_stand_ins.py:"),
        (lambda x: x + x.amax((2, 3), keepdim=True), "amax"),
        (lambda x: torch.maximum(x, x.flip(1)), "maximum"),
        (lambda x: x - x.max(), "max,"),
        (lambda x: x / (1 + x.abs()), "div"),
        (lambda x: torch.matmul(x, x.mT), "matmul"),
        (lambda x: F.glu(torch.cat([x, x], 1), 1), "glu"),
        (lambda x: x * (x > 0.2), "mul"),
        (lambda x: torch.where(x > 0.2, x, x.square()), "where"),
        (lambda x: torch.where(x > 0.2, x, 0.5), "where"),
        (lambda x: F.max_pool2d(x, 1, return_indices=True)[0], "max_pool2d"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm"),
        (lambda x: x * torch.linalg.norm(x, dim=1, keepdim=True), "linalg_norm, called at .*test_stand_ins.py:"),
        (lambda x: torch.fft.rfft2(x, x.shape[2:]).abs().sum((2, 3), keepdim=True) + x, "abs, called"),
        (lambda x: torch.polar(x.abs(), x).real, "polar"),
        (lambda x: torch.linalg.inv(x + 9 * torch.eye(6).to(x)), "linalg_inv"),
        (lambda x: torch.cross(x[:, :3], x[:, 3:], dim=1).repeat(1, 2, 1, 1), "cross"),
        (lambda x: x.gather(1, x.argsort(1)), "gather"),
        (lambda x: torch.take_along_dim(x, x.argmax(1, keepdim=True), 1) + x, "take_along_dim"),
        (lambda x: x + x[torch.arange(len(x)), x.mean((2, 3)).argmax(1)][:, None], "getitem"),
        (lambda x: x + x.index_select(0, torch.tensor([1, 0]).repeat(len(x) // 2)), "index_select"),
        (lambda x: x + 0 * x[x > 0.3].sum(), "getitem"),
        (nn.GroupNorm(2, 6), "group_norm, called at .*test_stand_ins.py:"),
        (Cube.apply, "the custom autograd function Cube cannot"),
        (lambda x: F.relu(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1), "batch as first dimension, got .* in relu"),
    ],
)
def test_deep_lift_names_what_it_has_no_rule_for(function: Any, name: str) -> None:
    prepared = prepare_for_attribution(branches(function))
    with pytest.raises(ValueError, match=name):
        DeepLift(prepared).attribute(IMAGES[:, :, :5] if "batch as" in name else IMAGES, target=1)
    assert torch.equal(prepared(IMAGES), prepared(IMAGES)), "hooks are gone"


@pytest.mark.parametrize("function", [F.gelu, torch.tanh, Cube.apply, lambda x: x])
def test_guided_backprop_needs_a_relu_that_it_sees(function: Function) -> None:
    prepared = prepare_for_attribution(branches(function))
    with pytest.raises(ValueError, match=r"calls no ReLU|Cube"):
        GuidedBackprop(prepared).attribute(IMAGES, target=1)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x)


@pytest.mark.parametrize("function", [scripted, torch.vmap(F.relu)])
def test_functions_out_of_sight_are_refused(function: Function) -> None:
    prepared = prepare_for_attribution(branches(lambda x: function(F.relu(x - 0.1) - 0.1) * 2 + 1))
    for method in (GuidedBackprop, DeepLift):
        with pytest.raises(ValueError, match=r"function Relu, scripted or in torch.vmap, cannot be given another"):
            method(prepared).attribute(IMAGES, target=1)
    linear = prepare_for_attribution(branches(lambda x: F.relu(torch.vmap(lambda one: 2 * one)(x))))
    assert delta(linear) < 1e-9
    gelu = prepare_for_attribution(branches(lambda x: torch.vmap(F.gelu)(F.relu(x))))
    assert GuidedBackprop(gelu).attribute(IMAGES, target=1).shape == IMAGES.shape
    with pytest.raises(ValueError, match="function Gelu"):
        DeepLift(gelu).attribute(IMAGES, target=1)


def test_guided_backprop_leaves_other_activations_their_gradient() -> None:
    model = branches(lambda x: torch.tanh(F.relu(F.leaky_relu(x))))
    module = Modules(model, lambda: nn.Sequential(nn.LeakyReLU(), nn.ReLU(), nn.Tanh()))
    found = GuidedBackprop(prepare_for_attribution(model)).attribute(IMAGES, target=1)
    assert torch.equal(found, GuidedBackprop(module).attribute(IMAGES, target=1))


def test_functions_of_weights_are_not_activations() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            weight = F.normalize(Cube.apply(self.conv.weight), dim=1) * self.conv.weight.std()
            x = F.conv2d(x, weight.relu(), self.conv.bias) * torch.sigmoid(self.gate)
            return F.relu(x).mean((2, 3))

    torch.manual_seed(0)
    assert delta(prepare_for_attribution(Gated().double())) < 1e-9
