"""Where attribution maps point: scores against a mask of the evidence."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import finite_floats, is_number, kind
from spade_fast._util.errors import InvalidTypeError, InvalidValueError

_MAPS = "samples, height, width"


def localisation_auc(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the area under the ROC curve of a map as a classifier of a mask's pixels (SPADE, arXiv 2310.04519).

    It is the probability that a random pixel inside the mask has a larger value than a random pixel outside, where
    equal values count half: 1 is perfect; 0.5 is chance, and also the score of a constant map.

    Parameters
    ----------
    maps : Tensor ``[S, H, W]``
        Floating-point and finite.
    masks : Tensor ``[S, H, W]``, bool
        True where the evidence is known to be, such as on a trojan patch.

    Returns
    -------
    Tensor ``[S]``
        NaN where a mask is empty or full.

    Raises
    ------
    TypeError, ValueError
        A tensor has the wrong type or shape, or the maps have NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.localisation_auc(torch.tensor([[[0.9, 0.3, 0.8]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, masks = (tensor.flatten(1) for tensor in _maps_and_masks(maps, masks))
    rising = maps.sort(1).values
    twice_the_ranks = torch.searchsorted(rising, maps) + torch.searchsorted(rising, maps, right=True) + 1
    inside = masks.sum(1)
    wins = (twice_the_ranks * masks).sum(1).double() / 2 - (inside * (inside + 1)).double() / 2
    return wins / (inside * (masks.shape[1] - inside))


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0) -> Tensor:
    """Determine whether the maximum of a map lies in the mask (Zhang et al., ECCV 2016, arXiv 1608.00507).

    Parameters
    ----------
    maps, masks
        As in `localisation_auc`.
    tolerance : float
        Largest distance of a maximum from the mask that still counts as a hit, in pixels (Euclidean, between centres).
        Zhang et al. use 15.

    Returns
    -------
    Tensor ``[S]``
        1 for a hit and 0 for a miss; if several pixels share the maximum, the share of them that hit. NaN where a mask
        is empty.

    Raises
    ------
    TypeError, ValueError
        As in `localisation_auc`; or the tolerance is not a number, or is negative or infinite.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.pointing_game(torch.tensor([[[0.9, 0.3, 0.8]]]), torch.tensor([[[True, True, False]]]))
    tensor([1.], dtype=torch.float64)
    """
    maps, masks = _maps_and_masks(maps, masks)
    if not is_number(tolerance):
        raise InvalidTypeError(f"tolerance must be a number of pixels, got {tolerance!r}")
    if not 0 <= tolerance < math.inf:
        raise InvalidValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    reach = min(int(tolerance), max(maps.shape[1:]) - 1)
    offsets = torch.arange(-reach, reach + 1, device=maps.device) ** 2
    disc = (offsets[:, None] + offsets <= tolerance**2).float()
    near = F.conv2d(masks.float().unsqueeze(1), disc[None, None], padding=reach).squeeze(1) > 0.5
    largest = maps == maps.amax((1, 2), keepdim=True)
    hits = (largest & near).sum((1, 2)).double() / largest.sum((1, 2))
    return hits.masked_fill(~masks.any(2).any(1), math.nan)


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the share of a map's sum that lies inside the mask: the energy-based pointing game.

    After Wang et al. (Score-CAM, CVPR workshops 2020, arXiv 1910.01279). If the mask is the grid cell of the explained
    class, it is the score of the grid pointing game (Böhle, Fritz, Schiele, CVPR 2021, arXiv 2104.00032).

    Parameters
    ----------
    maps, masks
        As in `localisation_auc`; maps must not have negative values.

    Returns
    -------
    Tensor ``[S]``
        0 where a mask is empty, NaN where a map is zero everywhere.

    Raises
    ------
    TypeError, ValueError
        As in `localisation_auc`; or a map has negative values.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.energy_inside(torch.tensor([[[3.0, 1.0, 4.0]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, masks = _maps_and_masks(maps, masks)
    if bool((maps < 0).any()):
        raise InvalidValueError(
            "maps has negative values, for which the energy is undefined: use maps.clamp(min=0) or maps.abs()"
        )
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2))


def _maps_and_masks(maps: Any, masks: Any) -> tuple[Tensor, Tensor]:
    maps = finite_floats("maps", maps, _MAPS).double().contiguous()
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise InvalidTypeError(f"masks must be a boolean tensor, got {kind(masks)}")
    if masks.shape != maps.shape:
        raise InvalidValueError(f"masks must have the shape of maps, {list(maps.shape)}, got {list(masks.shape)}")
    return maps, masks.to(maps.device)
