"""Networks loaded by name, photos, and the calibration images made from a photo."""

from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.logits import two_classes
from spade_fast.inputs.networks import LoadedModel, demo_photo, load_model, predict
from spade_fast.inputs.photo import open_photo

__all__ = [
    "ImageAugmenter",
    "LoadedModel",
    "demo_photo",
    "load_model",
    "open_photo",
    "predict",
    "two_classes",
]
