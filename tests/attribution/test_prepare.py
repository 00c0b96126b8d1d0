"""What `prepare_for_attribution` returns: the same network, on which methods with hooks are right."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

pytest.importorskip("captum.attr")

from captum.attr import (
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    GuidedBackprop,
    GuidedGradCam,
    LayerDeepLift,
    LayerGradCam,
    NeuronGuidedBackprop,
    Saliency,
)

from spade_fast.attribution import Spade, prepare_for_attribution
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.pruning.tracing import trace
from tests.networks import Small

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor", "ignore:Setting (backward|forward)")


# What the copy is


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def masked(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.2)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def test_the_copy_keeps_outputs_and_shares_weights(model: nn.Module, images: Tensor) -> None:
    prepared = prepare_for_attribution(model)
    assert torch.equal(prepared(images), model(images))
    assert torch.equal(prepared(images, torch.tensor(2.0)), model(images, torch.tensor(2.0)))
    assert type(prepared) is Small and str(prepared) == str(model)
    assert inspect.signature(prepared.forward) == inspect.signature(model.forward)
    assert list(prepared.state_dict()) == list(model.state_dict())
    assert [name for name, _ in prepared.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(a is b for a, b in zip(prepared.parameters(), model.parameters(), strict=True))
    assert not any(one in set(model.modules()) for one in prepared.modules())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), prepare_for_attribution])
def test_a_copy_of_the_copy_is_prepared_too(again: Callable[..., nn.Module], model: nn.Module, images: Tensor) -> None:
    prepared = prepare_for_attribution(model)
    other = again(prepared)
    with torch.no_grad():
        other.head.weight.add_(torch.rand_like(other.head.weight))
    expected = prepare_for_attribution(copy.deepcopy(model))
    with torch.no_grad():
        expected.head.weight.copy_(other.head.weight)
    found = GuidedBackprop(other).attribute(images, target=2)
    assert torch.equal(found, GuidedBackprop(expected).attribute(images, target=2))


def test_what_a_network_does_in_place_it_does_in_the_copy(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = self.act(x)
            return (x + y).mean((2, 3))

    model = Twice()
    prepared = prepare_for_attribution(model)
    assert torch.equal(prepared(images), model(images))
    expected = GuidedBackprop(nn.Sequential(model.conv, nn.ReLU())).attribute
    found = GuidedBackprop(prepared).attribute(images, target=1)
    maps = sum(2 * expected(images, target=(1, i, j)) / 100 for i in range(10) for j in range(10))
    assert torch.allclose(found, maps, atol=1e-6)


def test_a_network_that_begins_in_place(images: Tensor) -> None:
    prepared = prepare_for_attribution(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 12), nn.Flatten()))
    before = (images - 0.5).clone()
    given = before.clone()
    for method in (Saliency, GuidedBackprop, DeepLift):
        assert method(prepared).attribute(given, target=1).shape == images.shape
    assert torch.equal(given, before)


def test_an_activation_registered_in_several_places() -> None:
    act = nn.ReLU(inplace=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    explicit = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU())
    x = torch.randn(3, 4)
    prepared = prepare_for_attribution(model)
    for method in (GuidedBackprop, DeepLift):
        assert torch.equal(method(prepared).attribute(x, target=1), method(explicit).attribute(x, target=1))


def test_branches_of_one_activation_do_not_mix() -> None:
    """The gradients of two calls that are open at the same time."""

    class Parallel(nn.Module):
        def __init__(self, one: nn.Module, other: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), one, other

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.one(a) - 3 * self.other(b)

    act = nn.ReLU()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for method in (GuidedBackprop, Deconvolution, DeepLift):
        found = method(prepare_for_attribution(Parallel(act, act))).attribute(x, target=1)
        assert torch.equal(found, method(Parallel(nn.ReLU(), nn.ReLU())).attribute(x, target=1))


def test_other_paths_of_the_forward_pass(images: Tensor) -> None:
    """The paths are not those of the example."""

    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3 if x.sum() > 0 else 2):
                x = F.relu(self.linear(x))
            return x

    torch.manual_seed(0)
    model = Depth()
    prepared = prepare_for_attribution(model, -torch.ones(2, 4))
    for sign, depth in ((1, 3), (-1, 2)):
        x = sign * torch.rand(2, 4)
        explicit = nn.Sequential(*(nn.Sequential(model.linear, nn.ReLU()) for _ in range(depth)))
        found = GuidedBackprop(prepared).attribute(x, target=1)
        assert torch.equal(found, GuidedBackprop(explicit).attribute(x, target=1))


def test_parts_and_wrappers_of_the_copy(model: nn.Module, images: Tensor) -> None:
    class Wrapper(nn.Module):
        """Calls the parts of a network, not the network."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            x = net.act(net.conv2(net.act(net.conv1(x))))
            return net.head(x.mean((2, 3)))

    explicit = nn.Sequential(
        *(model.conv1, nn.ReLU6(), model.conv2, nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head),
    )
    expected = GuidedBackprop(prepare_for_attribution(explicit)).attribute(images, target=2)
    prepared = prepare_for_attribution(model)
    assert torch.allclose(GuidedBackprop(Wrapper(prepared)).attribute(images, target=2), expected, atol=1e-7)
    within = prepare_for_attribution(nn.Sequential(explicit, nn.Softmax(1)))
    part = GuidedBackprop(within[0]).attribute(images, target=2)
    assert torch.equal(part, expected)
    around = nn.Sequential(prepared, nn.Linear(5, 2))
    _, found = DeepLift(around).attribute(images, target=1, return_convergence_delta=True)
    assert found.abs().max() < 1e-6


