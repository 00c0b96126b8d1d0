"""Gradient ascent finds what is known to excite a feature, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_fast
from spade_fast._util.errors import DeadFeatureError, InvalidTypeError, InvalidValueError
from spade_fast.attribution.visualization import Feature, visualize
from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS
from spade_fast.targets import Target, class_against, neuron


def drawn(model: nn.Module, feature: Feature | Target, **options: Any) -> Tensor:
    """The one picture."""
    (picture,) = visualize(model, feature, **options).pictures
    return picture


class Tokens(nn.Module):
    """Pixels as tokens: [n, 3, H, W] -> [n, H W, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


def colours() -> nn.Sequential:
    """Channel c likes colour c and dislikes the others; class 1 - c likes them too."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    network[0].weight.data = (2 * torch.eye(3) - 1)[:, :, None, None]
    network[3].weight.data = torch.eye(3).flip(0)
    return network


@pytest.mark.parametrize(
    ("feature", "colour"),
    [
        (Feature(0, "0"), 0),
        (Feature(2, "0"), 2),
        (Feature(0), 2),
        (Feature(1), 1),
        (Feature(1, "0", neuron=True), 1),
        (class_against(0, 1), 2),
        (neuron("0", 1), 1),
    ],
)
@pytest.mark.parametrize("method", PARAMETRIZATIONS)
def test_finds_the_colour_that_a_feature_likes(feature: Feature | Target, colour: int, method: str) -> None:
    picture = drawn(colours(), feature, size=(20, 31), steps=60, method=method)
    assert picture.shape == (3, 20, 31) and picture.min() >= 0 and picture.max() <= 1
    middle = picture[:, 8:12, 12:19].mean((1, 2))
    others = [c for c in range(3) if c != colour]
    assert middle[colour] > 1.2 * middle[others].max()


def test_tokens_have_their_features_last() -> None:
    picture = drawn(nn.Sequential(nn.Conv2d(3, 3, 1), Tokens()).requires_grad_(False), Feature(1, "1"), size=(8, 8))
    assert picture.isfinite().all()


class Changing(nn.Module):
    """Changes the output of its convolution in place, or that of a copy."""

    def __init__(self, change: str, copies: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.change, self.copies = nn.Conv2d(3, 6, 3), change, copies

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        names = {"y": y.clone() if self.copies else y, "F": F}
        exec(self.change, names)
        return names["y"]


@pytest.mark.parametrize(
    "change", ["y.relu_()", "y += 3", "F.silu(y, inplace=True)", "y[:, :4] = 0", "y.mul_(-1)", "y.data.zero_()"]
)
def test_a_layer_is_read_as_it_was_returned(change: str) -> None:
    pictures = [drawn(Changing(change, copies), Feature(1, "conv"), size=(8, 8), steps=3) for copies in (0, 1)]
    assert torch.equal(*pictures)


def test_a_norm_before_an_activation_in_place() -> None:
    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=inplace))

    pictures = [drawn(network(inplace), Feature(1, "1"), size=(8, 8), steps=3) for inplace in (True, False)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "bn1"), ("densenet121", "features.norm0")])
def test_norms_of_torchvision(name: str, layer: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None)
    found = drawn(model, Feature(1, layer), size=(32, 32), steps=2)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert torch.equal(found, drawn(model, Feature(1, layer), size=(32, 32), steps=2))


class LastColours(nn.Module):
    """The network of `colours`, whose maps have their channels last: a linear layer in place of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3, bias=False)
        self.mix.weight.data = 2 * torch.eye(3) - 1

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("neuron", [False, True])
def test_maps_with_their_channels_last(neuron: bool) -> None:
    options = dict(size=(3, 3), steps=20)  # as many columns as channels
    expected = drawn(colours(), Feature(1, "0", neuron), **options)
    assert torch.allclose(drawn(LastColours(), Feature(1, "mix", neuron), **options), expected, atol=1e-4)


def test_maps_of_an_unknown_order_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Unflatten(1, (4, 8, 8)))
    with pytest.raises(ValueError, match=r"layer '2' returns \[1, 4, 8, 8\], whose order"):
        drawn(network, Feature(1, "2"), size=(8, 8), steps=1)


class Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


def test_outputs_that_are_not_one_tensor_are_named() -> None:
    with pytest.raises(ValueError, match="the model returns dict, not feature maps"):
        drawn(Pair(3, 2, 1), Feature(0), size=(8, 8), steps=1)
    with pytest.raises(ValueError, match="layer '0' returns dict, not feature maps"):
        drawn(nn.Sequential(Pair(3, 2, 1)), Feature(0, "0"), size=(8, 8), steps=1)
    with pytest.raises(ValueError, match=r"the model returns \[192\], not feature maps"):
        drawn(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(0)), Feature(0), size=(8, 8), steps=1)


