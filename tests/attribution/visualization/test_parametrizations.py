"""Pictures by their Fourier coefficients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spade_fast.attribution.visualization.natural_images import magnitudes
from spade_fast.attribution.visualization.parametrizations import Fourier, Maco

SIZES = [(12, 10), (9, 7), (8, 5), (1, 6), (7, 1), (2, 2)]


def changed(made: Maco | Fourier) -> None:
    """Put random numbers in place of the first coefficients."""
    made.coefficients = 3 * torch.randn_like(made.coefficients)


def twins(height: int, width: int) -> Tensor:
    """Which coefficients of a half spectrum are not their own opposites ``[H, W // 2 + 1]``."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width // 2 + 1)
    return ((2 * rows) % height != 0) | ((2 * columns) % width != 0)


@pytest.mark.parametrize("size", SIZES)
def test_phases_never_change_magnitudes(size: tuple[int, int]) -> None:
    made = Maco(2, 3, size, torch.Generator().manual_seed(0))
    for _ in range(2):
        found = torch.fft.rfft2(made.logits(), norm="forward").abs()
        expected = magnitudes(3, size).expand_as(found)
        free = twins(*size)
        torch.testing.assert_close(found[..., free], expected[..., free], rtol=1e-4, atol=1e-6)
        assert (found[..., ~free] <= expected[..., ~free] + 1e-5).all()
        changed(made)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [Maco, Fourier])
def test_a_photo_is_what_it_begins_with(kind: type[Maco | Fourier], size: tuple[int, int]) -> None:
    photo = 0.1 + 0.8 * torch.rand(3, *size)
    made = kind(2, 3, size, torch.Generator().manual_seed(0))
    made.begin_with(photo)
    torch.testing.assert_close(made.pictures(), photo.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


def test_what_is_unnatural_is_penalised() -> None:
    made = Fourier(1, 3, (8, 8), torch.Generator().manual_seed(0))
    grey = torch.full((1, 3, 8, 8), 0.5)
    stripes = grey.clone()
    stripes[..., ::2] = 0.6
    black = torch.full_like(grey, 0.01)
    assert made.penalty(grey) == 0
    torch.testing.assert_close(made.penalty(stripes), torch.tensor([0.1]))
    assert made.penalty(black) == pytest.approx(0.5 * (torch.logit(torch.tensor(0.99)) - 2).item() ** 2, rel=1e-4)
