"""Pictures by their Fourier coefficients: all of them free, or only their phases."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError
from spade_fast.attribution.visualization.natural_images import colours, decorrelated, magnitudes
from spade_fast.attribution.visualization.views import Views

_SAME = 1e-4  # difference of colours that is none


class Parametrization(ABC):
    """Pictures as functions of the coefficients that are optimised.

    Attributes
    ----------
    coefficients : Tensor
        What gradient ascent changes.
    """

    learning_rate: float
    views: Views
    coefficients: Tensor

    def __init__(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> None:
        """Begin with `count` random pictures ``[channels, *size]``."""
        self._shape = (count, channels, size[0], size[1] // 2 + 1)
        self._size = size

    @abstractmethod
    def begin_with(self, picture: Tensor) -> None:
        """Begin with a given picture ``[C, H, W]`` instead."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Return the pictures as decorrelated logits ``[N, C, H, W]``."""

    def pictures(self) -> Tensor:
        """Return the pictures as colours between 0 and 1 ``[N, C, H, W]``."""
        return colours(self.logits())

    def penalty(self, pictures: Tensor) -> Tensor:
        """Return what makes pictures unnatural, one number each ``[N]``, as a share of their activation."""
        return pictures.new_zeros(len(pictures))


class Maco(Parametrization):
    """Magnitudes as in natural images, only the phases are free (Fel et al., NeurIPS 2023, arXiv 2306.06805).

    A coefficient that is its own opposite frequency, such as the mean, is real; it is the magnitude times the cosine of
    the phase. Unlike the paper's, views also have a random resolution, and are uniform in place and size.
    """

    learning_rate = 1.0
    _LEARNING_RATE_OF_PHOTOS = 0.1  # keeps the photo recognisable
    views = Views(zoom=(0.6, 1.0), shift=None, turn=0.0, resolution=0.28, noise=0.1)

    def __init__(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__(count, channels, size, generator)
        self.coefficients = math.pi * (2 * torch.rand(self._shape, generator=generator) - 1)
        self._magnitudes = magnitudes(channels, size)

    def begin_with(self, picture: Tensor) -> None:
        if picture[0].numel() > 1 and bool(((picture - picture[:, :1, :1]).abs() < _SAME).all()):
            raise InvalidValueError(
                "start has a single colour, and so no magnitudes to keep: give another photo, or method 'fourier'"
            )
        spectrum = torch.fft.rfft2(decorrelated(picture[None]), norm="forward")
        self._magnitudes = spectrum.abs()[0]
        self.learning_rate = self._LEARNING_RATE_OF_PHOTOS
        self.coefficients = spectrum.angle().expand(self._shape).clone()

    def logits(self) -> Tensor:
        phases = self.coefficients
        spectrum = torch.polar(self._magnitudes.to(phases).expand_as(phases), phases)
        return torch.fft.irfft2(_of_real_pictures(spectrum, self._size[1]), s=self._size, norm="forward")


def _of_real_pictures(spectrum: Tensor, width: int) -> Tensor:
    """Return spectra ``[N, C, H, W // 2 + 1]`` in which opposite frequencies are conjugate, as of real pictures.

    Of two opposite ones in a column the first counts, of one that is its own opposite the real part.
    """
    rows = torch.arange(spectrum.shape[-2], device=spectrum.device)[:, None]
    opposite = -rows % len(rows)
    columns = [0] if width % 2 else [0, width // 2]
    both = spectrum[..., columns]
    mirrored = both[..., opposite[:, 0], :].conj()
    made = spectrum.clone()
    made[..., columns] = torch.where(rows < opposite, both, torch.where(rows > opposite, mirrored, both.real + 0j))
    return made


class Fourier(Parametrization):
    """All coefficients are free, scaled as in natural images (Olah, Mordvintsev and Schubert, Distill 2017)."""

    learning_rate = 0.05
    views = Views(zoom=(0.9, 1.1), shift=0.05, turn=10.0, resolution=1.0, noise=0.0)
    _START = 0.01  # contrast of the first picture, as a share of natural images'
    _RANGE = 2.0  # logits beyond which colours are nearly black or white
    _VARIATION, _SATURATION = 1.0, 0.5  # weights of the penalties

    def __init__(self, count: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__(count, channels, size, generator)
        self.coefficients = self._START * torch.randn(*self._shape, 2, generator=generator)
        self._magnitudes = magnitudes(channels, size)

    def begin_with(self, picture: Tensor) -> None:
        spectrum = torch.fft.rfft2(decorrelated(picture[None]), norm="forward") / self._magnitudes
        self.coefficients = torch.view_as_real(spectrum.expand(self._shape)).clone()

    def logits(self) -> Tensor:
        spectrum = torch.view_as_complex(self.coefficients) * self._magnitudes.to(self.coefficients)
        return torch.fft.irfft2(spectrum, s=self._size, norm="forward")

    def penalty(self, pictures: Tensor) -> Tensor:
        """Return total variation, and how far logits of colours lie beyond 2; as shares of the activation."""
        across, down = (pictures.diff(dim=dim).abs().flatten(1).mean(1) for dim in (-1, -2))
        excess = (torch.logit(pictures, eps=1e-4).abs() - self._RANGE).clamp(min=0)
        return self._VARIATION * (across + down) + self._SATURATION * excess.square().flatten(1).mean(1)


PARAMETRIZATIONS: Mapping[str, type[Parametrization]] = {"maco": Maco, "fourier": Fourier}