def test_layer_and_neuron_methods(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    prepared = prepare_for_attribution(model)
    found, expected = (LayerDeepLift(net, net[1]).attribute(images, target=2) for net in (prepared, model))
    assert torch.equal(found, expected)
    found = LayerDeepLift(prepared, prepared[1]).attribute(images, target=2, attribute_to_layer_input=True)
    assert torch.allclose(found.sum((1, 2, 3)), (model(images) - model(0 * images))[:, 2], atol=1e-6)
    frozen = prepare_for_attribution(copy.deepcopy(model).requires_grad_(False))
    assert torch.equal(LayerDeepLift(frozen, frozen[1]).attribute(images, target=2), expected)
    found, expected = (NeuronGuidedBackprop(net, net[2]).attribute(images, (1, 2, 3)) for net in (prepared, model))
    assert torch.equal(found, expected)
    found, expected = (
        DeepLiftShap(net).attribute(images, torch.zeros(2, 3, 12, 12), target=1) for net in (prepared, model)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change", ["y.add_(1)", "y += 1", "F.silu(y, inplace=True)", "y[:, :2] = 0", "y.relu_()"])
def test_captum_reads_layers_that_are_changed_in_place(change: str, images: Tensor) -> None:
    class Changed(nn.Module):
        def __init__(self, copies: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head, self.copies = nn.Conv2d(3, 4, 3), nn.Linear(400, 3), copies

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            names = {"y": y.clone() if self.copies else y, "F": F}
            exec(change, names)
            return self.head(names["y"].relu().flatten(1))

    changed, right = (prepare_for_attribution(Changed(copies)) for copies in (False, True))
    for make in (LayerGradCam, GuidedGradCam):
        found = make(changed, changed.conv).attribute(images, target=1)
        assert torch.equal(found, make(right, right.conv).attribute(images, target=1))


@pytest.mark.parametrize(
    "norm", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_are_computed_in_each_pass(norm: Any, images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(400, 5)))
    model(images)
    model.eval()
    model(images)  # leaves computed weights behind
    before = copy.copy(vars(model[0]))
    prepared = prepare_for_attribution(model)
    assert torch.equal(prepared(images), model(images))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(prepared(images), model(images))
    for tensors in ("parameters", "buffers"):
        pairs = zip(getattr(prepared, tensors)(), getattr(model, tensors)(), strict=True)
        assert all(one is other for one, other in pairs)
    _, found = DeepLift(prepared).attribute(images, target=1, return_convergence_delta=True)
    assert found.abs().max() < 1e-6
    explicit = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    for index in (0, 3):
        explicit[index].weight.data = model[index].weight.detach().clone()
        explicit[index].bias.data = model[index].bias.detach().clone()
    expected = GuidedBackprop(explicit).attribute(images, target=1)
    assert torch.allclose(GuidedBackprop(prepared).attribute(images, target=1), expected, atol=1e-6)
    assert list(before) == list(vars(model[0]))


def test_traces_inside_and_outside_of_spade(model: nn.Module, images: Tensor) -> None:
    settings = {"sparsity": 0.5, "solver": "sparsegpt"}
    prepared = prepare_for_attribution(model)
    spade = Spade(GuidedBackprop(prepared), ImageAugmenter(n=4, seed=1), **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = spade.attribute(images[:1], target=2)
    made = trace(prepared, ImageAugmenter(n=4, seed=1)(images[0], "0"), sample_id="0", seed=1, **settings)
    with made.applied(prepared):
        expected = GuidedBackprop(prepared).attribute(images[:1], target=2)
        plain = Saliency(prepared).attribute(images[:1], target=2, abs=False)
    assert torch.equal(found, expected) and not torch.allclose(found, plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm, masked])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is", "ignore::spade_fast.DecisionWarning")
def test_computed_weights_are_pruned_in_the_copy_too(norm: Any, images: Tensor) -> None:
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5)).eval()
    model(images)
    prepared = prepare_for_attribution(model)
    augmenter = ImageAugmenter(n=4, seed=1)
    settings = {"sparsity": 0.5, "solver": "sparsegpt"}
    dense = GuidedBackprop(prepared).attribute(images[:1], target=2)
    for network, traced in ((prepared, prepared), (prepared, model), (model, prepared)):
        spade = Spade(GuidedBackprop(network), augmenter, model=traced, **settings)
        found = spade.attribute(images[:1], target=2)
        with trace(model, augmenter(images[0], "0"), seed=1, **settings).applied(model):
            pruned = model(images)
            assert torch.equal(prepared(images), pruned)
            assert torch.equal(GuidedBackprop(prepared).attribute(images[:1], target=2), found)
        assert not torch.allclose(found, dense) and not torch.allclose(model(images), pruned)
        assert torch.equal(GuidedBackprop(network).attribute(images[:1], target=2), dense)
    tensors = [*model.parameters(), *(one for one in vars(model[0]).values() if isinstance(one, Tensor))]
    twin = copy.deepcopy(model, {id(one): one for one in tensors})
    with pytest.raises(ValueError, match=r"each compute 0\.weight from the same parameters"):
        Spade(Saliency(twin), augmenter, model=model, **settings)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "densenet121", "vit"])
