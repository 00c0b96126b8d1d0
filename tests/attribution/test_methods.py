"""Every saliency method on every kind of network, dense and inside Spade, as docs/methods.md says."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("captum")
models = pytest.importorskip("torchvision.models")

from captum.attr import LRP as CaptumLRP  # noqa: E402
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency  # noqa: E402
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule  # noqa: E402
from torch.nn.utils.fusion import fuse_conv_bn_eval  # noqa: E402

from spade_fast._util.errors import UserError  # noqa: E402
from spade_fast.attribution import methods  # noqa: E402
from spade_fast.attribution.cam import GradCam, LayerCam, last_feature_layer  # noqa: E402
from spade_fast.attribution.lime import Ridge, nearness, squares  # noqa: E402
from spade_fast.attribution.lrp import LRP  # noqa: E402
from spade_fast.attribution.maps import to_map  # noqa: E402
from spade_fast.attribution.methods import METHODS, Question, attribution_map, make_recipe, seeded  # noqa: E402
from spade_fast.attribution.prepare import prepare_for_attribution  # noqa: E402
from spade_fast.attribution.relevance_rules import run_with_rules  # noqa: E402
from spade_fast.attribution.smoothgrad import SmoothGrad  # noqa: E402
from spade_fast.attribution.spade import Spade  # noqa: E402
from spade_fast.inputs.augment import ImageAugmenter  # noqa: E402
from spade_fast.inputs.networks import load_model  # noqa: E402
from spade_fast.pruning.tracing import trace  # noqa: E402
from spade_fast.targets import class_score, neuron  # noqa: E402

HAS_DEMO = importlib.util.find_spec("efficientnet_lite_pytorch") is not None
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor", "ignore:Setting (backward|forward)")

DOCS = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def parse_table(heading: str) -> list[dict[str, str]]:
    """The table below a heading of docs/methods.md, a dictionary a row."""
    lines = DOCS.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


WORKS = {row.pop("method").strip("`"): row for row in parse_table("Which method works where")}
SMOOTHED = {row["method"].strip("`"): row["SmoothGrad"] for row in parse_table("SmoothGrad")}
UNPREPARED = {
    row["method"].strip("`"): row["without `prepare_for_attribution`"] for row in parse_table("What each method is")
}


# Networks


def plain_cnn() -> nn.Module:
    act = nn.ReLU(inplace=True)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), act, nn.MaxPool2d(2), nn.Conv2d(12, 12, 3, padding=1), act),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)),
    )


def vision_transformer() -> nn.Module:
    model = models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model


def efficientnet() -> nn.Module:
    if not HAS_DEMO:
        pytest.skip("packages of the extra 'demo' are not installed")
    return load_model("demo").module


# Of each network: how to make it, and a few layers to prune.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain CNN": (plain_cnn, "3"),
    "ResNet-18": (lambda: models.resnet18(weights=None), "layer2.0.*"),
    "EfficientNet-Lite0": (efficientnet, "_blocks.5.*"),
    "ViT": (vision_transformer, "encoder.*"),
}


@cache
def question(name: str, prepared: bool = True) -> Question:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        target = int(model(image).argmax())
    return Question(
        prepare_for_attribution(model, image) if prepared else model, image, target, torch.full((1, 3, 1, 1), -0.5)
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    for name, value in {"_IG_STEPS": 3, "_SHAP_SAMPLES": 3, "_LIME_SAMPLES": 12, "_OCCLUSION_PATCHES": 3}.items():
        monkeypatch.setattr(methods, name, value)


# Every method on every network


def test_the_tables_have_all_methods_and_networks():
    assert list(WORKS) == list(UNPREPARED) == list(METHODS)
    assert all(list(row) == list(NETWORKS) for row in WORKS.values())
    assert {name: "yes" if method.smooth else "no" for name, method in METHODS.items()} == SMOOTHED


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_as_the_table_says(method, network):
    asked = question(network)
    answer = WORKS[method][network]
    if answer != "yes":
        reason = answer.removeprefix("no: ")
        assert reason != answer
        with pytest.raises(ValueError) as caught:
            attribution_map(method, asked)
        start, _, said = str(caught.value).partition(": ")
        assert start == f"{METHODS[method].title} cannot be used on {type(asked.model).__name__}" and said == reason
        return

    dense = attribution_map(method, asked)
    assert dense.shape == (32, 32) and dense.isfinite().all() and dense.min() >= 0 and dense.max() > 0
    torch.rand(1)
    np.random.rand()
    assert torch.equal(attribution_map(method, asked), dense), "the same map again, whatever was drawn in between"

    before = {name: value.clone() for name, value in asked.model.state_dict().items()}
    recipe = make_recipe(method, asked)
    settings = {"sparsity": 0.6, "solver": "sparsegpt", "layers": NETWORKS[network][1]}
    spade = Spade(recipe.attribution, ImageAugmenter(4, (0.5,) * 3, (1.0,) * 3, seed=2), **settings)
    with seeded(asked.image.device):
        inside = to_map(spade.attribute(asked.image, **recipe.arguments), asked.image)
    assert all(torch.equal(value, before[name]) for name, value in asked.model.state_dict().items())
    with spade.traces[0].applied(asked.model):
        by_hand = attribution_map(method, asked)
    assert torch.equal(inside, by_hand) and not torch.allclose(inside, dense, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("method", "network"), [(method, one) for method, row in WORKS.items() for one in row if row[one] == "yes"]
)
def test_unprepared_as_the_table_says(method, network):
    expected = attribution_map(method, question(network))
    raw = question(network, prepared=False)
    if network in UNPREPARED[method].removeprefix("fails on ").split(", "):
        with pytest.raises((RuntimeError, ValueError)):
            attribution_map(method, raw)
    else:
        assert UNPREPARED[method] == "same maps" or UNPREPARED[method].startswith("fails on ")
        assert torch.allclose(attribution_map(method, raw), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("smooth", [None, SmoothGrad(copies=2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_target_function_has_the_map_of_its_class(method, smooth):
    asked = question("plain CNN")
    found = attribution_map(method, replace(asked, target=class_score(asked.target)), smooth)
    torch.testing.assert_close(found, attribution_map(method, asked, smooth))
    assert not asked.model._forward_hooks


def test_the_layer_of_tokens_that_influence_a_target_function():
    asked = question("ViT")
    found = attribution_map("gradcam", replace(asked, target=class_score(asked.target)))
    torch.testing.assert_close(found, attribution_map("gradcam", asked))


def test_all_draws_are_put_back():
    states = torch.get_rng_state(), np.random.get_state()[1]
    attribution_map("gradient-shap", question("plain CNN"))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


# NoiseTunnel

SETTINGS = {"sparsity": 0.5, "solver": "sparsegpt"}
AUGMENTER = ImageAugmenter(n=4, seed=2)
NOISE = {"nt_samples": 3, "stdevs": 0.1}


@pytest.mark.parametrize("method", [Saliency, LRP])
def test_noise_inside_spade_smooths_on_one_trace(method, images):
    model = question("plain CNN").model
    tunnel = NoiseTunnel(method(model))
    spade = Spade(tunnel, AUGMENTER, **SETTINGS)
    torch.manual_seed(5)
    found = spade.attribute(images, target=[1, 2], **NOISE)
    assert [made.sample_id for made in spade.traces] == ["0", "1"]
    torch.manual_seed(5)
    for index, made in enumerate(spade.traces):
        clean = trace(model, AUGMENTER(images[index], str(index)), sample_id=str(index), seed=2, **SETTINGS)
        assert torch.equal(made.weight("3"), clean.weight("3"))
        with made.applied(model):
            expected = tunnel.attribute(images[index : index + 1], target=index + 1, **NOISE)
        assert torch.equal(found[index : index + 1], expected)


def test_noise_around_spade_makes_a_trace_of_each_noisy_copy(images):
    model = question("plain CNN").model
    spade = Spade(Saliency(model), AUGMENTER, **SETTINGS)
    torch.manual_seed(5)
    found = NoiseTunnel(spade).attribute(images, target=1, **NOISE)
    assert len(spade.traces) == 6 and found.shape == images.shape
    torch.manual_seed(5)
    noisy = images.repeat_interleave(3, dim=0) + torch.normal(0, torch.full((6, 3, 16, 16), 0.1))
    expected = spade.attribute(noisy, target=1).view(2, 3, 3, 16, 16).mean(1)
    assert torch.allclose(found, expected, atol=1e-7)


def test_noise_inside_spade_shares_a_distribution_of_baselines(images):
    model = question("plain CNN").model
    tunnel = NoiseTunnel(IntegratedGradients(model))
    arguments = {"baselines": torch.rand(2, 3, 16, 16), "draw_baseline_from_distrib": True, "target": 1, "n_steps": 3}
    spade = Spade(tunnel, AUGMENTER, **SETTINGS)
    with seeded(images.device):
        found = spade.attribute(images, **arguments, **NOISE)
    with seeded(images.device):
        for index, made in enumerate(spade.traces):
            with made.applied(model):
                expected = tunnel.attribute(images[index : index + 1], **arguments, **NOISE)
            assert torch.equal(found[index : index + 1], expected)


# LRP


class Plain(nn.Module):
    """Without `nn.Flatten`, which Captum's LRP does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


