"""`Setup`, the options that commands and batches share in addition to `PruneConfig`: network, device, augmentations."""

from __future__ import annotations

from dataclasses import dataclass

from spade_fast._util.checks import check_device, integer
from spade_fast.inputs.augment import HUE, ImageAugmenter
from spade_fast.inputs.augmenters import AUGMENTATIONS
from spade_fast.inputs.networks import LoadedModel, load_model


@dataclass(frozen=True)
class Setup:
    """The name of a network, its device, and the number of calibration images per sample.

    Attributes
    ----------
    model
        Name as `load_model` takes it.
    device
        Device name in torch's notation: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    augmentations
        Number of calibration images per sample.

    Raises
    ------
    TypeError, ValueError
        `augmentations` is not an integer of at least 1.
    """

    model: str = "demo"
    device: str = "cpu"
    augmentations: int = AUGMENTATIONS

    def __post_init__(self) -> None:
        integer("augmentations", self.augmentations, 1)

    def load_model(self) -> LoadedModel:
        """Load the network onto its device; raise the errors of :func:`load_model`, or ValueError for the device."""
        check_device(self.device)
        loaded = load_model(self.model)
        loaded.module.to(self.device)
        return loaded

    def augmenter(self, model: LoadedModel, seed: int | None, noise: float = 0.0) -> ImageAugmenter:
        """Return the augmenter that makes calibration images for a network; a seed of None means 0.

        The hue is shifted only if the network takes three channels. `noise` is that of `ImageAugmenter`.
        """
        hue = HUE if len(model.mean) == 3 else 0.0
        seed = 0 if seed is None else seed
        return ImageAugmenter(self.augmentations, model.mean, model.std, seed, hue=hue, noise=noise)
