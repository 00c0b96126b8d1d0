"""What a picture is to excite: classes, channels, neurons, directions, sums and differences of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spade_fast.attribution.visualization.features import Feature, reading


def activations(network: nn.Module, features: list[Feature], images: Tensor) -> Tensor:
    with reading(network, features, images[:1]) as read:
        return read(images)[0]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_what_is_read(network: nn.Module) -> None:
    images = torch.randn(6, 3, 9, 7)
    maps, classes = network[0](images), network(images)
    direction = torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0])
    expected = {
        Feature(2): classes[:, 2],
        Feature(2, contrast=True): classes[:, 2] - classes[:, [0, 1, 3]].mean(1),
        Feature((0.0, 2.0, 0.0, 0.0)): classes[:, 1],
        Feature(4, "0"): maps[:, 4].mean((1, 2)),
        Feature(4, "0", neuron=True): maps[:, 4, 3, 2],
        Feature(4, "0", neuron=True, contrast=True): maps[:, 4, 3, 2] - maps[:, :4, 3, 2].mean(1),
        Feature(direction, "0"): (maps * direction[:, None, None] / 5).sum(1).mean((1, 2)),
    }
    for feature, values in expected.items():
        torch.testing.assert_close(activations(network, [feature], images), values)
    both = activations(network, [Feature(4, "0"), Feature(2)], images)
    torch.testing.assert_close(both, maps[:, 4].mean((1, 2)) + classes[:, 2])
    both = [Feature(4, "0", contrast=True), Feature(2)]
    with reading(network, both, images[:1]) as read:
        torch.testing.assert_close(read(images)[1], maps[:, 4].mean((1, 2)) + classes[:, 2])
    assert not network[0]._forward_hooks


def test_a_layer_that_is_not_called() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match="layer 'aside' is not called"):
        activations(Aside(), [Feature(0, "aside")], torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("index", ["3", None, True, [[1.0]], 2.5])
def test_an_index_of_the_wrong_type(index: object) -> None:
    with pytest.raises(TypeError, match="index must be an integer or the coordinates of a direction"):
        Feature(index)


@pytest.mark.parametrize("direction", [[0.0, 0.0], [float("nan"), 1.0]])
def test_a_direction_that_points_nowhere(direction: list[float]) -> None:
    with pytest.raises(ValueError, match="a direction must be finite and have a coordinate that is not 0"):
        Feature(direction)


def test_a_direction_has_no_others_to_contrast_with() -> None:
    with pytest.raises(ValueError, match="contrast needs a class or channel"):
        Feature([1.0, 2.0], contrast=True)


def test_names() -> None:
    assert str(Feature(3)) == "class 3"
    assert str(Feature(3, "a.b")) == "channel 3 of layer 'a.b'"
    assert str(Feature(3, "a", neuron=True)) == "the central neuron of channel 3 of layer 'a'"
    assert str(Feature([1.0, 2.0], "a")) == "a direction of layer 'a'"
