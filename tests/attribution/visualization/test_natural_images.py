"""The spectrum of natural images, and decorrelated colours."""

from __future__ import annotations

import pytest
import torch

from spade_fast.attribution.visualization.natural_images import colours, decorrelated, magnitudes


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_colours_and_logits_are_inverse(channels: int) -> None:
    pictures = 0.02 + 0.96 * torch.rand(2, channels, 5, 4)
    torch.testing.assert_close(colours(decorrelated(pictures)), pictures)


def test_magnitudes_fall_with_frequency_and_do_not_depend_on_resolution() -> None:
    small, large = magnitudes(3, (64, 64)), magnitudes(3, (512, 512))
    torch.testing.assert_close(large[:, :32, :32], small[:, :32, :32])
    assert (large[:, 0, 1:].diff() < 0).all()
    torch.testing.assert_close(large[:, 0, 256] / large[:, 0, 230], torch.full((3,), 230 / 256))


def test_the_contrast_is_that_of_photos_whatever_the_form() -> None:
    """White noise with these magnitudes has the standard deviation of logits of photos, about 2, in any rectangle."""
    for size in ((64, 64), (200, 50), (31, 90)):
        noise = torch.fft.rfft2(torch.randn(3, *size), norm="ortho")
        found = magnitudes(3, size)
        found[:, 0, 0] = 0
        made = torch.fft.irfft2(noise / noise.abs() * found, s=size, norm="forward")
        assert 1.2 < float(made[0].std()) < 2.6


def test_other_channels_are_as_bright() -> None:
    torch.testing.assert_close(magnitudes(2, (9, 12)), magnitudes(3, (9, 12))[:1].expand(2, -1, -1))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1)])
def test_the_smallest_sizes(size: tuple[int, int]) -> None:
    found = magnitudes(3, size)
    assert found.shape == (3, size[0], size[1] // 2 + 1) and found.isfinite().all()
