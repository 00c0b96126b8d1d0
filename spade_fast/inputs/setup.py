"""What the commands and batches share beside the pruning: the network, its device, and the calibration images."""

from __future__ import annotations

from dataclasses import dataclass

from spade_fast._util.checks import check_device, integer
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.defaults import AUGMENTATIONS
from spade_fast.inputs.networks import LoadedModel, load_model


@dataclass(frozen=True)
class Setup:
    """A network by name, where it runs, and how many calibration images it gets per sample.

    Attributes
    ----------
    model
        Name for `load_model`.
    device
        Where to compute, as torch names it: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    augmentations
        Calibration images per sample.

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
        """Load the network onto its device; errors are those of :func:`load_model`, or ValueError for the device."""
        check_device(self.device)
        loaded = load_model(self.model)
        loaded.module.to(self.device)
        return loaded

    def augmenter(self, model: LoadedModel, seed: int | None) -> ImageAugmenter:
        """Return what makes the calibration images of a network; no seed stands for 0."""
        return ImageAugmenter(self.augmentations, model.mean, model.std, 0 if seed is None else seed)
