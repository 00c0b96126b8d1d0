"""Networks of all kinds in all commands: channels, types, sizes, one logit, stated and assumed preprocessing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from safetensors import safe_open  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast import AssumptionWarning, Trace, load_model  # noqa: E402
from spade_fast.batch import Results, run  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402

NETWORKS = """
import torch
from torch import nn
from spade_fast.inputs import LoadedModel

def network(channels=3, classes=4, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, classes),
    ).to(dtype)

def grey(): return LoadedModel("grey", network(1), (0.13,), (0.31,), 28, 28)
def four(): return LoadedModel("four", network(4), (0.5,) * 4, (0.25,) * 4, 16, 16)
def half(): return LoadedModel("half", network(dtype=torch.float16), (0.5,) * 3, (0.25,) * 3, 16, 16)
def bfloat16(): return LoadedModel("bfloat16", network(dtype=torch.bfloat16), (0.5,) * 3, (0.25,) * 3, 16, 16)
def double(): return LoadedModel("double", network(dtype=torch.float64), (0.5,) * 3, (0.25,) * 3, 16, 16)
def small(): return LoadedModel("small", network(), (0.5,) * 3, (0.25,) * 3, 32, 32)
def wide(): return LoadedModel("wide", network(), (0.5,) * 3, (0.25,) * 3, (16, 32), (12, 24))
def binary(): return LoadedModel("binary", network(classes=1), (0.5,) * 3, (0.25,) * 3, 16, 16, class_names=("defect",))
def bare(): return network()
def bare_grey(): return network(1)
def maps(): return LoadedModel("maps", network()[:4], resize=16, crop=16)
def probabilities(): return nn.Sequential(network(), nn.Softmax(1))

class FourChannels:
    def __len__(self): return 2
    def __getitem__(self, index): return torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(index))
