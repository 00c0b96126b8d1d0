"""Random views of a picture: what the network sees of it at one step of its optimisation."""

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
        Views have a random resolution, from this share of the network's to all of it: what excites the network is to be
        visible from afar.
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
        number = len(pictures) * count
        draws = torch.rand(number, 5, generator=generator)
        transforms = torch.stack([self._transform(one, pictures.shape[-2:]) for one in draws.tolist()])
        grid = F.affine_grid(transforms.to(pictures), [number, pictures.shape[1], *size], align_corners=False)
        source = (pictures - _GREY).repeat_interleave(count, 0)
        views = F.grid_sample(source, grid, align_corners=False) + _GREY
        if self.resolution < 1:
            shares = [self.resolution**draw for draw in draws[:, 4].tolist()]
            views = torch.cat([_blurred(view, share) for view, share in zip(views.split(1), shares, strict=True)])
        return views + self.noise * torch.randn(views.shape, generator=generator).to(views)

    def _transform(self, draws: list[float], size: torch.Size) -> Tensor:
        """Return the affine transform ``[2, 3]`` from a view to the picture, in units of half of its sides."""
        low, high = self.zoom
        side = low * (high / low) ** draws[0]
        reach = max(1 - side, 0.0) if self.shift is None else 2 * self.shift
        x, y, turn = (2 * draw - 1 for draw in draws[1:4])
        angle, (height, width) = math.radians(self.turn * turn), size
        cosine, sine = side * math.cos(angle), side * math.sin(angle)
        return torch.tensor([[cosine, -sine * height / width, reach * x], [sine * width / height, cosine, reach * y]])


def _blurred(view: Tensor, share: float) -> Tensor:
    """Return a view reduced to a share of its resolution and enlarged again."""
    height, width = view.shape[-2:]
    small = (max(round(share * height), 1), max(round(share * width), 1))
    reduced = F.interpolate(view, size=small, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(reduced, size=(height, width), mode="bilinear", align_corners=False)
