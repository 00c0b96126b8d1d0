"""Feature visualisation: an image that maximises the activation of a class, channel or neuron of a network or trace.

After Olah, Mordvintsev and Schubert, "Feature Visualization" (Distill, 2017): gradient ascent on the Fourier
coefficients of an image with decorrelated colours, which is slightly shifted, rotated and scaled at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.checks import integer, nearest
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.modes import evaluation_mode
from spade_fast._util.progress import Progress
from spade_fast.attribution.layouts import Layouts

# Square root of the covariance of ImageNet's colours, scaled so that the largest column norm is 1 (Olah et al., 2017).
_COLOURS = ((0.563, 0.195, 0.043), (0.584, 0.0, -0.108), (0.584, -0.195, 0.065))
_CHANNEL = 0.59  # standard deviation of a channel, as the mean over those of the colours
_START = 0.01  # standard deviation of the initial coefficients
_CONTRAST = 4.0  # divides the image before the sigmoid
_SHIFT = 12  # largest shift in each direction, in pixels
_SCALES = (0.9, 1.1)
_DEGREES = 10.0


@dataclass(frozen=True)
class Feature:
    """The activation that an image is to maximise.

    Attributes
    ----------
    index : int
        A class if `layer` is None, otherwise a channel of the layer (a feature, if the layer returns tokens).
    layer : str or None
        Name of a module of the model; None for the model's output.
    neuron : bool
        Maximise only the central neuron of the feature map instead of the mean over all positions.

    Examples
    --------
    >>> from spade_fast import Feature
    >>> Feature(3, layer="layer4.1.conv2", neuron=True)
    Feature(index=3, layer='layer4.1.conv2', neuron=True)
    """

    index: int
    layer: str | None = None
    neuron: bool = False


def visualize(
    model: nn.Module,
    feature: Feature,
    *,
    size: tuple[int, int] = (224, 224),
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    steps: int = 512,
    learning_rate: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Optimise an image to maximise the activation of a feature (Olah et al., Distill 2017).

    Parameters
    ----------
    model : nn.Module
        A network with one image input ``[N, C, H, W]``. In a ``with trace.applied(model):`` block it is the trace.
    feature : Feature
        The activation to maximise.
    size : (int, int)
        Height and width of the image in pixels.
    mean, std : sequence of float
        Normalisation of the model's input for colours between 0 and 1, one number for each of its C channels.
    steps : int
        Number of steps of Adam.
    learning_rate : float
        Learning rate of Adam.
    seed : int
        Seed of the initial image and of all transformations; torch's global random state is neither used nor changed.
    progress : callable, optional
        Called as ``progress("visualize", step, steps)``.

    Returns
    -------
    Tensor ``[C, H, W]``
        Colours between 0 and 1, on the CPU.

    Raises
    ------
    ValueError
        The layer or index does not exist, the layer does not return feature maps, tokens or classes, a setting is out
        of range, or `mean` and `std` differ in length.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import Feature, visualize
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> visualize(model, Feature(5), size=(32, 32), steps=4).shape
    torch.Size([3, 32, 32])
    """
    if not 0 <= integer("seed", seed) < 1 << 63:
        raise InvalidValueError(f"seed must lie between 0 and 2**63 - 1, got {seed}")
    if steps < 0 or learning_rate <= 0 or min(size) < 1:
        raise InvalidValueError(
            f"steps must be at least 0, and learning_rate and size positive, got {steps}, {learning_rate}, {size}"
        )
    if len(mean) != len(std) or not mean:
        raise InvalidValueError(f"mean and std must have one number per channel, got {len(mean)} and {len(std)}")
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    shape = (len(mean), height, width // 2 + 1, 2)
    spectrum = (_START * torch.randn(shape, generator=generator)).to(device).requires_grad_()
    centre, spread = (torch.tensor(list(values), device=device).view(1, -1, 1, 1) for values in (mean, std))
    optimizer = torch.optim.Adam([spectrum], learning_rate)
    with _watched(model, feature) as excitement, torch.enable_grad():
        for step in range(steps):
            seen = _moved(_picture(spectrum, size)[None], generator)
            gain = excitement(((seen - centre) / spread).to(dtype))
            (spectrum.grad,) = torch.autograd.grad(-gain, spectrum)
            optimizer.step()
            if progress is not None:
                progress("visualize", step + 1, steps)
    return _picture(spectrum.detach(), size).cpu()


def _picture(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert Fourier coefficients to colours ``[C, H, W]``, with amplitudes of 1 / frequency as in natural images."""
    rows = torch.fft.fftfreq(size[0], device=spectrum.device)[:, None]
    columns = torch.fft.rfftfreq(size[1], device=spectrum.device)[None]
    frequency = torch.sqrt(rows**2 + columns**2).clamp(min=1 / max(size))
    amplitudes = torch.view_as_complex(spectrum) / frequency
    channels = torch.fft.irfft2(amplitudes, s=size, norm="ortho") / _CONTRAST
    # Other channels than colours are independent, with the same mean variance.
    colours = torch.tensor(_COLOURS) if len(channels) == 3 else torch.eye(len(channels)) * _CHANNEL
    colours = colours.to(spectrum.device)
    return torch.sigmoid(torch.einsum("rc,chw->rhw", colours, channels))


def _moved(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale and rotate an image ``[1, C, H, W]`` slightly, with reflection at its borders."""
    shift_x, shift_y, scale, turn = (2 * torch.rand(4, generator=generator) - 1).tolist()
    factor = math.exp((math.log(_SCALES[1] / _SCALES[0]) * scale + math.log(_SCALES[0] * _SCALES[1])) / 2)
    angle = math.radians(_DEGREES * turn)
    height, width = image.shape[-2:]
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    transform = image.new_tensor(
        [
            [cosine, -sine * height / width, 2 * _SHIFT * shift_x / width],
            [sine * width / height, cosine, 2 * _SHIFT * shift_y / height],
        ]
    )
    grid = F.affine_grid(transform[None], list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


@contextmanager
def _watched(model: nn.Module, feature: Feature) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from images to the feature's mean activation, with the model in evaluation mode."""
    outputs: list[tuple[Any, Any]] = []
    modules = dict(model.named_modules())
    if feature.layer is not None and feature.layer not in modules:
        near = nearest(feature.layer, filter(None, modules))
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise InvalidValueError(f"the model has no layer {feature.layer!r}{hint}")
    watched = model if feature.layer is None else modules[feature.layer]

    def read(module: nn.Module, inputs: object, output: Any) -> None:
        # What follows may change the output in place.
        outputs.append((output, output.clone() if isinstance(output, Tensor) else output))

    hook = watched.register_forward_hook(read)

    def excitement(images: Tensor) -> Tensor:
        outputs.clear()
        with Layouts(images) as layouts:
            model(images)
        output, value = outputs[-1] if outputs else (None, images)
        if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4):
            given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InvalidValueError(f"{_place(feature)} returns {given}, not feature maps, tokens or classes")
        return _activation(value, feature, layouts.channels(output)).mean()

    try:
        with evaluation_mode(model):
            yield excitement
    finally:
        hook.remove()


def _place(feature: Feature) -> str:
    return "the model" if feature.layer is None else f"layer {feature.layer!r}"


def _activation(output: Tensor, feature: Feature, channels: int | None) -> Tensor:
    if output.dim() == 4 and channels is None:
        raise InvalidValueError(
            f"{_place(feature)} returns {list(output.shape)}, whose order of dimensions the network does not tell"
        )
    # Tokens have their features last.
    values = output.movedim(channels or -1, 1) if output.dim() > 2 else output
    if not 0 <= feature.index < values.shape[1]:
        raise InvalidValueError(f"index must lie between 0 and {values.shape[1] - 1}, got {feature.index}")
    chosen = values[:, feature.index]
    if not feature.neuron:
        return chosen
    if chosen.dim() != 3:
        raise InvalidValueError(
            f"a neuron needs a layer whose output is a feature map, but {_place(feature)} returns {list(output.shape)}"
        )
    return chosen[:, chosen.shape[1] // 2, chosen.shape[2] // 2]