"""
SIZES = {"grey": (28, 28), "small": (32, 32), "wide": (12, 24)}
PHOTO_COMMANDS = ("explain", "trace", "tune", "profile", "batch")


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "kinds_of_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kinds_of_networks", raising=False)
    monkeypatch.chdir(tmp_path)
    return "kinds_of_networks:"


def invoke(command, model, *more):
    """Run a command on ``photo.png`` with few augmentations; ``visualize`` runs with few steps."""
    options = ["--model", model]
    options += ["--steps", 2] if command == "visualize" else ["--augmentations", 4]
    if command == "profile":
        command, options = "profile", ["explain", "photo.png", *options, "--out", "profiled", "--methods", "saliency"]
    elif command == "batch":
        options += ["--out", "batch", "--workers", 0, *([] if "--methods" in more else ["--methods", "saliency"])]
    elif command == "explain":
        options += ["--out", "out", "--methods", "saliency,gradcam,integrated-gradients"]
    elif command == "trace":
        options += ["--layers", "*", "--sparsity", 0.5]
    elif command == "tune":
        options += ["--candidates", "0.5", "--score", "deletion"]
    first = {"visualize": [1], "profile": []}.get(command, ["photo.png"])
    return CliRunner().invoke(app, [command, *map(str, [*first, *options, *more])])


def error_of(result):
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.exit_code == 2
    return line


@pytest.mark.parametrize("kind", ["grey", "half", "bfloat16", "double", "small", "wide", "binary"])
@pytest.mark.filterwarnings("ignore::spade_fast.AssumptionWarning")
def test_every_command_takes_every_network(networks, photo, tmp_path, kind):
    height, width = SIZES.get(kind, (16, 16))
    classes = 2 if kind == "binary" else 4
    for command in PHOTO_COMMANDS:
        result = invoke(command, networks + kind)
        assert result.exit_code == 0, (command, result.output, result.exception)
    result = invoke("visualize", networks + kind, "--trace", "trace.safetensors")
    assert result.exit_code == 0, result.output

    report = json.loads((tmp_path / "out/report.json").read_text())
    predictions = report["predictions"]["dense"]["top"]
    assert abs(sum(one["probability"] for one in predictions) - 1) < 1e-5 and len(predictions) == classes
    for name in ("dense", "trace"):
        with Image.open(tmp_path / "visualization" / f"{name}.png") as picture:
            assert picture.size == (width * 5 // 4, height * 5 // 4) and picture.mode == "RGB"
    loaded = load_model(networks + kind)
    made = Trace.load(tmp_path / "trace.safetensors")
    assert made.layers == ("0", "2", "6") and made.weight("2").dtype == loaded.dtype
    (finished,) = Results(tmp_path / "batch")
    assert finished == "photo.png"
    with safe_open(next((tmp_path / "batch/maps").iterdir()), "pt") as maps:
        for name in ("dense.saliency", "trace.saliency"):
            assert maps.get_tensor(name).shape == (height, width) and maps.get_tensor(name).max() > 0


def test_the_network_of_the_how_to(photo, tmp_path, monkeypatch):
    """A file of ten lines is all that a command needs."""
    page = (Path(__file__).parents[2] / "docs/how-to/own-model.md").read_text()
    (lines,) = re.findall(r"In a file `my_network\.py`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) <= 10
    (tmp_path / "my_network.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = invoke("trace", "my_network:classifier")
    assert result.exit_code == 0, result.output
    assert Trace.load("trace.safetensors").layers == ("0", "4")
    loaded = load_model("my_network:classifier")
    assert loaded.name == "mine" and loaded.class_name(1) == "bee" and not loaded.notes


def test_photos_of_grey_networks_are_grey(networks, photo):
    loaded = load_model(networks + "grey")
    image, pixels = loaded.preprocess(Image.open(photo))
    assert image.shape == (1, 1, 28, 28) and pixels.shape == (28, 28, 3) and (pixels == pixels[..., :1]).all()
    assert torch.allclose(image[0, 0], (torch.from_numpy(pixels[..., 0]) / 255 - 0.13) / 0.31)
    assert torch.allclose(loaded.black, torch.tensor(-0.13 / 0.31).view(1, 1, 1, 1))


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_inputs_have_the_type_of_the_network(networks, photo, kind):
    loaded = load_model(networks + kind)
    image, _ = loaded.preprocess(Image.open(photo))
    exact = load_model(networks + "small").module(image.float())
    assert image.dtype == loaded.black.dtype == loaded.dtype == next(loaded.module.parameters()).dtype
    assert torch.allclose(loaded.module(image).float(), exact, atol=0.01)


@pytest.mark.filterwarnings("default::spade_fast.AssumptionWarning")
def test_one_logit_is_the_probability_of_class_1(networks, photo, tmp_path):
    with pytest.warns(AssumptionWarning, match=r"binary returns one logit z: .*sigmoid\(z\)"):
        loaded = load_model(networks + "binary")
    assert loaded.class_names == ("not defect", "defect") and len(loaded.notes) == 1
    plain = sys.modules["kinds_of_networks"].network(classes=1).eval()  # the same weights
    image, _ = loaded.preprocess(Image.open(photo))
    probability = plain(image).sigmoid().item()
    result = invoke("explain", networks + "binary", "--target", 0)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    target = report["predictions"]["dense"]["target"]
    assert target["name"] == "not defect" and abs(target["probability"] - (1 - probability)) < 1e-6
    assert "returns one logit" in report["notes"][0]
    assert "returns one logit" in (tmp_path / "out/index.html").read_text()
    made = Trace.load(tmp_path / "out/trace-exact.safetensors")
    with made.applied(plain):
        traced = plain(image).sigmoid().item()
    assert abs(report["predictions"]["exact"]["target"]["probability"] - (1 - traced)) < 1e-6


@pytest.mark.parametrize("command", [*PHOTO_COMMANDS, "visualize"])
def test_four_channels_are_refused_for_photos(networks, photo, tmp_path, command):
    assert "four takes 4 channels, but photos have 3" in error_of(invoke(command, networks + "four"))
    assert not {"out", "batch", "visualization", "trace.safetensors"} & {path.name for path in tmp_path.iterdir()}


def test_four_channels_as_tensors(networks, tmp_path):
    for methods in ((), ("saliency",)):
        summary = run(
            networks + "FourChannels", tmp_path / f"out{len(methods)}", model=networks + "four", sparsity=0.5,
            augmentations=4, workers=0, methods=methods,
        )  # fmt: skip
        assert summary.finished == 2 and not summary.failed


def test_tensors_are_converted_to_the_type_of_the_network(networks, tmp_path):
    images = [torch.rand(3, 16, 16) for _ in range(2)]
    for kind in ("half", "double"):
        summary = run(images, tmp_path / kind, model=networks + kind, sparsity=0.5, augmentations=4, workers=0)
        assert summary.finished == 2 and not summary.failed


@pytest.mark.parametrize("command", [*PHOTO_COMMANDS, "visualize"])
def test_networks_that_cannot_run_are_one_line_before_the_work(networks, photo, tmp_path, command):
    message = error_of(invoke(command, networks + "bare_grey"))
    assert "bare_grey cannot run an image [1, 3, 224, 224] of torch.float32 (RuntimeError: " in message
    assert "to have 1 channels, but got 3" in message and "return a spade_fast.inputs.LoadedModel" in message
    if command != "visualize":
        assert "one row of logits for one image, got [1, 12, 8, 8]" in error_of(invoke(command, networks + "maps"))
    assert "ends in a softmax" in error_of(invoke(command, networks + "probabilities"))
    assert not {"out", "batch", "visualization", "trace.safetensors"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("command", [*PHOTO_COMMANDS, "visualize"])
@pytest.mark.filterwarnings("default::spade_fast.AssumptionWarning")
def test_assumed_preprocessing_is_said_once(networks, photo, command):
    result = invoke(command, networks + "bare", *(["--methods", "saliency"] if command == "explain" else []))
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "preprocessing" in line]
    assert (
        "warning: " in line
        and "bare does not state its preprocessing: assumed resize 256, crop 224, interpolation bilinear" in line
    )
    assert "return a spade_fast.inputs.LoadedModel" in line
    stated = invoke(command, networks + "small", *(["--out", "other"] if command == "batch" else []))
    assert stated.exit_code == 0 and "preprocessing" not in stated.stderr


@pytest.mark.filterwarnings("ignore::spade_fast.AssumptionWarning")
def test_preprocessing_is_in_the_report(networks, photo, tmp_path):
    invoke("explain", networks + "bare", "--methods", "saliency")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["preprocessing"] == {
        "resize": 256, "crop": 224, "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    page = (tmp_path / "out/index.html").read_text()
    assert report["notes"][0].startswith("kinds_of_networks:bare does not state") and "does not state its" in page
    invoke("batch", networks + "bare")
    written = json.loads((tmp_path / "batch/run.json").read_text())["settings"]
    assert written["preprocessing"] == report["preprocessing"] and written["notes"] == report["notes"]
