"""Components that Captum's LIME needs for images: square superpixels, a similarity function and a ridge regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spade_fast._util.extras import extra_for

with extra_for("LIME needs"):
    from captum._utils.models.model import Model

_KERNEL_WIDTH = 0.25
_PENALTY = 1.0


def squares(image: Tensor, across: int) -> Tensor:
    """Number the superpixels of a grid of about ``across x across`` squares.

    Parameters
    ----------
    image : Tensor ``[1, C, H, W]``
    across : int
        Squares per row; one per pixel if a row has fewer pixels.

    Returns
    -------
    Tensor ``[1, 1, H, W]``, int64
        Captum's feature mask: the superpixel of each pixel.
    """
    height, width = image.shape[-2:]
    rows, columns = (torch.arange(size, device=image.device) * min(across, size) // size for size in (height, width))
    return (rows[:, None] * min(across, width) + columns)[None, None]


def nearness(original: Any, perturbed: Any, kept: Tensor, **_: Any) -> Tensor:
    """Weight a perturbed image by the cosine distance of its superpixels ``[1, features]`` from the whole image."""
    distance = 1 - kept.double().mean().sqrt()
    return torch.exp(-(distance**2) / _KERNEL_WIDTH**2).sqrt()


class Ridge(Model):
    """Weighted ridge regression with an intercept, in closed form.

    This is the model of the LIME authors' image explainer, with the same penalty. Captum's default, a lasso, needs
    scikit-learn.
    """

    def __init__(self) -> None:
        self._coefficients = torch.zeros(0)

    def fit(self, train_data: Any, **_: Any) -> None:
        """Fit to batches of features ``[N, features]``, outcomes ``[N]`` and weights ``[N]``."""
        x, y, weight = (torch.cat([part.double() for part in parts]) for parts in zip(*train_data, strict=True))
        weight, y = weight.flatten(), y.flatten()
        share = weight / weight.sum()
        x, y = x - share @ x, y - share @ y
        gram = x.T @ (weight[:, None] * x) + _PENALTY * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self._coefficients = torch.linalg.solve(gram, x.T @ (weight * y)).float()

    def representation(self) -> Tensor:
        """Return the coefficients ``[features]``."""
        return self._coefficients

    def __call__(self, x: Any) -> Any:
        return x @ self._coefficients
