"""The spectrum of natural images: a table for feature visualisation.

It is the mean over directions and over the photos of `training_photos`, which holds nothing of any one photo. Some of
them are also among the photos whose classes the studies of pictures show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spade_fast.attribution.visualization import natural_images
from studies.shared.photos import Photo, training_photos

TABLE = Path(natural_images.__file__).with_suffix(".csv")
SIDE = 448
LEAST_SIDE = SIDE  # smaller photos have no high frequencies
PER_OCTAVE = 3
_HEADER = """Magnitudes of the Fourier coefficients of {count} photos: means over photos and directions.
Photos: Debian package gcompris-qt-data, albums of studies/shared/photos.py, squares of {side} x {side} pixels.
Made by `python -m studies spectrum`. Units: torch.fft.fft2(norm="forward") of decorrelated logits (natural_images.py).
Columns: cycles per side, brightness, second and third decorrelated colour."""


def write_spectrum() -> Path:
    """Measure the spectrum and write the table that the package contains."""
    photos = [photo for photo in training_photos() if min(photo.image.size) >= LEAST_SIDE]
    header = _HEADER.format(count=len(photos), side=SIDE)
    np.savetxt(TABLE, spectrum(photos), fmt=["%.2f", "%.5f", "%.5f", "%.5f"], delimiter=",", header=header)
    return TABLE


def spectrum(photos: Sequence[Photo]) -> np.ndarray:
    """Return a row per frequency ``[K, 4]``: cycles per side, and the mean magnitude of each decorrelated colour."""
    total = torch.zeros(3, SIDE, SIDE)
    for photo in photos:
        total += torch.fft.fft2(natural_images.decorrelated(_square(photo.image)), norm="forward").abs()[0]
    total /= len(photos)
    cycles = SIDE * torch.sqrt(torch.fft.fftfreq(SIDE)[:, None] ** 2 + torch.fft.fftfreq(SIDE)[None] ** 2)
    rows = [[0.0, *total[:, 0, 0].tolist()]]
    octaves = np.arange(0, np.log2(SIDE / 2), 1 / PER_OCTAVE)
    for octave in octaves:
        ring = (cycles >= 2 ** (octave - 0.5 / PER_OCTAVE)) & (cycles < 2 ** (octave + 0.5 / PER_OCTAVE))
        if bool(ring.any()):
            rows.append([float(cycles[ring].mean()), *total[:, ring].mean(1).tolist()])
    return np.array(rows)


def _square(image: Image.Image) -> Tensor:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255
