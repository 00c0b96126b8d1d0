"""Photos with one trigger or two, and where they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case, colours_of, normalise
from studies.shared.photos import Photo
from studies.trojan.patches import TRIGGERS, Patch, draw_patch, paste


def trojan_cases(network: LoadedModel, photos: Sequence[Photo], each: int) -> list[Case]:
    """Paste `each` of the triggers, in turn, into every photo; the numbers of photo and turn seed place and size."""
    emojis = list(TRIGGERS)
    cases = []
    for number, photo in enumerate(photos):
        colours = colours_of(network, photo)
        for turn in range(each):
            emoji = emojis[(number + turn) % len(emojis)]
            patch = draw_patch(emoji, *colours.shape[1:], np.random.default_rng([number, turn]))
            pasted, mask = paste(colours, patch)
            name = f"{photo.name} {emoji}"
            cases.append(Case(name, name, photo.name, emoji, normalise(network, pasted)[None], TRIGGERS[emoji], mask))
    return cases


def pair_cases(network: LoadedModel, photos: Sequence[Photo]) -> list[Case]:
    """Paste two of the triggers into every photo, without overlap, and ask for each of their classes.

    All pairs of triggers are used in turn; the numbers of the photos seed places and sizes.
    """
    cases = []
    for sample, photo, colours, patches in _pairs(network, photos):
        pasted, masks = colours, []
        for patch in patches:
            pasted, mask = paste(pasted, patch)
            masks.append(mask)
        image = normalise(network, pasted)[None]
        for mine, other in ((0, 1), (1, 0)):
            emoji, rival = patches[mine].emoji, patches[other].emoji
            about = (f"{sample} {emoji}", sample, photo.name, emoji, image)
            cases.append(Case(*about, TRIGGERS[emoji], masks[mine], TRIGGERS[rival], masks[other]))
    return cases


def images_with_one(network: LoadedModel, photos: Sequence[Photo]) -> dict[str, dict[str, Tensor]]:
    """Return the images of `pair_cases` without one of the triggers, by sample and by the trigger that stays."""
    return {
        sample: {patch.emoji: normalise(network, paste(colours, patch)[0])[None] for patch in patches}
        for sample, _, colours, patches in _pairs(network, photos)
    }


def _pairs(network: LoadedModel, photos: Sequence[Photo]) -> Iterator[tuple[str, Photo, Tensor, list[Patch]]]:
    pairs = list(itertools.combinations(TRIGGERS, 2))
    for number, photo in enumerate(photos):
        pair = pairs[number % len(pairs)]
        colours = colours_of(network, photo)
        patches = draw_apart(pair, *colours.shape[1:], np.random.default_rng([number, len(TRIGGERS)]))
        yield f"{photo.name} {''.join(pair)}", photo, colours, patches


def draw_apart(emojis: Sequence[str], height: int, width: int, rng: np.random.Generator) -> list[Patch]:
    """Choose sizes and places of two patches at random; their squares do not overlap."""
    while True:
        first, second = (draw_patch(emoji, height, width, rng) for emoji in emojis)
        if (
            first.top + first.side <= second.top
            or second.top + second.side <= first.top
            or first.left + first.side <= second.left
            or second.left + second.side <= first.left
        ):
            return [first, second]
