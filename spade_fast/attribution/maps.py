"""Maps ``[H, W]`` made from attributions, and means of maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import finite_floats
from spade_fast._util.errors import InvalidValueError


def to_map(attributions: Tensor, image: Tensor) -> Tensor:
    """Reduce attributions to one map ``[H, W]``: absolute values summed over channels, resized to the image."""
    # Half precision has no values for the sums of large attributions.
    attributions = attributions.detach().to(torch.promote_types(attributions.dtype, torch.float32))
    strength = attributions.abs().sum(1, keepdim=True)
    if strength.shape[-2:] != image.shape[-2:]:
        strength = F.interpolate(strength, image.shape[-2:], mode="bicubic", align_corners=False).clamp(min=0)
    return strength[0, 0]


def mean_map(maps: Sequence[Tensor]) -> Tensor:
    """Compute the mean of attribution maps, each divided by its sum, so that all have the same weight.

    Parameters
    ----------
    maps : sequence of Tensor ``[H, W]``
        Non-negative maps, such as those of one method on several traces. A map of zeros stays zero.

    Returns
    -------
    Tensor ``[H, W]``
        In float64 if a map is, otherwise in float32; on the first map's device.

    Raises
    ------
    TypeError, ValueError
        No map is given; or a map is not a floating-point tensor ``[H, W]``, has NaN, infinite or negative values, or
        has another shape than the first.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import mean_map
    >>> mean_map([torch.tensor([[1.0, 3.0]]), torch.tensor([[20.0, 0.0]])])
    tensor([[0.6250, 0.3750]])
    """
    if not len(maps):
        raise InvalidValueError("maps must have at least one map")
    total = torch.zeros(())
    dtype = torch.float32
    for index, one in enumerate(maps):
        one = finite_floats(f"maps[{index}]", one, "H, W")
        if index and one.shape != total.shape:
            raise InvalidValueError(
                f"maps must have one shape, but maps[0] has {list(total.shape)} and maps[{index}] {list(one.shape)}"
            )
        if bool((one < 0).any()):
            raise InvalidValueError(f"maps[{index}] has negative values")
        dtype = torch.promote_types(dtype, one.dtype)
        largest = one.max().double()
        relative = one.double() / torch.where(largest > 0, largest, 1)  # whose sum cannot overflow
        share = relative / relative.sum().clamp(min=1)
        total = total + share.to(total.device) if index else share
    return (total / len(maps)).to(dtype)
