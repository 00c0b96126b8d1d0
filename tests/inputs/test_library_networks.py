"""Networks of timm and transformers: weights, class names, and preprocessing equal to that of the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spade_fast import AssumptionWarning
from spade_fast.inputs import library_networks as module
from spade_fast.inputs import load_model, predict

Image = pytest.importorskip("PIL.Image")


def smooth_photo(width, height):
    """A photo without detail as fine as a pixel, which half a pixel of another rounding would change."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def assert_same_preprocessing(loaded, transform):
    for sides in ((320, 240), (240, 320), (333, 222), (100, 250)):
        ours, theirs = loaded.preprocess(smooth_photo(*sides))[0], transform(smooth_photo(*sides))
        assert ours.shape == theirs.shape
        difference = (ours - theirs).abs() * torch.tensor(loaded.std).view(1, -1, 1, 1)
        assert difference.mean() < 0.015 and difference.max() < 0.08, sides


# timm


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "resnet10t"])
def test_timm_networks(timm, name):
    loaded = load_model(f"timm:{name}:none")
    config = timm.data.resolve_model_data_config(loaded.module)
    transform = timm.data.create_transform(**config, is_training=False)
    assert loaded.size == tuple(config["input_size"][1:]) and loaded.interpolation == config["interpolation"]
    assert loaded.mean == tuple(config["mean"]) and loaded.std == tuple(config["std"])
    assert_same_preprocessing(loaded, lambda photo: transform(photo)[None])
    assert not loaded.module.training and loaded.class_name(207).lower() == "golden retriever"
    image, _ = loaded.preprocess(smooth_photo(90, 60))
    assert predict(loaded.module, image).shape == (1000,)


