"""Questions with a known answer: photos with a trigger in them, and mosaics of four photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from patches import TRIGGERS, draw_patch, paste
from sources import Photo
from torch import Tensor

from spade_fast.inputs.networks import LoadedModel


@dataclass(frozen=True)
class Case:
    """A class to explain, and where the evidence for it lies.

    Attributes
    ----------
    name
        Unique among the cases.
    sample
        Name of the image; the cells of a mosaic share it, and so its traces.
    source
        What is resampled for intervals: the photo without the trigger, or the mosaic.
    kind
        The trigger; for mosaics, the index of the cell.
    image
        Input of the network, ``[1, 3, H, W]``.
    target
        Index of the class.
    mask
        True where the evidence lies, ``[H, W]``.
    """

    name: str
    sample: str
    source: str
    kind: str
    image: Tensor
    target: int
    mask: Tensor


def normalise(network: LoadedModel, colours: Tensor) -> Tensor:
    """Turn colours between 0 and 1, ``[..., 3, H, W]``, into input of the network."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    return (colours - mean) / std


def colours_of(network: LoadedModel, photo: Photo) -> Tensor:
    """Crop a photo for the network: colours between 0 and 1, ``[3, H, W]``."""
    _, pixels = network.preprocess(photo.image)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


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


def clean_image(network: LoadedModel, photo: Photo) -> Tensor:
    """Return a photo without a trigger as input of the network, ``[1, 3, H, W]``."""
    return normalise(network, colours_of(network, photo))[None]


def mosaic_cases(network: LoadedModel, photos: Sequence[Photo], count: int) -> list[Case]:
    """Ask for each cell of 2 x 2 mosaics where the evidence lies for the class that the network predicts for its photo.

    The four photos of a mosaic have different classes (Böhle, Fritz, Schiele, CVPR 2021, arXiv 2104.00032). A mosaic is
    as large as one photo: each cell is a photo at half its size.
    """
    images = torch.cat([clean_image(network, photo) for photo in photos])
    with torch.no_grad():
        probabilities = network.module(images).softmax(1)
    classes = probabilities.argmax(1)
    halves = torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
    rng = np.random.default_rng(0)
    side = halves.shape[-1]
    cases = []
    for number in range(count):
        chosen: list[int] = []
        for index in rng.permutation(len(photos)).tolist():
            if len(chosen) < 4 and classes[index] not in classes[chosen]:
                chosen.append(index)
        rows = [torch.cat(list(halves[chosen[row : row + 2]]), dim=2) for row in (0, 2)]
        image = torch.cat(rows, dim=1)[None]
        for cell, index in enumerate(chosen):
            mask = torch.zeros(image.shape[2:], dtype=torch.bool)
            top, left = side * (cell // 2), side * (cell % 2)
            mask[top : top + side, left : left + side] = True
            source = f"mosaic {number}"
            cases.append(Case(f"{source} cell {cell}", source, source, str(cell), image, int(classes[index]), mask))
    return cases