def test_a_neuron_sees_its_own_place() -> None:
    """A channel is excited everywhere, a neuron where it looks."""
    network = nn.Conv2d(3, 1, 5, padding=2)
    network.weight.data.fill_(1)
    whole = drawn(network, Feature(0), size=(64, 64), steps=60)
    one = drawn(network, Feature(0, "", neuron=True), size=(64, 64), steps=60)
    excess = [picture[:, 28:36, 28:36].mean() - picture.mean() for picture in (whole, one)]
    assert whole.mean() > 0.55 and excess[0] < 0.25 and excess[1] > 0.35


def test_seeds_and_state() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (drawn(network, Feature(1, "1"), size=(16, 16), steps=5, seed=3) for _ in range(2))
    other = drawn(network, Feature(1, "1"), size=(16, 16), steps=5, seed=4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network[1]._forward_hooks


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_channels_and_types(channels: int, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    options = {"size": (12, 10), "mean": (0.5,) * channels, "std": (0.25,) * channels, "learning_rate": 0.1}
    made = drawn(model.to(dtype), Feature(1), steps=20, **options)
    start = drawn(model, Feature(1), steps=0, **options)
    assert made.shape == (channels, 12, 10) and made.dtype == torch.float32
    before, after = (
        float(model.requires_grad_(False)(((one - 0.5) / 0.25)[None].to(dtype))[0, 1]) for one in (start, made)
    )
    assert after > before


def test_under_autocast_only_the_network_is_in_half_precision() -> None:
    network, types = colours(), set()
    network[0].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    photo = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    for start in (None, photo):
        with torch.autocast("cpu", torch.bfloat16):
            before, after = (drawn(network, Feature(0), size=(16, 16), steps=n, start=start) for n in (0, 20))
        assert after.dtype == torch.float32
        assert network(after[None])[0, 0] > network(before[None])[0, 0]
    assert torch.bfloat16 in types


def test_mean_and_std_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="one number per channel, got 1 and 3"):
        drawn(nn.Conv2d(1, 2, 3), Feature(0), mean=(0.5,))


def test_normalised_inputs_and_traces() -> None:
    """The input's mean and spread are undone: a picture of another scale of colours is the same."""
    network, scaled = colours(), colours()
    scaled[0].weight.data *= torch.tensor([0.5, 0.2, 0.1])[None, :, None, None]
    plain = drawn(network, Feature(0), size=(16, 16), steps=10)
    normalised = drawn(scaled, Feature(0), size=(16, 16), steps=10, mean=(0.3, 0.4, 0.5), std=(0.5, 0.2, 0.1))
    torch.testing.assert_close(plain, normalised, rtol=0, atol=1e-4)
    trace = spade_fast.trace(network, torch.rand(8, 3, 16, 16), sparsity=0.34, layers="0")
    with trace.applied(network):
        pruned = drawn(network, Feature(0), size=(16, 16), steps=10)
    assert not torch.equal(pruned, plain)
    assert torch.equal(drawn(network, Feature(0), size=(16, 16), steps=10), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feature=Feature(0, "nothing")), "no layer 'nothing'"),
        (dict(feature=Feature(3)), "index of the model must lie between 0 and 2, got 3"),
        (dict(feature=Feature(-1)), "index of the model must lie between 0 and 2, got -1"),
        (dict(feature=Feature(0, neuron=True)), "a neuron needs a layer whose output is a feature map"),
        (dict(steps=-1), "steps must be at least 0"),
        (dict(views=0), "views must be at least 1"),
        (dict(count=0), "count must be at least 1"),
        (dict(size=(0, 5)), "size must be at least 1, got 0"),
        (dict(view=(5,)), "view must be a height and a width"),
        (dict(view=()), "view must be a height and a width"),
        (dict(std=(1.0, 0.0, 1.0)), "mean must be finite, std positive and finite"),
        (dict(mean=(0.0, float("nan"), 0.0)), "mean must be finite, std positive and finite"),
        (dict(start=torch.full((3, 9, 9), 0.5)), "start has a single colour, and so no magnitudes to keep"),
        (dict(learning_rate=0.0), "learning_rate must be above 0"),
        (dict(method="mako"), "unknown method 'mako': did you mean 'maco'"),
        (dict(start=torch.rand(1, 8, 8)), r"start must have 3 channels, got \[1, 8, 8\]"),
        (dict(start=torch.rand(3, 8, 8) + 1), "start must have colours between 0 and 1"),
        (dict(feature=Feature((1.0, 0.0))), "a direction of the model has 3 coordinates, got 2"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    network = colours().train()
    with pytest.raises(ValueError, match=message):
        drawn(network, **{"feature": Feature(0), "size": (8, 8), "steps": 2, **options})
    assert network.training and not network._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feature=0), "feature must be a Feature, a target function or a sequence of them, got 0"),
        (dict(feature=None), "feature must be a Feature, a target function or a sequence of them, got None"),
        (dict(feature=[Feature(0), 1]), "feature must be a Feature, a target function or a sequence of them"),
        (dict(model=torch.rand), "model must be a torch.nn.Module, got builtin_function_or_method"),
        (dict(size=16), "size must be a height and a width, got 16"),
        (dict(size=(8.0, 8.0)), "size must be an integer, got 8.0"),
        (dict(size=(True, 8)), "size must be an integer, got True"),
        (dict(view=8), "view must be a height and a width, got 8"),
        (dict(mean=0.5, std=0.5), "mean and std must be numbers, one per channel, got 0.5 and 0.5"),
        (dict(mean="abc"), "mean and std must be numbers, one per channel, got 'abc'"),
    ],
)
def test_arguments_of_the_wrong_type(options: dict, message: str) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        visualize(**{"model": colours(), "feature": Feature(0), "size": (8, 8), "steps": 2, **options})


