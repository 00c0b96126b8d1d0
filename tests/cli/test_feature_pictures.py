"""The page and the pictures of feature visualisation."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("kornia")
Image = pytest.importorskip("PIL.Image")

from test_page import Parsed  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast.cli import feature_pictures  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402


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
            assert page.size == single.size == (16, 16) and np.abs(error).mean() < 8
    with Image.open(out / "overview.png") as overview:
        row = np.asarray(overview.convert("L"))[overview.height // 2]
        assert row[[160, 600]].max() < 255, "both pictures are there"


def test_titles_of_channels_neurons_and_classes_without_names(small, tmp_path):
    out = tmp_path / "out"
    given = ("--model", small, "--steps", 1, "--out", out)
    assert invoke("visualize", 5, *given, "--layer", 2, "--neuron").exit_code == 0
    assert Parsed((out / "index.html").read_text()).texts("h1") == [
        "What excites the central neuron of channel 5 of layer 2"
    ]
    assert invoke("visualize", 2, *given[2:], "--model", "small_network:norm").exit_code == 0
    assert Parsed((out / "index.html").read_text()).texts("h1") == ["What excites class 2"]


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
    ],
)
def test_bad_input_fails_before_any_work(small, trace, tmp_path, monkeypatch, given, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overview.safetensors").write_bytes(trace.read_bytes())
    finished = []
    visualize = feature_pictures.visualize
    monkeypatch.setattr(feature_pictures, "visualize", lambda *a, **k: finished.append(visualize(*a, **k)))
    options = {"--model": small, "--steps": "2", "--out": "out", **options}
    flags = [part for option in options.items() for part in option if part is not None]
    result = invoke("visualize", *flags, given)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == "" and not finished
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