@pytest.mark.parametrize(
    ("config", "resize"),
    [
        ({"crop_mode": "center", "crop_pct": 0.875}, 73),
        ({"crop_mode": "center", "crop_pct": 1.0}, 64),
        ({"crop_mode": "squash", "crop_pct": 0.8}, (80, 80)),
        ({"crop_mode": "squash", "crop_pct": 1.0, "input_size": (3, 64, 48)}, (64, 48)),
    ],
)
def test_timm_crop_modes(timm, config, resize):
    given = {"input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.2,) * 3, **config}
    loaded = module.timm_preprocessing("x", given)
    transform = timm.data.create_transform(**given, is_training=False)
    assert loaded.resize == resize
    assert_same_preprocessing(loaded, lambda photo: transform(photo)[None])


@pytest.mark.parametrize("config", [{"crop_mode": "border", "crop_pct": 1.0}, {"crop_mode": "center", "crop_pct": 1.2}])
def test_timm_crop_modes_that_cannot_be_expressed(timm, config):
    given = {"input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.2,) * 3, **config}
    with pytest.raises(ValueError, match=f"preprocessing of x.*crop_mode={config['crop_mode']}.*module:callable"):
        module.timm_preprocessing("x", given)


def test_random_weights_are_the_same_every_time(timm):
    state = torch.random.get_rng_state()
    for name in ("timm:test_vit:none", "torchvision:squeezenet1_1:none"):
        first, second = (load_model(name).module.state_dict() for _ in range(2))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_preprocessing_of_torchvision_networks_with_own_weights(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    torch.save(models.mnasnet0_75().state_dict(), tmp_path / "weights.pth")
    with pytest.warns(AssumptionWarning, match="assumed resize 232, crop 224"):
        assert load_model(f"torchvision:mnasnet0_75:{tmp_path / 'weights.pth'}").resize == 232
    loaded = load_model("torchvision:mnasnet0_75:none")
    assert (loaded.resize, loaded.crop, loaded.notes) == (232, 224, ())


def test_weights_of_timm_networks(timm, tmp_path):
    network = timm.create_model("test_resnet")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    with pytest.warns(AssumptionWarning, match=r"weights\.pth does not state its preprocessing: assumed resize 16"):
        loaded = load_model(f"timm:test_resnet:{tmp_path / 'weights.pth'}")
    assert torch.equal(loaded.module.fc.weight, network.fc.weight) and loaded.notes
    with pytest.raises(ValueError, match=r"does not contain weights of VisionTransformer"):
        load_model(f"timm:test_vit:{tmp_path / 'weights.pth'}")
    with pytest.raises(FileNotFoundError):
        load_model("timm:test_vit:absent.pth")


def test_timm_names(timm, monkeypatch):
    with pytest.raises(ValueError, match=r"timm has no network 'resnet80'; it has .*resnet50"):
        load_model("timm:resnet80:none")
    with pytest.raises(ValueError, match="nonsense"):
        load_model("timm:test_vit.nonsense")

    def offline(*_, **__):
        raise OSError("no connection\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"download the weights of test_vit \(no connection\): give a file"):
        load_model("timm:test_vit")


def test_timm_names_only_imagenet_classes(timm, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, num_classes=7, **options))
    assert load_model("timm:test_vit:none").class_names == ()


# transformers


LABELS = {0: "cat", 1: "dog", 2: "fox"}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def vit(transformers):
    def make(folder, processor=None, **changes):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        options = {"image_size": 64, "patch_size": 16, "id2label": LABELS, **sizes, **changes}
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**options)).eval()
        network.save_pretrained(folder)
        (processor or transformers.ViTImageProcessor(size={"height": 64, "width": 64})).save_pretrained(folder)
        return network

    return make


def test_hugging_face_networks(vit, tmp_path):
    network = vit(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.class_names == ("cat", "dog", "fox") and not loaded.module.training
    assert (loaded.resize, loaded.crop, loaded.notes) == ((64, 64), 64, ())
    image, _ = loaded.preprocess(smooth_photo(90, 60))
    with torch.no_grad():
        assert torch.equal(loaded.module(image), network(image).logits)
    assert list(loaded.module.state_dict()) == list(network.state_dict()), "layers keep their names"


@pytest.mark.parametrize(
    ("processor", "options", "resize"),
    [
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}, (64, 64)),
        ("DeiTImageProcessor", {"size": {"height": 72, "width": 72}, "crop_size": 64}, (72, 72)),
        ("BitImageProcessor", {"size": {"shortest_edge": 72}, "crop_size": 64}, 72),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64}, 64),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.8}, 80),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (384, 384)),
        ("LevitImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64}, 73),
        ("PoolFormerImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64, "crop_pct": 0.8}, 80),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}, (64, 64)),
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "do_normalize": False}, (64, 64)),
        ("ViTImageProcessor", {"size": {"height": 64, "width": 48}, "rescale_factor": 1 / 127.5}, (64, 48)),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}, "rescale_offset": True}, (64, 64)),
    ],
)
def test_image_processors(transformers, vit, tmp_path, processor, options, resize):
    made = getattr(transformers, processor)(**options)
    height, width = resize if isinstance(resize, tuple) else (resize, resize)
    vit(tmp_path, made, image_size=(height // 64 * 64, 48 if width == 48 else width // 64 * 64))
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.resize == resize
    assert_same_preprocessing(loaded, lambda photo: made(photo, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    ("processor", "options", "message"),
    [
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64}, "do_flip_channel_order=True"),
        ("ViTImageProcessor", {"size": {"shortest_edge": 64}}, "shortest_edge"),
        ("ViTImageProcessor", {"do_resize": False}, "ViTImageProcessor"),
        ("PerceiverImageProcessor", {"size": {"height": 64, "width": 64}, "crop_size": 80}, "crop_size"),
        ("Siglip2ImageProcessor", {}, "Siglip2ImageProcessor"),
    ],
)
def test_image_processors_that_cannot_be_expressed(transformers, vit, tmp_path, processor, options, message):
    vit(tmp_path, getattr(transformers, processor)(**options))
    with pytest.raises(ValueError, match=rf"preprocessing of hf:.* cannot be expressed .*{message}.*module:callable"):
        load_model(f"hf:{tmp_path}")


def test_hugging_face_networks_that_are_no_classifiers(transformers, vit, tmp_path):
    vit(tmp_path / "many", problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="multi_label_classification"):
        load_model(f"hf:{tmp_path / 'many'}")
    network = vit(tmp_path / "headless")
    network.vit.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias, classifier\.weight"):
        load_model(f"hf:{tmp_path / 'headless'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="cannot load"):
        load_model(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "many" / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="image processor"):
        load_model(f"hf:{tmp_path / 'many'}")


def test_timm_networks_of_hugging_face(transformers, timm, tmp_path):
    config = transformers.TimmWrapperConfig.from_dict(
        {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    )
    transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert (loaded.size, loaded.resize) == ((64, 64), 73)
    assert predict(loaded.module, loaded.preprocess(smooth_photo(90, 60))[0]).shape == (3,)
