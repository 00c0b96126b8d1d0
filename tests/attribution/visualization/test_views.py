"""Random views of a picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spade_fast.attribution.visualization.views import Views

PLAIN = Views(zoom=(1.0, 1.0), shift=None, turn=0.0, resolution=1.0, noise=0.0)


def views(looks: Views, pictures: torch.Tensor, count: int = 2, seed: int = 0) -> torch.Tensor:
    return looks.of(pictures, count, (16, 24), torch.Generator().manual_seed(seed))


def test_the_whole_picture() -> None:
    pictures = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(views(PLAIN, pictures), pictures.repeat_interleave(2, 0), rtol=0, atol=1e-5)


def test_crops_stay_inside() -> None:
    """A picture that is a ramp in both directions has views with less of it, never the grey outside."""
    ramp = torch.linspace(0, 1, 48)
    pictures = torch.stack([ramp.expand(32, 48), ramp[:32, None].expand(32, 48), torch.ones(32, 48)])[None]
    made = views(replace(PLAIN, zoom=(0.3, 0.8)), pictures, 50)
    assert made[:, 2].min() > 0.999
    spans = made[:, 0].amax((1, 2)) - made[:, 0].amin((1, 2))
    assert 0.2 < spans.min() < 0.4 and 0.65 < spans.max() < 0.8
    assert made[:, 0].mean((1, 2)).std() > 0.05 and made[:, 1].mean((1, 2)).std() > 0.03


def test_what_lies_outside_is_grey() -> None:
    made = views(replace(PLAIN, zoom=(2.0, 2.0)), torch.zeros(1, 3, 16, 24), 1)
    assert torch.equal(made[0, :, :3, :3], torch.full((3, 3, 3), 0.5)) and made[0, :, 8, 12].max() == 0


def test_turns_keep_angles() -> None:
    """A centred disc stays a disc of the same area in a picture that is not square."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    disc = 0.5 + 0.5 * (((rows - 31.5) ** 2 + (columns - 47.5) ** 2) < 400).expand(1, 3, 64, 96)
    looks = replace(PLAIN, turn=180.0, shift=0.0)
    made = looks.of(disc, 8, (64, 96), torch.Generator().manual_seed(0))
    assert (made - disc).abs().mean() < 0.01


def test_a_disc_stays_round_in_views_of_other_proportions() -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    disc = (((rows - 31.5) ** 2 + (columns - 47.5) ** 2) < 144).float().expand(1, 3, 64, 96)
    for size in ((32, 32), (32, 16), (20, 60)):
        made = replace(PLAIN, shift=0.0).of(disc, 1, size, torch.Generator().manual_seed(0))[0, 0] > 0.75
        height, width = int(made.any(1).sum()), int(made.any(0).sum())
        assert abs(height - width) <= 1 and height == pytest.approx(24 / min(64 / size[0], 96 / size[1]), abs=1)


def test_fine_detail_becomes_grey_when_reduced() -> None:
    checks = (torch.arange(100)[:, None] + torch.arange(100)).remainder(2).float().expand(1, 3, 100, 100)
    made = PLAIN.of(checks, 1, (30, 30), torch.Generator().manual_seed(0))
    torch.testing.assert_close(made[..., 1:-1, 1:-1], torch.full((1, 3, 28, 28), 0.5), rtol=0, atol=0.05)


def test_resolution_and_noise() -> None:
    pictures = torch.rand(1, 3, 16, 24)
    blurred = views(replace(PLAIN, resolution=0.1), pictures, 20)
    spread = blurred.flatten(1).std(1)
    assert spread.min() < 0.15 and spread.max() > 0.2
    noisy = views(replace(PLAIN, noise=0.3), pictures, 20) - pictures
    assert 0.28 < float(noisy.std()) < 0.32


def test_the_same_views_for_the_same_seed() -> None:
    looks, pictures = Views((0.5, 1.2), 0.1, 20.0, 0.5, 0.1), torch.rand(1, 3, 8, 8)
    assert torch.equal(views(looks, pictures), views(looks, pictures))
    assert not torch.equal(views(looks, pictures), views(looks, pictures, seed=1))
