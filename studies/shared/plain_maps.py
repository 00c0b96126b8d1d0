"""Maps that no network has made: what any attribution method should be better than."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 1 / 4  # standard deviation of the centre map, as a share of the side


def edges(image: Tensor) -> Tensor:
    """Return the strength of edges, ``[H, W]``, in an image ``[1, C, H, W]``: Sobel gradients, summed over channels.

    After Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, who compare maps with an edge detector.
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    filters = torch.stack([across, across.T])[:, None]
    gradients = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate").transpose(0, 1), filters)
    return gradients.square().sum(1).sqrt().sum(0)


def centre(image: Tensor) -> Tensor:
    """Return a Gaussian around the middle of an image ``[1, C, H, W]``, as a map ``[H, W]``."""
    rows, columns = (torch.linspace(-0.5, 0.5, side) for side in image.shape[2:])
    return torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * _WIDTH**2))


PLAIN_MAPS = {"edges": edges, "centre": centre}
