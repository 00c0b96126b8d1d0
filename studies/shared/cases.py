"""Questions about images: which class to explain and, if it is known, where the evidence for it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spade_fast.inputs.networks import LoadedModel
from studies.shared.photos import Photo


@dataclass(frozen=True)
class Case:
    """A class to explain.

    Attributes
    ----------
    name
        Unique among the cases.
    sample
        Name of the image; the cells of a mosaic share it, and so its traces.
    source
        What is resampled for intervals: the photo, or the mosaic.
    kind
        The trigger; for mosaics, the index of the cell.
    image
        Input of the network, ``[1, 3, H, W]``.
    target
        Index of the class.
    mask
        True where the evidence lies, ``[H, W]``; None if that is unknown.
    rival, rival_mask
        Another class with evidence in the image, and where that lies.
    """

    name: str
    sample: str
    source: str
    kind: str
    image: Tensor
    target: int
    mask: Tensor | None = None
    rival: int | None = None
    rival_mask: Tensor | None = None


def normalise(network: LoadedModel, colours: Tensor) -> Tensor:
    """Turn colours between 0 and 1, ``[..., 3, H, W]``, into input of the network."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    return (colours - mean) / std


def undo_normalisation(network: LoadedModel, image: Tensor) -> Tensor:
    """Turn input of the network, ``[..., 3, H, W]``, into colours between 0 and 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    return image * std + mean


def colours_of(network: LoadedModel, photo: Photo) -> Tensor:
    """Crop a photo for the network: colours between 0 and 1, ``[3, H, W]``."""
    _, pixels = network.preprocess(photo.image)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def clean_image(network: LoadedModel, photo: Photo) -> Tensor:
    """Return a photo as input of the network, ``[1, 3, H, W]``."""
    return normalise(network, colours_of(network, photo))[None]


@torch.no_grad()
def probabilities(network: LoadedModel, image: Tensor) -> Tensor:
    """Return the probabilities ``[classes]`` that the dense network gives for an image."""
    return network.module(image).softmax(1)[0]
