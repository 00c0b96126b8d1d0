"""The page and the pictures of feature visualisation."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("kornia")
Image = pytest.importorskip("PIL.Image")

from test_page import Parsed  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast.cli.app import app  # noqa: E402
from spade_fast.cli.drawings import Drawing  # noqa: E402


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def trace(small, photo, tmp_path):
    """The file of a trace of the small network."""
    path = tmp_path / "one.safetensors"
    options = ["--model", small, "--augmentations", 4, "--sparsity", 0.5, "--layers", "*", "--solver", "sparsegpt"]
    assert invoke("trace", photo, *options, "--out", path).exit_code == 0
    return path


def test_a_labelled_page_with_dense_and_traces_side_by_side(small, trace, tmp_path):
    out = tmp_path / "out"
    result = invoke("visualize", "Dog", "--model", small, "--steps", 3, "--trace", trace, "--out", out)
    assert result.exit_code == 0, result.output
    names = ["dense.png", "one.png", "overview.png", "report.json", "index.html"]
    assert result.stdout.splitlines() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    html = (out / "index.html").read_text()
    parsed = Parsed(html)
    assert parsed.texts("h1") == parsed.texts("title") == ["What excites class “dog” (3)"]
    assert parsed.texts("figcaption") == ["Dense network", "FastSPADE trace sample photo.png 50.0% removed in 3 layers"]
    assert small in parsed.texts("header")[0] and "steps: 3" in parsed.texts("footer")[0]
    assert "http" not in html.replace("http-equiv", "") and not parsed.all("script", "link")
    shown = [attributes["src"].partition("base64,")[2] for _, attributes, _ in parsed.all("img")]
    for address, name in zip(shown, names[:2], strict=True):
        with Image.open(io.BytesIO(base64.b64decode(address))) as page, Image.open(out / name) as single:
            error = np.asarray(page, float) - np.asarray(single, float)
            assert page.size == single.size == (20, 20) and np.abs(error).mean() < 8
    with Image.open(out / "overview.png") as overview:
        row = np.asarray(overview.convert("L"))[overview.height * 2 // 3]
        assert row[[160, 600]].max() < 255, "both pictures are there"


def test_titles_of_channels_neurons_and_classes_without_names(small, tmp_path):
    out = tmp_path / "out"

    def title(*options):
        assert invoke("visualize", *options, "--steps", 1, "--out", out).exit_code == 0
        return Parsed((out / "index.html").read_text()).texts("h1")

    neuron = ("5", "--model", small, "--layer", 2, "--neuron")
    assert title(*neuron) == ["What excites the central neuron of channel 5 of layer 2"]
    contrast = "What excites the central neuron of channel 5 of layer 2 more than the other channels"
    assert title(*neuron, "--contrast") == [contrast]
    assert title("2", "--model", "small_network:norm") == ["What excites class 2"]
    assert title("2", "1", "--model", "small_network:norm") == ["What excites 2 classes"]


def test_several_features_and_pictures(small, trace, tmp_path):
    """A row per feature, a cell per network with all its pictures; all are in the folder and in the report."""
    out = tmp_path / "out"
    options = ("--model", small, "--steps", 2, "--count", 2, "--trace", trace, "--out", out)
    assert invoke("visualize", "dog", "ant", *options).exit_code == 0
    html = (out / "index.html").read_text()
    parsed = Parsed(html)
    assert parsed.texts("h1") == ["What excites 2 classes"]
    assert parsed.texts("h2") == ["Class “dog” (3)", "Class “ant” (0)"]
    stems = [f"{name}-{index}-{number}" for index in (3, 0) for name in ("dense", "one") for number in (1, 2)]
    images = parsed.all("img")
    assert len(images) == len(stems) and images[0][1]["alt"] == "Class “dog” (3), Dense network, 1"
    for (_, attributes, _), stem in zip(images, stems, strict=True):
        data = base64.b64decode(attributes["src"].partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as shown, Image.open(out / f"{stem}.png") as single:
            assert np.abs(np.asarray(shown, float) - np.asarray(single, float)).mean() < 8
    report = json.loads((out / "report.json").read_text())
    assert [one["feature"] for one in report["features"]] == parsed.texts("h2")
    files = [name for one in report["features"] for cell in one["cells"] for name in cell["files"]]
    assert files == [f"{stem}.png" for stem in stems]
    assert set(report["files"]) == {path.name for path in out.iterdir()} == {*files, "overview.png", *report["files"]}
    different = {(out / name).read_bytes() for name in files}
    assert len(different) == len(files)


@pytest.mark.parametrize("options", [("--method", "fourier"), ("--views", 3), ("--contrast",), ("--seed", 1)])
def test_settings_change_the_picture(small, tmp_path, options):
    usual = ("visualize", "dog", "--model", small, "--steps", 2, "--out")
    pictures = []
    for name, more in (("usual", ()), ("again", ()), ("other", options)):
        assert invoke(*usual, tmp_path / name, *more).exit_code == 0
        pictures.append((tmp_path / name / "dense.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert (
        f"{options[0][2:]}: {options[-1] if len(options) > 1 else True}" in (tmp_path / "other/index.html").read_text()
    )


def test_a_photo_to_start_with(small, tmp_path):
    """One step changes little, and the page does not say where the photo lay."""
    Image.fromarray(np.full((30, 40, 3), (250, 130, 10), np.uint8)).save(tmp_path / "orange.png")
    out = tmp_path / "out"
    options = ("--model", small, "--steps", 1, "--method", "fourier", "--start", tmp_path / "orange.png", "--out", out)
    assert invoke("visualize", "dog", *options).exit_code == 0
    with Image.open(out / "dense.png") as picture:
        red, _, blue = np.asarray(picture, float).mean((0, 1))
    assert red > blue + 50
    html = (out / "index.html").read_text()
    assert "start: orange.png" in html and str(tmp_path) not in html


def test_a_trace_that_cut_a_channel_off_leaves_its_cell_empty(small, photo, tmp_path):
    path, out = tmp_path / "none.safetensors", tmp_path / "out"
    pruned = ("--model", small, "--augmentations", 4, "--sparsity", 1, "--layers", "2", "--out", path)
    assert invoke("trace", photo, *pruned).exit_code == 0
    options = ("--model", small, "--layer", 2, "--steps", 1, "--trace", path, "--out", out)
    assert invoke("visualize", 3, *options).exit_code == 0
    message = "all weights of channel 3 of layer '2' are zero: nothing can excite it"
    assert Parsed((out / "index.html").read_text()).texts("p", style="missing") == [message]
    dense, cut = json.loads((out / "report.json").read_text())["features"][0]["cells"]
    assert dense["files"] == ["dense.png"] and cut["files"] == [] and cut["missing"] == message
    assert not (out / "none.png").exists()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("dig", {}, "the network has no class 'dig': did you mean 'dog' (3)?"),
        ("4", {}, "index must lie between 0 and 3, got 4"),
        ("12", {"--layer": "2"}, "index must lie between 0 and 11, got 12"),
        ("dog", {"--layer": "2"}, "a channel of layer '2' is given by its index, got 'dog'"),
        ("1", {"--layer": "22"}, "the model has no layer '22': did you mean '2'?"),
        ("1", {"--steps": "0"}, "steps must be at least 1, got 0"),
        ("1", {"--seed": "-1"}, "seed must lie between 0 and"),
        ("1", {"--neuron": None}, "a neuron needs a layer"),
        ("dog", {"--model": "small_network:norm"}, "the network has no class names: give its index instead of 'dog'"),
        (
            "1",
            {"--model": "small_network:norm", "--trace": "one.safetensors"},
            "was not made from the given",
        ),
        (
            "1",
            {"--trace": "overview.safetensors"},
            "other than 'dense' and 'overview', got overview.safetensors",
        ),
        ("1", {"--out": "photo.png/out"}, "cannot write into the output folder"),
        ("1", {"--method": "mako"}, "unknown method 'mako': did you mean 'maco'?"),
        ("1", {"--views": "0"}, "views must be at least 1, got 0"),
        ("1", {"--count": "0"}, "count must be at least 1, got 0"),
        ("1", {"--count": "2", "--model": "small_network:norm"}, "several pictures cannot be compared"),
        ("1", {"--start": "none.png"}, "no such image file: none.png"),
        ("1", {"--start": "one.safetensors"}, "not an image file"),
        ("ant 9", {}, "index must lie between 0 and 3, got 9"),
        ("Dog 3", {}, "class “dog” (3) is given twice"),
        (
            "photo.png",
            {},
            "the network has no class 'photo.png'; for the units that a photo excites, give --units auto",
        ),
        ("1", {"--keep": "0.5", "--solver": "sparsegpt"}, "--keep, --solver: nothing is pruned without --units"),
        ("1", {"--augmentations": "8"}, "--augmentations: nothing is pruned without --units"),
    ],
)
def test_bad_input_fails_before_any_work(small, trace, tmp_path, monkeypatch, given, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overview.safetensors").write_bytes(trace.read_bytes())
    finished = []
    draw = Drawing.draw
    monkeypatch.setattr(Drawing, "draw", lambda *a, **k: finished.append(draw(*a, **k)) or finished[-1])
    options = {"--model": small, "--steps": "2", "--out": "out", **options}
    flags = [part for option in options.items() for part in option if part is not None]
    result = invoke("visualize", *flags, *given.split())
    assert result.exit_code == 2 and message in result.stderr and result.stdout == "" and not finished
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
