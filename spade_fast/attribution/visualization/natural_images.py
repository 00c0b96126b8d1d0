"""Spectrum of natural images: how much of each frequency photos have, in decorrelated colours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Square root of the covariance of ImageNet's colours, scaled so that the largest column norm is 1 (Olah et al., 2017).
_COLOURS = ((0.563, 0.195, 0.043), (0.584, 0.0, -0.108), (0.584, -0.195, 0.065))
_CHANNEL = 0.59  # standard deviation of a channel, as the mean over those of the colours
_LEAST = 0.02  # colours are kept this far from black and white before the logit


def colours(pictures: Tensor) -> Tensor:
    """Convert decorrelated logits ``[N, C, H, W]`` to colours between 0 and 1."""
    with torch.autocast(pictures.device.type, enabled=False):
        return torch.sigmoid(torch.einsum("rc,nchw->nrhw", _mixing(pictures.shape[1]).to(pictures), pictures))


def decorrelated(pictures: Tensor) -> Tensor:
    """Convert colours between 0 and 1 to decorrelated logits: the inverse of `colours`."""
    logits = torch.logit(pictures.clamp(_LEAST, 1 - _LEAST))
    with torch.autocast(pictures.device.type, enabled=False):
        return torch.einsum("rc,nchw->nrhw", torch.linalg.inv(_mixing(pictures.shape[1])).to(pictures), logits)


def magnitudes(channels: int, size: tuple[int, int]) -> Tensor:
    """Return the magnitudes of the Fourier coefficients of natural images, averaged over photos and directions.

    Parameters
    ----------
    channels
        Number of channels; other channels than three colours get the magnitudes of brightness.
    size
        Height and width in pixels.

    Returns
    -------
    Tensor ``[channels, H, W // 2 + 1]``
        In the units of ``torch.fft.rfft2(..., norm="forward")`` of decorrelated logits.
    """
    height, width = size
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    cycles = max(size) * torch.sqrt(rows**2 + columns**2)
    frequencies, products = _table()
    logs = np.log(frequencies[1:])
    # Between the table's frequencies, and beyond them as 1 / frequency.
    found = np.stack([np.interp(cycles.clamp(min=1).log().numpy(), logs, row) for row in products[:, 1:]])
    found /= cycles.clamp(min=1).numpy()
    # A rectangle has fewer frequencies than its square, and the same contrast.
    found *= (max(size) ** 2 / (height * width)) ** 0.5
    found[:, 0, 0] = products[:, 0]
    chosen = found if channels == 3 else np.repeat(found[:1], channels, 0)
    return torch.from_numpy(chosen).float()


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies in cycles per side ``[K]``, the first 0, and frequency x magnitude by colour ``[3, K]``."""
    table = np.loadtxt(Path(__file__).parent / "natural_images.csv", delimiter=",")
    products = table[:, 1:].T * np.maximum(table[:, 0], 1)
    return table[:, 0], products


def _mixing(channels: int) -> Tensor:
    # Other channels than colours are independent, with the same mean variance.
    return torch.tensor(_COLOURS) if channels == 3 else torch.eye(channels) * _CHANNEL