def test_a_mean_and_a_spread_as_tensors() -> None:
    options = dict(size=(8, 8), steps=2)
    found = drawn(colours(), Feature(0), mean=torch.zeros(3), std=torch.ones(3), **options)
    assert torch.equal(found, drawn(colours(), Feature(0), **options))


def test_a_network_without_parameters() -> None:
    assert drawn(nn.AvgPool2d(2), Feature(1), size=(8, 8), steps=20)[1].mean() > 0.6


def test_types_of_a_network_whose_first_parameter_is_an_index() -> None:
    network = colours().requires_grad_(False)
    network.register_parameter("order", nn.Parameter(torch.arange(3), requires_grad=False))
    assert next(network.parameters()).dtype == torch.int64
    assert torch.equal(*(drawn(one, Feature(0), size=(8, 8), steps=2) for one in (network, colours())))


def test_a_network_without_values() -> None:
    with pytest.raises(ValueError, match="the model is on the meta device and has no values"):
        drawn(colours().to("meta"), Feature(0), size=(8, 8), steps=2)


def test_under_inference_mode() -> None:
    network = nn.Sequential(colours(), nn.BatchNorm1d(3))
    expected = drawn(network, Feature(0), size=(8, 8), steps=3, start=torch.linspace(0, 1, 192).view(3, 8, 8))
    with torch.inference_mode():
        start = torch.linspace(0, 1, 192).view(3, 8, 8)
        found = drawn(network, Feature(0), size=(8, 8), steps=3, start=start)
        assert torch.is_inference_mode_enabled()
        made = colours()
    assert torch.equal(found, expected)
    with pytest.raises(InvalidValueError, match=r"the model cannot take .*: Inference tensors cannot be saved"):
        drawn(made, Feature(0), size=(8, 8), steps=3)


@pytest.mark.parametrize("layer", [None, "3"])
def test_a_compiled_network(layer: str | None) -> None:
    networks = (torch.compile(colours(), backend="eager"), colours())
    assert torch.equal(*(drawn(one, Feature(0, layer), size=(8, 8), steps=3) for one in networks))


def test_views_smaller_than_the_picture_and_gradual_change() -> None:
    """The network sees views of its own size, one per picture and view, and progress is told."""
    sizes, told = [], []
    network = colours()
    network[0].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape)))
    made = visualize(
        network,
        Feature(0),
        count=2,
        size=(20, 24),
        view=(8, 10),
        views=3,
        steps=4,
        progress=lambda *report: told.append(report),
    )
    assert made.pictures.shape == (2, 3, 20, 24) and made.importance.shape == (2, 20, 24)
    assert sizes[-4:] == [(6, 3, 8, 10)] * 4 and told == [("visualize", step, 4) for step in range(1, 5)]


def test_several_pictures_differ_more_than_those_of_several_seeds() -> None:
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU())
    network = nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))

    @torch.no_grad()
    def alike(pictures: Tensor) -> float:
        found = maps(pictures).flatten(2)
        grams = F.normalize((found @ found.mT).flatten(1), dim=1)
        return float((grams @ grams.mT).sum() - len(grams))

    options = {"size": (24, 24), "steps": 80, "views": 2}
    together = visualize(network, Feature(0), count=3, **options).pictures
    apart = torch.cat([visualize(network, Feature(0), seed=seed, **options).pictures for seed in range(3)])
    assert alike(together) < alike(apart) - 0.1


def test_several_pictures_need_a_feature_map() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(ValueError, match="no module of the network returns feature maps"):
        visualize(network, Feature(0), count=2, size=(8, 8), steps=1)


