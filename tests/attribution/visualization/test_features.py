"""What a picture is to excite: classes, channels, neurons, directions, sums and differences of them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError
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
        torch.testing.assert_close(read(images)[1], torch.stack([maps[:, 4].mean((1, 2)), classes[:, 2]]))
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


@pytest.mark.parametrize(
    "index", ["3", None, True, [[1.0]], 2.5, [10**400, 1], torch.ones(2, device="meta"), torch.tensor(1)]
)
def test_an_index_of_the_wrong_type(index: object) -> None:
    with pytest.raises(TypeError, match="index must be an integer or the coordinates of a direction"):
        Feature(index)


@pytest.mark.parametrize(("attribute", "value"), [("layer", 0), ("layer", ["0"]), ("neuron", "no"), ("contrast", 1)])
def test_an_attribute_of_the_wrong_type(attribute: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"{attribute} must be .*, got {re.escape(repr(value))}"):
        Feature(0, **{attribute: value})


@pytest.mark.parametrize("length", [1e-320, 1e-30, 1e30, 1e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_where_a_direction_points_matters(network: nn.Module, length: float, dtype: torch.dtype) -> None:
    images, model = torch.randn(2, 3, 6, 6).to(dtype), network.to(dtype)
    expected = activations(model, [Feature([0.0, 1.0, 1.0, 0.0])], images)
    found = activations(model, [Feature([0.0, length, length, 0.0])], images)
    torch.testing.assert_close(found, expected)


class Failing(nn.Conv2d):
    """Fails, as networks do that check the size of their input or take one image only."""

    def __init__(self, error: Exception, most: int) -> None:
        super().__init__(3, 2, 1)
        self.error, self.most = error, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("kind", [AssertionError, ValueError, TypeError, RuntimeError])
def test_whatever_a_network_raises_is_one_error(kind: type[Exception]) -> None:
    images = torch.rand(2, 3, 6, 7)
    with pytest.raises(
        InvalidValueError,
        match=r"the model cannot take images of 6 x 7 pixels and 3 channels \(the length of mean\): expected 8",
    ):
        activations(Failing(kind("expected 8"), 0), [Feature(0)], images)
    with pytest.raises(
        InvalidValueError, match=r"the model cannot take 2 images of 6 x 7 pixels and 3 channels .*: one at a time"
    ):
        activations(Failing(kind("one at a time"), 1), [Feature(0)], images)


def test_memory_that_runs_out_is_not_the_size_of_the_images() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        activations(Failing(torch.OutOfMemoryError("out"), 0), [Feature(0)], torch.rand(1, 3, 6, 6))


def test_an_output_that_is_not_one_per_image(network: nn.Module) -> None:
    network.register_forward_hook(lambda module, inputs, output: output.mean(0, keepdim=True))
    with pytest.raises(ValueError, match=r"the model returns \[1, 4\] for 2 images, not one row for each"):
        activations(network, [Feature(0)], torch.rand(2, 3, 6, 6))


@pytest.mark.parametrize(
    ("output", "message"),
    [(lambda y: None, "the model is not called .*, or returns None"), (lambda y: y[:, :0], r"returns \[1, 0\]")],
)
def test_an_output_with_nothing_in_it(network: nn.Module, output: Callable[[Tensor], object], message: str) -> None:
    class Changed(nn.Module):
        def forward(self, x: Tensor) -> object:
            return output(network(x))

    with pytest.raises(ValueError, match=message):
        activations(Changed(), [Feature(0)], torch.rand(1, 3, 6, 6))


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
