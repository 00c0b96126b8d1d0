"""The page and the pictures of feature visualisation."""

from __future__ import annotations

import base64
import io
import json
import re

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
from spade_fast.cli.feature_page import rounded  # noqa: E402
from spade_fast.inputs.networks import load_model  # noqa: E402
from spade_fast.pruning.traces import Trace  # noqa: E402

NAMES = ("ant", "bee", "cat", "dog")


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
    dense, traced = json.loads((out / "report.json").read_text())["features"][0]["cells"]
    decision = Trace.load(trace).decision
    assert decision is not None and decision.kept
    label = f"“{NAMES[decision.class_before]}” ({decision.class_before})"
    before, after = f"{decision.probability_before:.1%}", f"{decision.probability_after:.1%}"
    assert parsed.texts("figcaption") == [
        f"Dense network logit {rounded(dense['activations'][0])}",
        f"FastSPADE trace “one” logit {rounded(traced['activations'][0])} made for photo.png "
        f"50.0% removed in 3 layers on that sample, {label}: probability {before} → {after}, kept",
    ]
    assert small in parsed.texts("header")[0] and "in the dense network and in traces." in parsed.texts("header")[0]
    footer = f"with model {small}; steps 3. All settings are in report.json"
    assert footer in parsed.texts("footer")[0]
    assert result.stderr.splitlines()[0] == "2 pictures of 3 steps"
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
    out, captions = tmp_path / "out", []

    def title(*options):
        assert invoke("visualize", *options, "--steps", 1, "--out", out).exit_code == 0
        parsed = Parsed((out / "index.html").read_text())
        assert "in the dense network." in parsed.texts("header")[0] and len(parsed.texts("figcaption")) >= 1
        captions.extend(parsed.texts("figcaption"))
        return parsed.texts("h1")

    neuron = ("5", "--model", small, "--layer", 2, "--neuron")
    assert title(*neuron) == ["What excites the central neuron of channel 5 of layer 2"]
    contrast = "What excites the central neuron of channel 5 of layer 2 more than the other channels"
    assert title(*neuron, "--contrast") == [contrast]
    assert title("2", "--model", "small_network:norm") == ["What excites class 2"]
    assert title("2", "1", "--model", "small_network:norm") == ["What excites 2 classes"]
    assert [re.sub(r"-?[0-9.]+(e-?[0-9]+)?", "N", one) for one in captions] == [
        "Dense network activation N",
        "Dense network activation N above the mean of the others",
        *3 * ["Dense network logit N"],
    ]


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
    report = json.loads((out / "report.json").read_text())
    cells = [cell for row in report["features"] for cell in row["cells"]]
    numbered = [f"{number}: logit {one:.3g}" for cell in cells for number, one in enumerate(cell["activations"], 1)]
    assert [text for text in parsed.texts("p") if re.match("[0-9]:", text)] == numbered and len(numbered) == len(stems)
    images = parsed.all("img")
    assert len(images) == len(stems) and images[0][1]["alt"] == "Class “dog” (3), Dense network, 1"
    for (_, attributes, _), stem in zip(images, stems, strict=True):
        data = base64.b64decode(attributes["src"].partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as shown, Image.open(out / f"{stem}.png") as single:
            assert np.abs(np.asarray(shown, float) - np.asarray(single, float)).mean() < 8
    assert [one["feature"] for one in report["features"]] == parsed.texts("h2")
    files = [name for one in report["features"] for cell in one["cells"] for name in cell["files"]]
    assert files == [f"{stem}.png" for stem in stems]
    assert set(report["files"]) == {path.name for path in out.iterdir()} == {*files, "overview.png", *report["files"]}
    different = {(out / name).read_bytes() for name in files}
    assert len(different) == len(files)


def footers(tmp_path):
    """Ends of the pages of usual settings and of others."""
    return [Parsed((tmp_path / name / "index.html").read_text()).texts("footer")[0] for name in ("usual", "other")]


@pytest.mark.parametrize("options", [("--method", "fourier"), ("--views", 3), ("--contrast",), ("--seed", 1)])
def test_settings_change_the_picture(small, tmp_path, options):
    usual = ("visualize", "dog", "--model", small, "--steps", 2, "--out")
    pictures = []
    for name, more in (("usual", ()), ("again", ()), ("other", options)):
        assert invoke(*usual, tmp_path / name, *more).exit_code == 0
        pictures.append((tmp_path / name / "dense.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    said = [f"; {' '.join(map(str, options)).removeprefix('--')}" in one for one in footers(tmp_path)]
    assert said == [False, True]


def test_a_photo_to_start_with(small, tmp_path):
    """It is the first column, one step changes little, and the page does not say where the photo lay."""
    Image.fromarray(np.full((30, 40, 3), (250, 130, 10), np.uint8)).save(tmp_path / "orange.png")
    out = tmp_path / "out"
    options = ("--model", small, "--steps", 1, "--method", "fourier", "--start", tmp_path / "orange.png", "--out", out)
    assert invoke("visualize", "dog", *options).exit_code == 0
    with Image.open(out / "dense.png") as picture:
        red, _, blue = np.asarray(picture, float).mean((0, 1))
    assert red > blue + 50
    html = (out / "index.html").read_text()
    parsed = Parsed(html)
    assert "start orange.png" in parsed.texts("footer")[0] and str(tmp_path) not in html
    network = load_model(small)
    with Image.open(tmp_path / "orange.png") as opened:
        logit = network.module(network.preprocess(opened)[0])[0, 3].item()
    start, _ = parsed.texts("figcaption")
    assert start == f"Start orange.png logit {rounded(logit)} in it, in the dense network"
    report = json.loads((out / "report.json").read_text())
    assert report["features"][0]["cells"][0]["files"] == ["start.png"] and "start.png" in report["files"]
    with Image.open(out / "start.png") as picture:
        assert np.abs(np.asarray(picture, float) - (250, 130, 10)).max() < 2 and picture.size == (20, 20)


@pytest.mark.filterwarnings("default::spade_fast.AssumptionWarning")
def test_what_was_assumed_about_the_network_is_told(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare_network.py").write_text("from small_network import loaded\nmake = lambda: loaded().module\n")
    out = tmp_path / "out"
    result = invoke("visualize", 3, "--model", "bare_network:make", "--steps", 1, "--out", out)
    assert result.exit_code == 0, result.output
    (note,) = json.loads((out / "report.json").read_text())["notes"]
    assert "assumed" in note and note in Parsed((out / "index.html").read_text()).texts("header")[0]


def test_a_trace_that_cut_a_channel_off_leaves_its_cell_empty(small, photo, tmp_path):
    path, out = tmp_path / "none.safetensors", tmp_path / "out"
    pruned = ("--model", small, "--augmentations", 4, "--sparsity", 1, "--layers", "2", "--out", path)
    assert invoke("trace", photo, *pruned).exit_code == 0
    options = ("--model", small, "--layer", 2, "--steps", 1, "--trace", path, "--out", out)
    result = invoke("visualize", 3, *options)
    message = "all weights of channel 3 of layer '2' are zero: nothing can excite it"
    assert result.exit_code == 0 and f"\nnot drawn: Channel 3, SPADE trace “none”: {message}\n" in result.stderr
    assert Parsed((out / "index.html").read_text()).texts("p", style="missing") == [f"not drawn: {message}"]
    dense, cut = json.loads((out / "report.json").read_text())["features"][0]["cells"]
    assert dense["files"] == ["dense.png"] and cut["files"] == [] and cut["missing"] == message
    assert not (out / "none.png").exists()


def test_a_dead_feature_leaves_its_cells_empty_beside_the_others(small, tmp_path):
    """Only if no picture can be drawn does the command fail."""
    broken = "from small_network import loaded\ndef network():\n    model = loaded()\n"
    (tmp_path / "dead_network.py").write_text(f"{broken}    model.module[2].weight.data[5] = 0\n    return model\n")
    options = ("--model", "dead_network:network", "--layer", 2, "--steps", 1, "--out", tmp_path / "out")
    message = "all weights of channel 5 of layer '2' are zero: nothing can excite it"
    assert invoke("visualize", 5, 3, *options).exit_code == 0
    (dead,), (alive,) = (one["cells"] for one in json.loads((tmp_path / "out/report.json").read_text())["features"])
    assert dead["missing"] == message and dead["files"] == dead["activations"] == []
    assert alive["missing"] is None and alive["files"] == ["dense-3.png"]
    result = invoke("visualize", 5, *options)
    assert result.exit_code == 2 and f"error: nothing could be drawn: {message}" in result.stderr


def test_a_trace_that_lost_the_decision_and_one_that_does_not_know(small, photo, tmp_path):
    out, path = tmp_path / "out", tmp_path / "lost.safetensors"
    pruned = ("--model", small, "--augmentations", 4, "--sparsity", 1, "--layers", 6, "--out", path)
    assert invoke("trace", photo, *pruned).exit_code == 0
    lost = Trace.load(path)
    unknown = Trace.load(path)
    del unknown.header["decision"]
    unknown.save(tmp_path / "unknown.safetensors")
    options = ("--model", small, "--layer", 2, "--steps", 1, "--trace", path, "--out", out)
    assert invoke("visualize", 3, *options, "--trace", tmp_path / "unknown.safetensors").exit_code == 0
    parsed = Parsed((out / "index.html").read_text())
    decision = lost.decision
    assert decision is not None and not decision.kept
    before, after = (f"“{NAMES[one]}” ({one})" for one in (decision.class_before, decision.class_after))
    told = f"{decision.probability_before:.1%} → {decision.probability_after_of_class_before:.1%}"
    _, known, silent = parsed.texts("figcaption")
    assert known.endswith(
        f"removed in 1 layer on that sample, {before}: probability {told} lost the decision to {after}"
    )
    assert parsed.texts("span", style="lost") == [f"lost the decision to {after}"]
    assert silent.endswith("removed in 1 layer")


def test_heads_of_the_figure(small, trace, photo, tmp_path, monkeypatch):
    heads = []
    monkeypatch.setattr("spade_fast.cli.feature_pictures.draw_pictures", lambda _, found, *__: heads.extend(found))
    options = ("--model", small, "--steps", 1, "--count", 2, "--trace", trace, "--start", photo)
    assert invoke("visualize", 3, 1, *options, "--out", tmp_path / "out").exit_code == 0
    names = ["Start", "Dense network, 1", "Dense network, 2", "FastSPADE trace “one”, 1", "FastSPADE trace “one”, 2"]
    assert [head.heading for head in heads] == names
    assert heads[0].captions[0] == "photo.png" and heads[3].captions[:1] == ["made for photo.png"]
    assert list(heads[1].captions) == list(heads[2].captions) == list(heads[4].captions) == []


def test_the_figure_has_gaps_between_pictures(small, tmp_path):
    out = tmp_path / "out"
    assert invoke("visualize", 3, 1, "--model", small, "--steps", 1, "--count", 3, "--out", out).exit_code == 0
    with Image.open(out / "overview.png") as overview:
        grey = np.asarray(overview.convert("L"), int)
    row = grey[:, 80:][grey.shape[0] * 2 // 3] < 250  # right of the names of the rows
    assert (np.diff(row.astype(int)) == 1).sum() == 3, "three pictures, each after white"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("dig", {}, "the network has no class 'dig': did you mean 'dog' (3)?"),
        ("4", {}, "index of the model must lie between 0 and 3, got 4"),
        ("12", {"--layer": "2"}, "index of layer '2' must lie between 0 and 11, got 12"),
        ("dog", {"--layer": "2"}, "a channel of layer '2' is given by its index, got 'dog'"),
        ("1", {"--layer": "22"}, "the model has no layer '22': did you mean '2'?"),
        ("1", {"--steps": "0"}, "steps must be at least 1, got 0"),
        ("1", {"--seed": "-1"}, "seed must lie between 0 and"),
        ("1", {"--neuron": None}, "a neuron needs a layer"),
        (
            "dog",
            {"--model": "small_network:norm"},
            "the network brings no class names: give its index instead of 'dog'",
        ),
        (
            "1",
            {"--model": "small_network:norm", "--trace": "one.safetensors"},
            "was not made from the given",
        ),
        (
            "1",
            {"--trace": "overview.safetensors"},
            "other than 'dense', 'start', 'overview', got overview.safetensors",
        ),
        ("1", {"--out": "photo.png/out"}, "cannot write into the output folder"),
        ("1", {"--method": "mako"}, "unknown method 'mako': did you mean 'maco'?"),
        ("1", {"--views": "0"}, "views must be at least 1, got 0"),
        ("1", {"--count": "0"}, "count must be at least 1, got 0"),
        ("1", {"--count": "2", "--model": "small_network:norm"}, "several pictures cannot be compared"),
        ("1", {"--start": "none.png"}, "no such image file: none.png"),
        ("1", {"--start": "one.safetensors"}, "not an image file"),
        ("ant 9", {}, "index of the model must lie between 0 and 3, got 9"),
        ("Dog 3", {}, "class “dog” (3) is given twice"),
        (
            "photo.png",
            {},
            "the network has no class 'photo.png'; for the units that a photo excites, give --units auto",
        ),
        ("demo", {}, "the network has no class 'demo'; for the units that a photo excites, give --units auto"),
        ("1", {"--layer": "encoder"}, "the model has no layer 'encoder': it has, for example, 0, 2, 6"),
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