@pytest.mark.parametrize("method", PARAMETRIZATIONS)
def test_a_photo_to_start_with(method: str) -> None:
    photo = 0.05 + 0.9 * torch.rand(3, 16, 12)
    kept = drawn(colours(), Feature(0), size=(16, 12), steps=0, start=photo, method=method)
    torch.testing.assert_close(kept, photo, rtol=0, atol=1e-3)
    changed = drawn(colours(), Feature(0, "0"), size=(16, 12), steps=20, start=photo, method=method)
    assert changed[2].mean() < photo[2].mean() - 0.02
    assert drawn(colours(), Feature(0), size=(8, 9), steps=1, start=photo, method=method).shape == (3, 8, 9)


def test_a_photo_stays_recognisable_longer_than_random_phases() -> None:
    generator = torch.Generator().manual_seed(0)
    photo = F.interpolate(torch.rand(1, 3, 4, 3, generator=generator), (64, 48), mode="bilinear")[0]
    network = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 3, 5))
    alike = []
    for learning_rate in (None, PARAMETRIZATIONS["maco"].learning_rate):
        made = drawn(network, Feature(0), size=(64, 48), steps=3, start=photo, learning_rate=learning_rate)
        alike.append(float(torch.corrcoef(torch.stack([made.flatten(), photo.flatten()]))[0, 1]))
    assert alike[0] > 0.8 > 0.5 > alike[1], alike


def test_importance_is_where_the_network_looks() -> None:
    class Left(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[..., : x.shape[-1] // 2])

    made = visualize(Left(3, 2, 1), Feature(0), size=(16, 32), steps=20)
    (left,), (right,) = made.importance[..., :8], made.importance[..., -3:]
    assert left.mean() > 10 * right.mean()
    shown = made.drawn(background=1.0)
    assert shown.shape == made.pictures.shape
    assert shown[..., -2:].min() > 0.9 and (shown - made.pictures)[..., 5:11, 7:10].abs().mean() < 0.1


class Stopping(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Head(nn.Conv2d):
    """What is before the convolution has no gradient, as in a network that is tuned."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Frozen(nn.Conv2d):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def silent() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    network[0].bias.data.fill_(-100)
    return network


@pytest.mark.parametrize(
    ("network", "feature", "message"),
    [
        (Stopping(3, 2, 1), Feature(0), "the activation of class 0 has no gradient"),
        (Head(3, 2, 1), Feature(0), "the activation of class 0 has no gradient"),
        (Frozen(3, 2, 1), Feature(0), "the activation of class 0 has no gradient"),
        (silent(), Feature(1, "1"), "channel 1 of layer '1' never fires"),
        (silent(), (Feature(1, "1"), Feature(0, "1")), "channel 1 of layer '1' . channel 0 of layer '1' never fires"),
        (
            nn.Conv2d(3, 2, 11),
            Feature(0),
            "the model cannot take images of 8 x 8 pixels and 3 channels .*[Kk]ernel size",
        ),
    ],
)
def test_features_that_nothing_excites(network: nn.Module, feature: Feature, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize(network, feature, size=(8, 8), steps=20)


def test_a_channel_that_a_trace_cut_off_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    network[0].weight.data[2] = 0
    with pytest.raises(DeadFeatureError, match="all weights of channel 2 of layer '0' are zero"):
        visualize(network, Feature(2, "0"), size=(8, 8), steps=1)
    assert visualize(network, Feature(1, "0"), size=(8, 8), steps=1).pictures.isfinite().all()


def test_of_several_features_the_one_that_does_not_fire_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    network[0].bias.data = torch.tensor([1.0, -10.0, 1.0])
    with pytest.raises(DeadFeatureError, match="channel 1 of layer '1' does not fire beside the others"):
        visualize(network, [Feature(0, "1"), Feature(1, "1")], size=(8, 8), steps=2)
    assert visualize(network, [Feature(0, "1"), Feature(2, "1")], size=(8, 8), steps=2).importance.any()


def test_command(small: str, photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from spade_fast.cli.app import app

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return f"{result.exit_code} {' '.join(result.output.split())}"

    trace, out = tmp_path / "one.safetensors", tmp_path / "out"
    made = ("trace", photo, "--model", small, "--sparsity", 0.5, "--augmentations", 4, "--layers", "*", "--out", trace)
    assert run(*made).startswith("0")
    drawn = ("visualize", 2, "--model", small, "--steps", 3, "--out", out)
    assert run(*drawn, "--trace", trace).startswith("0")
    written = ["dense.png", "index.html", "one.png", "overview.png", "report.json"]
    assert sorted(path.name for path in out.iterdir()) == written
    assert (out / "dense.png").read_bytes() != (out / "one.png").read_bytes()
    assert "2 error: index of the model must lie between 0 and 3, got 9" in run("visualize", 9, *drawn[2:])
    assert "2 error: no such trace file" in run(*drawn, "--trace", tmp_path / "none")
    assert "distinct names" in run(*drawn, "--trace", trace, "--trace", trace)
