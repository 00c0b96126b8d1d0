"""Random draws determined by a text alone, and Gaussian noise drawn this way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError


def generator_of(text: str) -> torch.Generator:
    """Return a generator of random numbers on the CPU, seeded by a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def noise_deviation(image: Tensor, noise: float) -> Tensor:
    """Return a standard deviation given as a share of the range (maximum - minimum) of an image's values, shape []."""
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    return noise * (image.max() - image.min())


def add_noise(samples: Tensor, deviation: Tensor, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Add Gaussian noise to samples; that of a sample depends only on its name and shape, and is drawn on the CPU.

    Parameters
    ----------
    samples : Tensor ``[N, ...]``
    deviation : Tensor ``[...]``
        Standard deviation; it broadcasts to a sample.
    names
        One per sample.
    dtype
        Of the result.

    Raises
    ------
    ValueError
        The results are too large for the dtype.
    """
    shape = samples.shape[1:]
    draws = torch.stack([torch.randn(shape, generator=generator_of(name), dtype=torch.float32) for name in names])
    noisy = (samples + deviation * draws.to(samples.device)).to(dtype)
    if not bool(torch.isfinite(noisy).all()):
        raise InvalidValueError(f"noise with standard deviation {float(deviation.max()):g} is too large for {dtype}")
    return noisy