def test_lrp_is_that_of_captum_without_skip_connections(images):
    model = Plain().requires_grad_(False)
    found = LRP(model).attribute(images, target=2)
    for index in (0, 3):
        model.features[index].rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
    model.head.rule = EpsilonRule(1e-6)
    expected = CaptumLRP(model).attribute(images, target=2).detach()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def signed_network() -> nn.Module:
    """A convolution of signed inputs, a batch norm with scales of both signs, an activation that is curved above 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(1568, 5))
    for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.eval()


def test_lrp_by_hand(images):
    """The rules as they are written in the literature: relevance, layer by layer."""
    model, image = signed_network().double(), images[:1].double() - 0.5
    found = LRP(model, epsilon=1e-9).attribute(image, target=2)
    with torch.no_grad():
        scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
        weight = (model[0].weight * scale.view(-1, 1, 1, 1)).flatten(1)
        patches = F.unfold(image, 3)[0]
        hidden = model[3](model[2](model[1](model[0](image))))
        relevance = hidden * model[4].weight[2]  # epsilon rule, from an output of its own size
        products = (weight[:, :, None] * patches).clamp(min=0)
        shares = products / products.sum(1, keepdim=True).clamp(min=1e-12)
        columns = (shares * relevance.view(8, 1, -1)).sum(0)
        expected = F.fold(columns[None], 16, 3)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_lrp_counts_a_batch_norm_as_part_of_its_convolution(images):
    model = signed_network().requires_grad_(False)
    found = LRP(model).attribute(images - 0.5, target=2)
    fused = nn.Sequential(fuse_conv_bn_eval(model[0], model[1]), *model[2:])
    expected = LRP(fused).attribute(images - 0.5, target=2).detach()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_lrp_is_conserved_through_skip_connections():
    asked = question("ResNet-18")
    output = float((asked.model(asked.image)[0, asked.target] - asked.model.fc.bias[asked.target]).detach())
    lrp = LRP(asked.model)
    relevance = float(lrp.attribute(asked.image, target=asked.target).detach().sum())
    assert abs(relevance - output) < 1e-3 * abs(output)
    assert torch.equal(run_with_rules(asked.model, (asked.image,), 1e-6), asked.model(asked.image))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU])
@pytest.mark.parametrize("prepare", [False, True])
def test_lrp_of_activations_in_place(activation, prepare, images):
    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        first = [nn.Conv2d(3, 8, 3), activation(inplace=inplace), nn.BatchNorm2d(8)]
        second = [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), activation(inplace=inplace)]
        model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(1152, 5)).eval()
        for norm in (model[2], model[4]):
            nn.init.normal_(norm.weight)
        return prepare_for_attribution(model) if prepare else model

    found, expected = (LRP(network(inplace)).attribute(images - 0.5, target=1) for inplace in (True, False))
    assert torch.equal(found, expected)


# Class activation maps


def test_layer_cam_by_hand(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(1568, 5))
    maps = model[0](images)
    (gradients,) = torch.autograd.grad(model[2](maps.flatten(1))[:, 2].sum(), maps)
    found = LayerCam(model, model[0]).attribute(images, target=2)
    assert found.shape == (2, 1, 14, 14)
    assert torch.allclose(found[:, 0], (gradients.clamp(min=0) * maps).sum(1).clamp(min=0), atol=1e-7)


def test_last_feature_layer():
    asked = question("ResNet-18")
    assert last_feature_layer(asked.model, torch.rand(1, 3, 64, 64), 0) in asked.model.layer4[1].modules()
    with pytest.raises(ValueError, match="no layer whose output is a feature map"):
        last_feature_layer(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2), 0)


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_the_last_layer_before_a_neuron(method):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()
    image = torch.rand(1, 3, 8, 8)
    for target, layer in ((neuron("1", 2), model[1]), (neuron("3", 0), model[3]), (neuron("6", 0), model[4])):
        assert last_feature_layer(model, image, target) is layer
        assert attribution_map(method, Question(model, image, target, torch.zeros(1, 3, 1, 1))).any()
    with pytest.raises(ValueError, match=r"target .*lambda> has no gradient"):
        last_feature_layer(model, image, lambda output: output[:, 0].detach())


def test_targets_of_questions_are_checked():
    model, image, black = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.rand(1, 3, 2, 2), torch.zeros(1, 3, 1, 1)
    assert Question(model, image, np.int64(2), black).target == 2
    for target in (1.0, True, "1.5", b"1"):
        with pytest.raises((TypeError, ValueError), match="class") as caught:
            Question(model, image, target, black)
        assert isinstance(caught.value, UserError)


class ChannelsLast(nn.Module):
    """A convolution and a linear layer on the last dimension; width, height and channels are of one size."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.conv, self.mix, self.head, self.back = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5), back
        self.order = Order()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.conv(x).permute(0, 2, 3, 1))
        return self.head(self.order(x).mean((2, 3)) if self.back else F.gelu(x).mean((1, 2)))