def test_torchvision_networks(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "vit":
        model = models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
        nn.init.normal_(model.heads.head.weight)
    else:
        model = getattr(models, name)(weights=None)
    prepared = prepare_for_attribution(model.eval())
    x = torch.rand(1, 3, 32, 32) * 4
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))  # through fused attention too
        change = float((model(x) - model(0 * x))[0, 3])
    if name == "vit":
        with pytest.raises(ValueError, match=r"layer_norm, called at .*vision_transformer.py:\d+"):
            DeepLift(prepared).attribute(x, target=3)
        return
    assert GuidedBackprop(prepared).attribute(x, target=3).isfinite().all()
    found = DeepLift(prepared).attribute(x, target=3).detach()
    assert abs(float(found.sum()) - change) < 1e-4 * abs(change) + 1e-9


# Arguments


def test_the_trial_on_example_inputs() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    class Custom(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(F.relu(super().forward(x)))

    with pytest.warns(UserWarning, match="refuse Custom: the custom autograd function Doubled"):
        prepare_for_attribution(Custom(4, 2), torch.rand(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).train()
        prepared = prepare_for_attribution(model, (torch.rand(1, 4),))
    assert prepared.training and all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_other_than_modules() -> None:
    with pytest.raises(TypeError, match="Module"):
        prepare_for_attribution(lambda x: x)
    scripted = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.ReLU()))
    with pytest.raises(TypeError, match="1 is a TorchScript module"):
        prepare_for_attribution(scripted)
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Linear cannot be copied \(TypeError: cannot pickle '_thread.lock' object\)"):
        prepare_for_attribution(model)
