"""What a picture is to excite: a class, channel, neuron or direction, read from a network during its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import DeadFeatureError, InvalidTypeError, InvalidValueError, UserError
from spade_fast._util.module_names import named_module
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast._util.text import counted, first_line
from spade_fast.attribution.layouts import Layouts
from spade_fast.targets.target import Target, checked_numbers


@dataclass(frozen=True)
class Feature:
    """The activation that an image is to maximise.

    Attributes
    ----------
    index : int or sequence of float
        A class if `layer` is None, otherwise a channel of the layer (a feature, if the layer returns tokens). A
        direction in the space of all of them is given by its coordinates, one per class or channel.
    layer : str or None
        Name of a module of the model; None for the model's output.
    neuron : bool
        Maximise only the central neuron of the feature map instead of the mean over all positions.
    contrast : bool
        Subtract the mean of the other classes or channels.

    Raises
    ------
    TypeError
        `index` is neither an integer nor numbers, or another attribute has another type.
    ValueError
        A direction is not finite or 0, or has a `contrast`.

    Examples
    --------
    >>> from spade_fast import Feature
    >>> Feature(3, layer="layer4.1.conv2", neuron=True)
    Feature(index=3, layer='layer4.1.conv2', neuron=True, contrast=False)
    """

    index: int | tuple[float, ...]
    layer: str | None = None
    neuron: bool = False
    contrast: bool = False

    def __post_init__(self) -> None:
        """Check the attributes."""
        if not isinstance(self.layer, str | None):
            raise InvalidTypeError(f"layer must be the name of a module or None, got {self.layer!r}")
        for name in ("neuron", "contrast"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidTypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.index, int) and not isinstance(self.index, bool):
            return
        try:
            direction = torch.as_tensor(self.index, dtype=torch.float64)
            coordinates = tuple(direction.tolist())
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidTypeError(
                f"index must be an integer or the coordinates of a direction, got {self.index!r}"
            ) from error
        if isinstance(self.index, bool) or direction.dim() != 1:
            raise InvalidTypeError(f"index must be an integer or the coordinates of a direction, got {self.index!r}")
        if self.contrast:
            raise InvalidValueError("contrast needs a class or channel: a direction has no others")
        if not bool(direction.isfinite().all()) or not bool(direction.any()):
            raise InvalidValueError("a direction must be finite and have a coordinate that is not 0")
        object.__setattr__(self, "index", coordinates)

    def __str__(self) -> str:
        """Name the feature in messages."""
        what = "a direction" if isinstance(self.index, tuple) else str(self.index)
        if self.layer is None:
            return what if isinstance(self.index, tuple) else f"class {what}"
        channel = what if isinstance(self.index, tuple) else f"channel {what}"
        return f"{'the central neuron of ' if self.neuron else ''}{channel} of layer {self.layer!r}"

    @property
    def place(self) -> str:
        """Where it is read."""
        return "the model" if self.layer is None else f"layer {self.layer!r}"


# Of images [N, C, H, W]: the sum over the features [N], and each of them without what contrasts subtract [F, N].
Activations = Callable[[Tensor], tuple[Tensor, Tensor]]


@contextmanager
def reading(model: nn.Module, features: Sequence[Feature | Target], example: Tensor) -> Iterator[Activations]:
    """Yield a function from images to the features' activations: their sum, and each without what contrasts subtract.

    Parameters
    ----------
    model
        A network in evaluation mode.
    features
        Their activations, and the numbers of targets, are added up.
    example
        Images of the size and type that will be given ``[N, C, H, W]``: one pass tells where the channels are.

    Raises
    ------
    ValueError
        A layer or index does not exist, all weights of a channel are zero, a layer does not return feature maps, tokens
        or classes, or the network cannot take the example.
    """
    modules = dict(model.named_modules())
    outputs: dict[str | None, tuple[Any, Any]] = {}
    hooks = []
    try:
        for layer in dict.fromkeys(feature.layer for feature in features):
            called = model if layer is None else named_module(model, layer)

            def read(module: nn.Module, inputs: object, output: Any, layer: str | None = layer) -> None:
                # What follows may change the output in place.
                outputs[layer] = (output, output.clone() if isinstance(output, Tensor) else output)

            hooks.append(called.register_forward_hook(read))
        channels = {}
        with torch.no_grad(), Layouts(example) as layouts:
            _run(model, example)
            for feature in features:
                if isinstance(feature, Target):
                    continue
                output = outputs.get(feature.layer, (None, None))[0]
                channels[feature.layer] = channel_dimension(feature.place, output, layouts)
                _check(feature, output, channels[feature.layer], modules)

        def activations(images: Tensor) -> tuple[Tensor, Tensor]:
            _run(model, images)
            total, alone = images.new_zeros(()), []
            for feature in features:
                if isinstance(feature, Target):
                    alone.append(_numbers(feature, outputs, len(images)))
                    total = total + alone[-1]
                    continue
                output, dimension = outputs[feature.layer][1], channels[feature.layer]
                if len(output) != len(images):
                    raise InvalidValueError(
                        f"{feature.place} returns {list(output.shape)} for {len(images)} images, not one row for each"
                    )
                value = _activation(feature, output, dimension)
                total = total + value
                alone.append(
                    _activation(replace(feature, contrast=False), output, dimension) if feature.contrast else value
                )
            return total, torch.stack(alone)

        yield activations
    finally:
        for hook in hooks:
            hook.remove()


def channel_dimension(place: str, output: Any, layouts: Layouts) -> int:
    """Return the dimension of the output of a `place` that holds classes, channels or features of tokens."""
    if output is None:
        raise InvalidValueError(f"{place} is not called in the network's forward pass, or returns None")
    if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4):
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidValueError(f"{place} returns {given}, not feature maps, tokens or classes")
    if output.dim() < 4:
        return output.dim() - 1  # tokens have their features last
    found = layouts.channels(output)
    if found is None:
        raise InvalidValueError(
            f"{place} returns {list(output.shape)}, whose order of dimensions the network does not tell"
        )
    return found


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except UserError:
        raise
    except Exception as error:  # the network's own code may fail in any way
        if is_out_of_memory(error):
            raise
        number, size = "" if len(images) == 1 else f"{len(images)} ", " x ".join(map(str, images.shape[-2:]))
        channels = counted(images.shape[1], "channel")
        raise InvalidValueError(
            f"the model cannot take {number}images of {size} pixels and {channels} (the length of mean): "
            f"{first_line(error)}"
        ) from error


def _check(feature: Feature, output: Tensor, channels: int, modules: dict[str, nn.Module]) -> None:
    if 0 in output.shape:
        raise InvalidValueError(f"{feature.place} returns {list(output.shape)}: the images are too small for it")
    count, index = output.shape[channels], feature.index
    if isinstance(index, tuple):
        if len(index) != count:
            raise InvalidValueError(f"a direction of {feature.place} has {count} coordinates, got {len(index)}")
    elif not 0 <= index < count:
        raise InvalidValueError(f"index of {feature.place} must lie between 0 and {count - 1}, got {index}")
    if feature.neuron and output.dim() != 4:
        raise InvalidValueError(
            f"a neuron needs a layer whose output is a feature map, but {feature.place} returns {list(output.shape)}"
        )
    module = None if feature.layer is None else modules[feature.layer]
    weight = None if getattr(module, "transposed", False) else getattr(module, "weight", None)
    of_channels = weight if isinstance(weight, Tensor) and weight.dim() > 1 and len(weight) == count else None
    if isinstance(index, int) and of_channels is not None and not bool(of_channels[index].any()):
        raise DeadFeatureError(f"all weights of {feature} are zero: nothing can excite it")


def _numbers(target: Target, outputs: Mapping[str | None, tuple[Any, Any]], images: int) -> Tensor:
    """Return a target's number of each image ``[N]``."""
    if target.layer not in outputs:
        raise InvalidValueError(f"{target}: the layer does not run in the network's forward pass")
    return checked_numbers(target, target(outputs[target.layer][1]), images)


def _activation(feature: Feature, output: Tensor, channels: int) -> Tensor:
    """Return a feature's activation of each image ``[N]``."""
    values = output.movedim(channels, 1)
    if isinstance(feature.index, tuple):
        direction = torch.tensor(feature.index, dtype=torch.float64)
        direction /= direction.abs().max()  # whose squares can be neither 0 nor infinite
        chosen = torch.tensordot(values, (direction / direction.norm()).to(values), dims=([1], [0]))
    else:
        chosen = values[:, feature.index]
        if feature.contrast:
            others = values.shape[1] - 1
            chosen = chosen - (values.sum(1) - chosen) / max(others, 1)
    if feature.neuron:
        return chosen[:, chosen.shape[1] // 2, chosen.shape[2] // 2]
    return chosen.flatten(1).mean(1) if chosen.dim() > 1 else chosen
