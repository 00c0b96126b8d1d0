"""Networks loaded by name, photos, and augmenters, which make the calibration data of a sample."""

from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.logits import two_classes
from spade_fast.inputs.networks import LoadedModel, demo_photo, load_model, predict
from spade_fast.inputs.noise import NoiseAugmenter
from spade_fast.inputs.photo import open_photo
from spade_fast.inputs.tokens import TokenAugmenter

__all__ = [
    "ImageAugmenter",
    "LoadedModel",
    "NoiseAugmenter",
    "TokenAugmenter",
    "demo_photo",
    "load_model",
    "open_photo",
    "predict",
    "two_classes",
]
