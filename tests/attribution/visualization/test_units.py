"""Units in a photo: their contributions by hand in float64, the layer they are read from, and the crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_feature_maps import LastAreChannels
from torch import Tensor, nn

from spade_fast.attribution.visualization.units import WINDOW, Units, exciting_crop, read_units


def classifier(*, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    ).double()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 9, 8, dtype=torch.float64)


def test_contributions_by_hand(image: Tensor) -> None:
    network = classifier()
    before = F.conv2d(image, network[0].weight, network[0].bias)[0]
    weights = network[4].weight[1] / (7 * 6)
    expected = {"0": before, "1": before.relu()}
    for layer, maps in expected.items():
        units = read_units(network, layer, image, target=1)
        assert units.maps.dtype == torch.float64
        torch.testing.assert_close(units.maps, maps.detach(), rtol=1e-12, atol=0)
        # A position that the ReLU blocks contributes nothing, wherever it is read.
        by_hand = (before.relu().sum((1, 2)) * weights).detach()
        torch.testing.assert_close(units.contributions, by_hand, rtol=1e-12, atol=0)
        torch.testing.assert_close(units.activations, maps.detach().mean((1, 2)))
        torch.testing.assert_close(units.shares, by_hand / by_hand[by_hand > 0].sum())
    logit = network(image)[0, 1] - network[4].bias[1]
    torch.testing.assert_close(units.contributions.sum(), logit.detach())


def test_positions_that_are_not_excited_do_not_count(image: Tensor) -> None:
    """Of a layer without a rectifier: what is drawn is what excites a channel, not what inhibits it."""
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).double()
    maps = network[0](image)[0]
    units = read_units(network, "0", image, 0)
    by_hand = (maps.clamp(min=0).mean((1, 2)) * network[3].weight[0]).detach()
    torch.testing.assert_close(units.contributions, by_hand)
    assert maps.min() < 0


def test_what_follows_may_change_the_map_in_place(image: Tensor) -> None:
    left, right = (read_units(classifier(inplace=inplace), "0", image, 0) for inplace in (False, True))
    torch.testing.assert_close(left.maps, right.maps)
    torch.testing.assert_close(left.contributions, right.contributions)
    assert left.maps.min() < 0


def test_the_network_stays_as_it_was(image: Tensor) -> None:
    network = classifier().train()
    read_units(network, "1", image, 0)
    assert network.training and all(one.grad is None for one in network.parameters())
    assert not any(module._forward_hooks for module in network.modules()) and not image.requires_grad


def test_strongest_units_are_alive_and_speak_for_the_class(image: Tensor) -> None:
    network = classifier()
    network[4].weight.data[0] = torch.tensor([3.0, -1.0, 1.0, 2.0, 9.0, 0.5], dtype=torch.float64)
    network[0].weight.data[4] = 0
    network[0].bias.data[4] = 1.0  # cut off: what it adds to the logit does not come from the photo
    units = read_units(network, "1", image, 0)
    assert units.alive.tolist() == [True] * 4 + [False, True] and units.contributions.argmax() == 4
    order = sorted((0, 2, 3, 5), key=lambda unit: -units.contributions[unit])
    assert units.strongest(3) == order[:3] and units.strongest(9) == order
    assert units.contributions[1] < 0 and units.shares[1] < 0


def test_units_that_differ_by_rounding_alone_are_not_alive() -> None:
    maps = torch.full((2, 3, 3), 0.7)
    maps[0, 1, 1] *= 1 + 4 * torch.finfo(torch.float32).eps
    maps[1, 1, 1] *= 1.001
    assert Units(maps, torch.ones(2)).alive.tolist() == [False, True]


def test_channels_that_are_last(image: Tensor) -> None:
    network = LastAreChannels().double()
    units = read_units(network, "features", image, 0)
    by_hand = network.features(image.permute(0, 2, 3, 1))[0].permute(2, 0, 1)
    torch.testing.assert_close(units.maps, by_hand.detach())
    torch.testing.assert_close(
        units.contributions, (by_hand.relu().mean((1, 2)) * network.head.weight[0]).detach(), rtol=1e-10, atol=1e-12
    )


class Stopping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        (classifier(), "11", "the model has no layer '11': did you mean '1'"),
        (classifier(), "2", r"feature map with several positions, but layer '2' returns \[1, 6, 1, 1\]"),
        (classifier(), "4", r"feature map with several positions, but layer '4' returns \[1, 2\]"),
        (nn.Sequential(classifier()[:2], Stopping(), classifier()[2:]), "0.0", "no gradient with respect to layer"),
    ],
)
def test_layers_without_units(network: nn.Module, layer: str, message: str, image: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        read_units(network, layer, image, 0)


@pytest.mark.parametrize(
    ("place", "corner"), [((0, 0), (0, 0)), ((3, 4), (10, 15)), ((2, 1), (7, 3)), ((2, 4), (7, 15))]
)
def test_crops_around_the_most_exciting_position(place: tuple[int, int], corner: tuple[int, int]) -> None:
    photo = np.stack(np.meshgrid(np.arange(16), np.arange(24), indexing="ij"), -1)
    activations = torch.zeros(4, 5)
    activations[place] = 1.0
    crop = exciting_crop(photo, activations)
    assert crop.shape == (WINDOW * 16, WINDOW * 24, 2) and tuple(crop[0, 0]) == corner