class Order(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("method", [GradCam, LayerCam])
def test_maps_with_their_channels_last(method):
    torch.manual_seed(0)
    model, image = ChannelsLast(back=False), torch.randn(1, 3, 8, 8)
    assert last_feature_layer(model, image, 2) is model.mix
    maps = model.mix(model.conv(image).permute(0, 2, 3, 1)).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model.head(F.gelu(maps).mean((1, 2)))[0, 2], maps)
    weights = gradients.mean((1, 2), keepdim=True) if method is GradCam else gradients.clamp(min=0)
    expected = (weights * maps).sum(-1).detach()
    found = method(model, model.mix).attribute(image, target=2)[:, 0]
    assert torch.allclose(found, expected if method is GradCam else expected.clamp(min=0), atol=1e-7)


def test_maps_that_are_permuted_back():
    torch.manual_seed(0)
    model, image = ChannelsLast(back=True), torch.randn(1, 3, 8, 8)
    assert last_feature_layer(model, image, 0) is model.order
    found = LayerCam(model, model.order).attribute(image, target=2)
    maps = model.order(model.mix(model.conv(image).permute(0, 2, 3, 1)))
    expected = (maps * (model.head.weight[2] / 64).clamp(min=0)[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(found, expected.detach(), atol=1e-7)


def test_swin_has_maps_with_channels_first_at_its_end():
    model = models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=5).eval()
    image = torch.randn(1, 3, 32, 32)
    assert last_feature_layer(model, image, 0) is model.permute
    found = LayerCam(model, model.permute).attribute(image, target=2)
    maps = model.permute(model.norm(model.features(image)))
    expected = (maps * (model.head.weight[2] / 64).clamp(min=0)[:, None, None]).sum(1, keepdim=True).clamp(min=0)
    assert torch.allclose(found, expected.detach(), atol=1e-6)


def test_the_layer_is_where_branches_have_come_together():
    class Sum(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.a, self.b, self.inplace = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), inplace

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.a(x)
            b = self.b(x)
            b += a
            return b if self.inplace else torch.cat([a, b], 1)

    for inplace in (False, True):
        model = nn.Sequential(Sum(inplace), nn.Flatten(), nn.LazyLinear(2))
        assert last_feature_layer(model, torch.randn(1, 3, 4, 4), 0) is model[0]
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)), nn.Flatten(), nn.LazyLinear(2))
    assert last_feature_layer(model, torch.randn(1, 3, 4, 4), 0) is model[0][1]


