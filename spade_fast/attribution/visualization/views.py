"""Random views of a picture, which make its optimisation robust (Olah, Mordvintsev and Schubert, Distill 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_GREY = 0.5
_CANVAS = 1.25


def canvas(view: tuple[int, int]) -> tuple[int, int]:
    """Return the size of pictures of which a network sees a random part of the size of `view` at a time."""
    return round(_CANVAS * view[0]), round(_CANVAS * view[1])


@dataclass(frozen=True)
class Views:
    """How a picture is cropped, shifted, turned, blurred and disturbed before a network sees it.

    Attributes
    ----------
    zoom : (float, float)
        Least and largest side of a view, as a share of the picture's. What lies outside the picture is grey.
    shift : float or None
        Largest shift of a view's centre in each direction, as a share of the picture's side; None: as far as the view
        stays inside the picture.
    turn : float
        Largest angle in each direction, in degrees.
    resolution : float
        Views have a random resolution, from this share of the network's to all of it, so that what excites the network
        is visible at low resolutions, too.
    noise : float
        Standard deviation of the noise added to colours between 0 and 1.
    """

    zoom: tuple[float, float]
    shift: float | None
    turn: float
    resolution: float
    noise: float

    def of(self, pictures: Tensor, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return `count` views of each picture ``[N, C, H, W]``, as ``[N * count, C, *size]``."""
        draws = torch.rand(len(pictures) * count, 5, generator=generator).tolist()
        sources = (pictures - _GREY).repeat_interleave(count, 0).split(1)
        views = torch.cat([self._view(source, size, one) for source, one in zip(sources, draws, strict=True)])
        return views + _GREY + self.noise * torch.randn(views.shape, generator=generator).to(views)

    def _view(self, picture: Tensor, size: tuple[int, int], draws: list[float]) -> Tensor:
        """Return one view ``[1, C, *size]`` of a picture ``[1, C, H, W]``, by random numbers between 0 and 1."""
        (height, width), (low, high) = picture.shape[-2:], self.zoom
        side = low * (high / low) ** draws[0]
        # The largest part of the picture in the proportions of a view has these shares of its sides.
        scale = min(height / size[0], width / size[1])
        down, across = side * scale * size[0] / height, side * scale * size[1] / width
        x, y, turn = (2 * draw - 1 for draw in draws[1:4])
        reach = [max(1 - share, 0.0) if self.shift is None else 2 * self.shift for share in (across, down)]
        angle = math.radians(self.turn * turn)
        cosine, sine = math.cos(angle), math.sin(angle)
        transform = [
            [across * cosine, -down * sine * height / width, reach[0] * x],
            [across * sine * width / height, down * cosine, reach[1] * y],
        ]
        # The picture in the resolution of the view, so that nothing between two of its pixels is left out.
        share = self.resolution ** draws[4] / (side * scale)
        reduced = (max(round(share * height), 1), max(round(share * width), 1))
        if share < 1 and reduced != (height, width):
            picture = F.interpolate(picture, size=reduced, mode="bilinear", antialias=True, align_corners=False)
        grid = F.affine_grid(torch.tensor([transform]).to(picture), [1, picture.shape[1], *size], align_corners=False)
        return F.grid_sample(picture, grid, align_corners=False)
