"""Rectifiers that let gradients pass: what they return, and what they do for features that do not fire yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.errors import DeadFeatureError
from spade_fast.attribution.visualization import Feature, visualize
from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS
from spade_fast.attribution.visualization.rectifiers import opened


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(2 * x)


RECTIFIERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "in place": lambda: nn.Sequential(nn.Hardtanh(-9, 9), nn.ReLU(inplace=True)),
    "ReLU6": nn.ReLU6,
    "relu": lambda: Calling(F.relu),
    "relu_": lambda: Calling(torch.relu_),
    "clamp": lambda: Calling(lambda x: x.clamp(min=0)),
    "clamp_min": lambda: Calling(lambda x: torch.clamp_min(x, 0.0)),
}


@pytest.mark.parametrize("make", RECTIFIERS.values(), ids=RECTIFIERS)
def test_values_stay_and_gradients_pass(make: Callable[[], nn.Module]) -> None:
    rectifier = make()
    x = torch.linspace(-1, 1, 6, requires_grad=True)
    (usual,) = torch.autograd.grad(rectifier(x).sum(), x)
    with opened([rectifier]):
        result = rectifier(x)
        (passed,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(result, rectifier(x)) and not rectifier._forward_hooks and not rectifier._forward_pre_hooks
    assert usual[:3].eq(0).all() and passed.eq(usual[-1]).all() and usual[-1] > 0


def test_others_stay_closed() -> None:
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    with opened([network[1]]):
        (gradient,) = torch.autograd.grad(network(x).sum(), x)
    assert gradient.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("method", PARAMETRIZATIONS)
def test_a_feature_that_no_first_picture_excites(method: str, contrast: bool) -> None:
    """It fires for red pictures alone, and noise is grey."""
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    network[0].weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.2, 0.2]])[..., None, None]
    network[0].bias.data = torch.tensor([-0.6, 0.0])
    options = {"size": (24, 24), "views": 2, "method": method}
    feature = Feature(0, "1", neuron=True, contrast=contrast)
    with torch.no_grad():
        assert not network(visualize(network, feature, steps=0, **options).pictures)[:, 0].any()
    made = visualize(network, feature, steps=40, **options)
    assert network(made.pictures)[0, 0].max() > 0.1 and made.importance.any()


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("method", PARAMETRIZATIONS)
def test_a_constant_feature_is_dead_whatever_else_has_a_gradient(method: str, contrast: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    network[0].weight.data[1] = 0
    network[1].bias.data.fill_(0.5)
    with pytest.raises(DeadFeatureError, match="channel 1 of layer '2' never fires"):
        visualize(network, Feature(1, "2", contrast=contrast), size=(8, 8), steps=4, method=method)


def test_what_can_never_fire_is_given_up_early_and_what_might_at_the_end() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    network[0].weight.data[0] = 0
    network[0].bias.data.fill_(-100)
    for channel, last in ((0, 15), (1, 29)):
        told: list[int] = []
        with pytest.raises(DeadFeatureError, match=f"channel {channel} of layer '1' never fires"):
            visualize(
                network,
                Feature(channel, "1"),
                size=(8, 8),
                steps=30,
                progress=lambda stage, step, steps, told=told: told.append(step),
            )
        assert told[-1] == last
