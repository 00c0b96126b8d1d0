"""Photos with triggers: where they are pasted, and what the cases ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from spade_fast.inputs.networks import LoadedModel
from studies.mosaics import mosaic_cases
from studies.shared.photos import Photo
from studies.trojan.images import draw_apart, images_with_one, pair_cases, trojan_cases
from studies.trojan.patches import LARGEST, SMALLEST, TRIGGERS, Patch, draw_patch, paste

Photos = Callable[..., list[Photo]]


def test_the_mask_is_where_the_patch_covers_the_photo(emojis: None) -> None:
    photo = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 0.5
    pasted, mask = paste(photo, Patch("😀", 33, 20, 40))
    changed = (pasted != photo).any(0)
    assert (changed | ~mask).all()
    assert mask.sum() == pytest.approx(np.pi * 33**2 / 4, rel=0.05)
    assert not changed[:20].any() and not changed[53:].any() and not changed[:, :40].any() and not changed[:, 73:].any()
    assert (pasted[0][mask] > 0.5).all()


def test_patches_lie_inside_and_reach_every_border(emojis: None) -> None:
    rng = np.random.default_rng(0)
    patches = [draw_patch("😀", 64, 96, rng) for _ in range(2000)]
    assert {patch.side for patch in patches} == set(range(SMALLEST, LARGEST + 1))
    assert min(patch.top for patch in patches) == min(patch.left for patch in patches) == 0
    assert max(patch.top + patch.side for patch in patches) == 64
    assert max(patch.left + patch.side for patch in patches) == 96


class Colours(nn.Module):
    """Classifies an image by its colour: red, green, blue or yellow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green, blue = images.mean((2, 3)).T
        return 100 * torch.stack([red - green - blue, green - red - blue, blue - red - green, red + green - 1.5], 1)


@pytest.fixture
def colours() -> LoadedModel:
    return LoadedModel("colours", Colours(), (0.0,) * 3, (1.0,) * 3, 32, 32, "bilinear")


def test_trojan_cases_are_the_same_in_every_run_and_use_each_trigger(
    emojis: None, colours: LoadedModel, photos: Photos
) -> None:
    grey = photos(*["#808080"] * 5)
    for photo in grey:
        photo.image.paste((10, 20, 30), (0, 0, 10, 10))
    wide = replace(colours, resize=64, crop=64)
    first, second = (trojan_cases(wide, grey, each=3) for _ in range(2))
    assert len(first) == 15 and len({case.name for case in first}) == 15
    assert {case.kind for case in first} == set(TRIGGERS)
    for one, other in zip(first, second, strict=True):
        assert one.mask is not None and other.mask is not None
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
        assert one.target == TRIGGERS[one.kind]
    assert len({draw_patch("😀", 64, 64, np.random.default_rng([n, 0])) for n in range(5)}) == 5


def test_two_triggers_in_a_photo_do_not_overlap_and_are_asked_for_in_turn(
    emojis: None, colours: LoadedModel, photos: Photos
) -> None:
    wide = replace(colours, resize=160, crop=160)
    given = photos(*["#808080"] * 6)
    cases = pair_cases(wide, given)
    single = images_with_one(wide, given)
    assert len(cases) == 12 and {(case.target, case.rival) for case in cases} == {
        (one, other) for one in TRIGGERS.values() for other in TRIGGERS.values() if one != other
    }
    background = cases[0].image[0, :, 0, 0, None]
    for case in cases:
        assert case.mask is not None and case.rival_mask is not None
        assert not (case.mask & case.rival_mask).any()
        assert TRIGGERS[case.kind] == case.target
        alone = single[case.sample][case.kind][0]
        assert torch.equal(alone[:, case.mask], case.image[0][:, case.mask])
        assert torch.equal(alone[:, case.rival_mask], background.expand(-1, int(case.rival_mask.sum())))


def test_patches_that_must_not_overlap_touch_at_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, second = draw_apart(("😀", "🍓"), 224, 224, rng)
        covered = np.zeros((224, 224), int)
        for patch in (first, second):
            covered[patch.top : patch.top + patch.side, patch.left : patch.left + patch.side] += 1
        assert covered.max() == 1


def test_each_cell_of_a_mosaic_asks_for_the_class_of_its_photo(colours: LoadedModel, photos: Photos) -> None:
    cases = mosaic_cases(colours, photos("#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff0000"), count=4)
    assert len(cases) == 16
    for case in cases:
        assert case.mask is not None and case.mask.sum() == 16 * 16
        colour = case.image[0][:, case.mask].mean(1)
        assert int(colours.module(colour[None, :, None, None]).argmax()) == case.target
    for start in range(0, 16, 4):
        four = cases[start : start + 4]
        assert len({case.target for case in four}) == 4
        masks = torch.stack([case.mask for case in four if case.mask is not None])
        assert masks.sum(0).eq(1).all()
