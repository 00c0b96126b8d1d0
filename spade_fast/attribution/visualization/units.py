"""The units of a layer in a photo: what each contributes to the decision, and where the photo excites it most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.modes import evaluation_mode
from spade_fast._util.module_names import named_module
from spade_fast.attribution.layouts import Layouts
from spade_fast.attribution.visualization.feature_maps import has_positions
from spade_fast.attribution.visualization.features import channel_dimension

WINDOW = 3 / 8  # sides of a crop, as a share of the photo's
_ROUNDING = 16  # units in the last place by which equal positions of a feature map may differ


@dataclass(frozen=True)
class Units:
    """The channels of a layer of a network or trace in one photo.

    Attributes
    ----------
    maps : Tensor ``[C, H, W]``
        Their activations, on the CPU, in at least float32.
    contributions : Tensor ``[C]``
        What they contribute to a class where the photo excites them: activation x gradient of the class's logit, summed
        over the positions with an activation above 0.
    """

    maps: Tensor
    contributions: Tensor

    @property
    def activations(self) -> Tensor:
        """Mean activations over the positions ``[C]``."""
        return self.maps.mean((1, 2))

    @property
    def alive(self) -> Tensor:
        """Whether the photo changes them: whether their maps differ between positions, boolean ``[C]``."""
        low, high = self.maps.aminmax(dim=2)
        low, high = low.amin(1), high.amax(1)
        return high - low > _ROUNDING * torch.finfo(self.maps.dtype).eps * torch.maximum(low.abs(), high.abs())

    @property
    def shares(self) -> Tensor:
        """Contributions as shares of all positive ones ``[C]``; negative for units that speak against the class."""
        return self.contributions / self.contributions.clamp(min=0).sum().clamp(min=torch.finfo(self.maps.dtype).tiny)

    def strongest(self, count: int) -> list[int]:
        """Return up to `count` living units with positive contributions, the largest first."""
        order = self.contributions.argsort(descending=True, stable=True).tolist()
        carry = self.alive & (self.contributions > 0)
        return [unit for unit in order if carry[unit]][:count]


def read_units(model: nn.Module, layer: str, image: Tensor, target: int) -> Units:
    """Run a network on a photo, and read the channels of a layer.

    Parameters
    ----------
    model : nn.Module
        Returns logits ``[1, classes]``. In a ``with trace.applied(model):`` block it is the trace.
    layer : str
        Name of a module that returns a feature map with several positions. If it is called several times, the last
        call counts.
    image : Tensor ``[1, C, H, W]``
    target : int
        The class to whose logit the units contribute.

    Raises
    ------
    ValueError
        The layer does not exist or is not called, or returns something else, or the logits have no gradient with
        respect to it.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution.visualization.units import read_units
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> units = read_units(model, "0", torch.randn(1, 3, 6, 6), target=5)
    >>> units.maps.shape, int(units.contributions.abs().argmax())
    (torch.Size([8, 4, 4]), 5)
    """
    place = f"layer {layer!r}"
    output: Any = None

    def read(module: nn.Module, inputs: object, returned: Any) -> Any:
        nonlocal output
        output = returned
        return output.clone() if isinstance(output, Tensor) else None  # what follows may change it in place

    given = image.detach().clone().requires_grad_()
    hook = named_module(model, layer).register_forward_hook(read)
    try:
        with evaluation_mode(model), torch.enable_grad(), Layouts(given) as layouts:
            logits = model(given)
            channels = channel_dimension(place, output, layouts)
    finally:
        hook.remove()
    if not has_positions(output, channels):
        raise InvalidValueError(
            f"units are the channels of a feature map with several positions, but {place} returns {list(output.shape)}"
        )
    gradient = None
    if logits.requires_grad and output.requires_grad:
        (gradient,) = torch.autograd.grad(logits[0, target], output, allow_unused=True)
    if gradient is None:
        raise InvalidValueError(f"the logits have no gradient with respect to {place}")
    kind = torch.promote_types(output.dtype, torch.float32)
    maps, gradients = (one.detach().movedim(channels, 1)[0].to("cpu", kind) for one in (output, gradient))
    return Units(maps, (maps.clamp(min=0) * gradients).sum((1, 2)))


def exciting_crop(photo: np.ndarray, activations: Tensor) -> np.ndarray:
    """Return the window of a photo around the most exciting position of a feature map.

    Parameters
    ----------
    photo : ndarray ``[H, W, ...]``
        The photo as the network sees it.
    activations : Tensor ``[h, w]``
        A unit's map.

    Returns
    -------
    ndarray ``[WINDOW * H, WINDOW * W, ...]``
        Moved where it would leave the photo.
    """
    place = divmod(int(activations.argmax()), activations.shape[1])
    window = []
    for position, positions, side in zip(place, activations.shape, photo.shape, strict=False):
        length = max(round(WINDOW * side), 1)
        start = round((position + 0.5) / positions * side - length / 2)
        start = min(max(start, 0), side - length)
        window.append(slice(start, start + length))
    return photo[tuple(window)]