# LIME


def test_squares():
    mask = squares(torch.rand(1, 3, 20, 30), 4)
    assert mask.shape == (1, 1, 20, 30) and mask.unique().tolist() == list(range(16))
    assert (mask[0, 0, :5, :7] == 0).all() and mask[0, 0, -1, -1] == 15
    assert squares(torch.rand(1, 3, 2, 3), 4).flatten().tolist() == list(range(6))


def test_ridge_is_at_the_minimum_of_its_loss():
    x, y, weight = torch.rand(30, 4).round(), torch.rand(30), torch.rand(30)
    ridge = Ridge()
    ridge.fit([(x[:20], y[:20], weight[:20]), (x[20:], y[20:], weight[20:])])
    found = ridge.representation()
    intercept = (weight * (y - x @ found)).sum() / weight.sum()
    assert torch.allclose(x.T @ (weight * (y - x @ found - intercept)), found, atol=1e-5)
    assert torch.equal(ridge(x), x @ found)


def test_nearness():
    kept = [torch.tensor([[1.0] * on + [0.0] * (8 - on)]) for on in range(9)]
    weights = [float(nearness(None, None, one, num_interp_features=8)) for one in kept]
    assert weights[8] == 1 and weights == sorted(weights) and weights[0] > 0


def test_lime_finds_the_square_that_counts(monkeypatch):
    monkeypatch.setattr(methods, "_LIME_SAMPLES", 400)
    weight = torch.zeros(1, 3, 16, 16)
    weight[..., 4:6, 8:10] = 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 1))
    model[1].weight.data = weight.view(1, -1)
    found = attribution_map("lime", Question(model, torch.ones(1, 3, 16, 16), 0, torch.zeros(1, 3, 1, 1)))
    assert (found[4:6, 8:10] > 9).all() and found.where(weight[0, 0] == 0, 0).max() < 1


# Other libraries


def test_python_examples_of_the_docs():
    pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)  # OpenCV, which both need, may miss its libraries
    pytest.importorskip("quantus", exc_type=ImportError)
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        for block in blocks:
            exec(compile(block, "docs/methods.md", "exec"), names)
    assert names["dense"].shape == names["traced"].shape == names["both"].shape == (32, 32)
    model, image = names["model"], names["images"][:1]
    with names["trace"].applied(model):
        own = LayerGradCam(model, model[3]).attribute(image, target=3, relu_attributions=True)[0, 0].detach()
    theirs = torch.from_numpy(names["cams"][0])
    assert torch.allclose(theirs, (own - own.min()) / (own.max() - own.min()), atol=1e-4)
    assert len(names["scores"]) == 2 and np.isfinite(names["scores"]).all()
