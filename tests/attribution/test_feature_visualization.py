"""Feature visualisation finds what is known to excite a feature, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_fast
from spade_fast.attribution.feature_visualization import Feature, visualize


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
    ],
)
def test_finds_the_colour_that_a_feature_likes(feature: Feature, colour: int) -> None:
    picture = visualize(colours(), feature, size=(20, 31), steps=120)
    assert picture.shape == (3, 20, 31) and picture.min() >= 0 and picture.max() <= 1
    middle = picture[:, 8:12, 12:19].mean((1, 2))
    others = [c for c in range(3) if c != colour]
    assert middle[colour] > 1.2 * middle[others].max()


def test_tokens_have_their_features_last() -> None:
    picture = visualize(nn.Sequential(nn.Conv2d(3, 3, 1), Tokens()).requires_grad_(False), Feature(1, "1"), size=(8, 8))
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
    pictures = [visualize(Changing(change, copies), Feature(1, "conv"), size=(8, 8), steps=3) for copies in (0, 1)]
    assert torch.equal(*pictures)


def test_a_norm_before_an_activation_in_place() -> None:
    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=inplace))

    pictures = [visualize(network(inplace), Feature(1, "1"), size=(8, 8), steps=3) for inplace in (True, False)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "bn1"), ("densenet121", "features.norm0")])
def test_norms_of_torchvision(name: str, layer: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None)
    found = visualize(model, Feature(1, layer), size=(32, 32), steps=2)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert torch.equal(found, visualize(model, Feature(1, layer), size=(32, 32), steps=2))


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
    expected = visualize(colours(), Feature(1, "0", neuron), **options)
    assert torch.allclose(visualize(LastColours(), Feature(1, "mix", neuron), **options), expected, atol=1e-4)


def test_maps_of_an_unknown_order_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Unflatten(1, (4, 8, 8)))
    with pytest.raises(ValueError, match=r"layer '2' returns \[1, 4, 8, 8\], whose order"):
        visualize(network, Feature(1, "2"), size=(8, 8), steps=1)


class Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


def test_outputs_that_are_not_one_tensor_are_named() -> None:
    with pytest.raises(ValueError, match="the model returns dict, not feature maps"):
        visualize(Pair(3, 2, 1), Feature(0), size=(8, 8), steps=1)
    with pytest.raises(ValueError, match="layer '0' returns dict, not feature maps"):
        visualize(nn.Sequential(Pair(3, 2, 1)), Feature(0, "0"), size=(8, 8), steps=1)
    with pytest.raises(ValueError, match=r"the model returns \[192\], not feature maps"):
        visualize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(0)), Feature(0), size=(8, 8), steps=1)


def test_a_neuron_sees_its_own_place() -> None:
    """A channel is excited everywhere, a neuron where it looks."""
    network = nn.Conv2d(3, 1, 5, padding=2)
    network.weight.data.fill_(1)
    whole = visualize(network, Feature(0), size=(64, 64), steps=60)
    one = visualize(network, Feature(0, "", neuron=True), size=(64, 64), steps=60)
    excess = [picture[:, 28:36, 28:36].mean() - picture.mean() for picture in (whole, one)]
    assert whole.mean() > 0.55 and excess[0] < 0.1 and excess[1] > 0.3


def test_seeds_and_state() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (visualize(network, Feature(1, "1"), size=(16, 16), steps=5, seed=3) for _ in range(2))
    other = visualize(network, Feature(1, "1"), size=(16, 16), steps=5, seed=4)
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
    made = visualize(model.to(dtype), Feature(1), steps=20, **options)
    start = visualize(model, Feature(1), steps=0, **options)
    assert made.shape == (channels, 12, 10) and made.dtype == torch.float32
    before, after = (float(model(((one - 0.5) / 0.25)[None].to(dtype))[0, 1]) for one in (start, made))
    assert after > before


def test_mean_and_std_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="one number per channel, got 1 and 3"):
        visualize(nn.Conv2d(1, 2, 3), Feature(0), mean=(0.5,))


def test_normalised_inputs_and_traces() -> None:
    """The input's mean and spread are undone: a picture of another scale of colours is the same."""
    network, scaled = colours(), colours()
    scaled[0].weight.data *= torch.tensor([0.5, 0.2, 0.1])[None, :, None, None]
    plain = visualize(network, Feature(0), size=(16, 16), steps=10)
    normalised = visualize(scaled, Feature(0), size=(16, 16), steps=10, mean=(0.3, 0.4, 0.5), std=(0.5, 0.2, 0.1))
    torch.testing.assert_close(plain, normalised, rtol=0, atol=1e-4)
    trace = spade_fast.trace(network, torch.rand(8, 3, 16, 16), sparsity=0.34, layers="0")
    with trace.applied(network):
        pruned = visualize(network, Feature(0), size=(16, 16), steps=10)
    assert not torch.equal(pruned, plain)
    assert torch.equal(visualize(network, Feature(0), size=(16, 16), steps=10), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feature=Feature(0, "nothing")), "no layer 'nothing'"),
        (dict(feature=Feature(3)), "index must lie between 0 and 2, got 3"),
        (dict(feature=Feature(-1)), "index must lie between 0 and 2, got -1"),
        (dict(feature=Feature(0, neuron=True)), "a neuron needs a layer whose output is a feature map"),
        (dict(steps=-1), "steps must be at least 0"),
        (dict(size=(0, 5)), "size positive"),
        (dict(learning_rate=0.0), "learning_rate"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    network = colours().train()
    with pytest.raises(ValueError, match=message):
        visualize(network, **{"feature": Feature(0), "size": (8, 8), "steps": 2, **options})
    assert network.training and not network._forward_hooks


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
    assert "2 error: index must lie between 0 and 3, got 9" in run("visualize", 9, *drawn[2:])
    assert "2 error: no such trace file" in run(*drawn, "--trace", tmp_path / "none")
    assert "distinct names" in run(*drawn, "--trace", trace, "--trace", trace)
