"""The page of the units behind a prediction: which units, on which networks, beside which crops."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("kornia")
Image = pytest.importorskip("PIL.Image")

from test_page import Parsed  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast.attribution.visualization.units import exciting_crop, read_units  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.cli.drawings import Drawing  # noqa: E402
from spade_fast.cli.feature_page import rounded  # noqa: E402
from spade_fast.inputs.networks import load_model, predict  # noqa: E402
from spade_fast.pruning.traces import Trace  # noqa: E402

NETWORKS = """
import torch
from spade_fast.inputs.networks import LoadedModel
from small_network import loaded

def rich():
    model = loaded()
    model.module[6].weight.data.abs_()
    return model

def bare():
    return loaded().module

def broken():
    model = loaded()
    model.module[2].weight.data[5] = 0
    model.module[2].bias.data[5] = -1
    return model

def flat():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    return LoadedModel("flat", module, resize=20, crop=16)

def bright():
    model = loaded()  # whose channel 5 white excites, and nothing near grey
    model.module[0].weight.data[5] = 1 / 27
    model.module[0].bias.data[5] = -1.5
    return model

def against():
    model = loaded()
    model.module[6].weight.data.fill_(-1)
    return model
"""


@pytest.fixture
def photos(small, photo, tmp_path, monkeypatch):
    """Names of four photos in the current folder, and in it a module of more networks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unit_networks.py").write_text(NETWORKS)
    monkeypatch.delitem(sys.modules, "unit_networks", raising=False)
    generator = np.random.default_rng(1)
    names = ["photo.png"]
    for number in range(1, 6):
        names.append(f"{number}.png")
        Image.fromarray(generator.integers(0, 30 * number, (24, 32, 3), dtype=np.uint8)).save(names[-1])
    return names


def invoke(*arguments, model="small_network:loaded", sparsity=0.5):
    options = ("--model", model, "--augmentations", 4, "--sparsity", sparsity, "--steps", 2, "--out", "out")
    return CliRunner().invoke(app, [str(one) for one in ("visualize", *options, *arguments)])


def page(tmp_path):
    return Parsed((tmp_path / "out/index.html").read_text())


def report(tmp_path):
    return json.loads((tmp_path / "out/report.json").read_text())


def test_units_that_carry_the_decision_on_three_networks(photos, tmp_path):
    result = invoke(*photos[:2], "--units", "auto", model="unit_networks:rich")
    assert result.exit_code == 0, result.output
    network = load_model("unit_networks:rich")
    image, pixels = network.preprocess(Image.open("photo.png"))
    target = int(predict(network.module, image).argmax())
    readings = {"dense": read_units(network.module, "3", image, target)}
    for name, photo in zip(("own", "other"), photos, strict=False):
        made = Trace.load(tmp_path / f"out/trace-{name}.safetensors")
        assert made.sample_id == photo
        with made.applied(network.module):
            readings[name] = read_units(network.module, "3", image, target)
    chosen = readings["own"].strongest(12)[:4]
    assert len(chosen) == 4
    found = report(tmp_path)
    assert found["settings"]["layer"] == "3" and found["settings"]["class"] == network.class_name(target)
    assert [one["feature"] for one in found["features"]] == [f"Channel {unit}" for unit in chosen]
    for unit, one in zip(chosen, found["features"], strict=True):
        assert abs(one["share"] - float(readings["own"].shares[unit])) < 1e-5
        *cells, crops = one["cells"]
        for (name, units), cell in zip(readings.items(), cells, strict=True):
            assert cell["files"] == [f"{name}-{unit}.png"] and cell["missing"] is None
            (activation,) = cell["activations"]
            in_photo = float(units.activations[unit])
            captions = [f"activation {rounded(activation)}", f"activation {rounded(in_photo)} in the photo"]
            less = ["less than in the photo: more steps or another seed may excite it more"]
            assert cell["captions"] == captions + less * (activation < in_photo)
            with Image.open(tmp_path / "out" / cell["files"][0]) as picture:
                assert picture.size == (20, 20)
        assert crops["files"] == [f"crop-{unit}-{number}.png" for number in (1, 2)]
        with Image.open(tmp_path / "out" / crops["files"][0]) as crop:
            assert np.array_equal(np.asarray(crop), exciting_crop(pixels, readings["dense"].maps[unit]))
    assert set(found["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert result.stdout.splitlines()[-1] == "out/index.html"

    parsed = page(tmp_path)
    (title,) = parsed.texts("h1")
    assert title == f"What excites the units behind “{network.class_name(target)}”"
    assert parsed.texts("h2")[1:-1] == [f"Channel {unit}" for unit in chosen]
    assert parsed.texts("h3") == ["Dense network", "Trace of the photo", "Trace of another photo"]
    for name, photo, text in zip(("own", "other"), photos, parsed.texts("article")[1:], strict=False):
        decision = Trace.load(tmp_path / f"out/trace-{name}.safetensors").decision
        assert decision is not None and f"Made for {photo}: " in text
        before, after = f"{decision.probability_before:.1%}", f"{decision.probability_after_of_class_before:.1%}"
        label = f"“{network.class_name(decision.class_before)}” ({decision.class_before})"
        assert f"On {photo}, {label}: probability {before} → {after}{', kept' * decision.kept}." in text
    assert result.stderr.splitlines()[0] == "2 traces, up to 12 pictures of 2 steps"
    assert parsed.texts(style="number") == [f"{float(readings['own'].shares[unit]):.1%}" for unit in chosen]
    assert len(parsed.all("img")) == 1 + 4 * 5
    assert not any("no second photo" in one or "that excite it most" in one for one in parsed.texts("p"))
    html = (tmp_path / "out/index.html").read_text()
    assert "http" not in html.replace("http-equiv", "") and not parsed.all("script", "link")
    assert str(tmp_path) not in html


def test_two_photos_of_one_name(photos, tmp_path):
    """What the other photo's trace predicts for the first is told, whatever their names."""
    (tmp_path / "more").mkdir()
    (tmp_path / photos[1]).rename(tmp_path / "more/photo.png")
    assert invoke("photo.png", "more/photo.png", "--units", "3").exit_code == 0
    told = ["On photo.png, predicts" in text for text in page(tmp_path).texts("article")]
    assert told == [True, False, True]


def test_one_photo_and_given_channels(photos, tmp_path):
    assert invoke("photo.png", "--units", "11, 3,11", "--layer", 0, "--count", 2, "--contrast").exit_code == 0
    parsed, found = page(tmp_path), report(tmp_path)
    assert parsed.texts("h2")[1:-1] == ["Channel 11", "Channel 3"] and found["settings"]["layer"] == "0"
    assert any("No second photo was given" in one for one in parsed.texts("p"))
    assert [cell["files"] for cell in found["features"][0]["cells"]] == [
        ["dense-11-1.png", "dense-11-2.png"],
        ["own-11-1.png", "own-11-2.png"],
        ["crop-11-1.png"],
    ]
    assert not (tmp_path / "out/trace-other.safetensors").exists()


@pytest.mark.filterwarnings("default::spade_fast.AssumptionWarning")
def test_what_was_assumed_about_the_network_is_told(photos, tmp_path):
    result = invoke("photo.png", "--units", "3", model="unit_networks:bare")
    assert result.exit_code == 0, result.output
    (note,) = report(tmp_path)["notes"]
    assert "assumed" in note and note in page(tmp_path).texts("figcaption")[0]


def test_fewer_units_than_asked_for(photos, tmp_path):
    result = invoke("photo.png", "--units", "auto:99")
    assert result.exit_code == 0 and "\n99 units were asked for, but only " in result.stderr
    parsed = page(tmp_path)
    assert 0 < len(parsed.texts("h2")) - 2 < 12
    assert any(one.startswith("99 units were asked for, but no other") for one in parsed.texts("p", style="note"))


def test_crops_are_of_the_photo_and_of_those_that_excite_it_most(photos, tmp_path):
    """The brightest photos excite channels most that grow with brightness."""
    network = load_model("small_network:loaded")
    images = [network.preprocess(Image.open(name))[0] for name in photos]
    maps = torch.stack([read_units(network.module, "3", image, 0).maps for image in images])
    assert invoke(*photos, "--units", "auto:1").exit_code == 0
    (row,) = report(tmp_path)["features"]
    unit = int(row["feature"].split()[-1])
    others = sorted(range(1, len(photos)), key=lambda one: -float(maps[one, unit].max()))[:3]
    assert row["cells"][-1]["captions"] == [photos[0], *(photos[one] for one in others)]
    assert any("the 3 that excite it most" in one for one in page(tmp_path).texts("p"))


@pytest.mark.parametrize("options", [(), ("--contrast",)])
def test_a_unit_that_a_trace_cut_off_leaves_its_cell_empty(photos, tmp_path, options):
    assert invoke("photo.png", "--units", "3", *options, sparsity=1).exit_code == 0
    assert page(tmp_path).texts("p", style="missing") == ["not drawn: cut off by this trace"]
    dense, own, _ = report(tmp_path)["features"][0]["cells"]
    assert dense["files"] == ["dense-3.png"] and own["files"] == [] and own["missing"] == "cut off by this trace"


def test_a_unit_that_only_the_photo_excites_leaves_its_cells_empty(photos, tmp_path):
    """Beside another that is drawn; alone, it is an error."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:, 12:] = 255
    Image.fromarray(pixels).save("photo.png")
    options = ("photo.png", "--layer", 1, "--layers", "2", "--units")
    message = "no step of the optimisation excited channel 5, though a photo does; more steps, another seed or a photo"
    result = invoke(*options, "5,3", model="unit_networks:bright")
    assert result.exit_code == 0 and result.stderr.startswith("1 trace, 4 pictures of 2 steps\n"), result.output
    silent, drawn = report(tmp_path)["features"]
    for cell in silent["cells"][:2]:
        assert cell["missing"].startswith(message) and cell["files"] == []
    assert silent["cells"][2]["files"] == ["crop-5-1.png"]
    assert [cell["files"] for cell in drawn["cells"][:2]] == [["dense-3.png"], ["own-3.png"]]
    result = invoke(*options, 5, model="unit_networks:bright")
    assert result.exit_code == 2 and f"error: nothing could be drawn: {message}" in result.stderr


def test_a_dead_unit_leaves_its_cells_empty(photos, tmp_path):
    """No trace cut it off: it is dead without."""
    result = invoke("photo.png", "--units", "5,3", "--layer", 3, model="unit_networks:broken")
    assert result.exit_code == 0, result.output
    dead, drawn = report(tmp_path)["features"]
    assert all("channel 5 of layer '3' never fires" in cell["missing"] for cell in dead["cells"][:2])
    assert dead["cells"][2]["missing"] == "no photo excites it"
    assert [cell["files"] for cell in drawn["cells"][:2]] == [["dense-3.png"], ["own-3.png"]]


def test_a_photo_to_start_with_is_the_first_column(photos, tmp_path):
    assert invoke("photo.png", "--units", "3,4", "--start", "1.png").exit_code == 0
    for row in report(tmp_path)["features"]:
        assert row["cells"][0]["files"] == ["start.png"] and row["cells"][0]["captions"][0] == "1.png"
    assert page(tmp_path).texts("strong").count("Start") == 2


def test_a_trace_of_the_other_photo_that_lost_its_decision(photos, tmp_path):
    """The page shows it beside the fact that the trace predicts the first photo's class."""
    bias = int(load_model("small_network:loaded").module[6].bias.argmax())
    result = invoke(*photos[:2], "--units", "3", "--layers", "6", sparsity=1)
    other = Trace.load(tmp_path / "out/trace-other.safetensors").decision
    assert result.exit_code == 0 and other is not None and not other.kept and other.class_after == bias
    warnings = page(tmp_path).texts("p", style="warning")
    assert len(warnings) == 2 and "the trace of 1.png lost the decision: it predicts “dog” (3)" in warnings[1]
    cells = report(tmp_path)["features"][0]["cells"]
    assert "lost the decision to “dog” (3)" in cells[2]["captions"]


def test_a_trace_that_lost_the_decision(photos, tmp_path):
    """Without weights the predicted class is that of the largest bias."""
    network = load_model("small_network:loaded")
    image = network.preprocess(Image.open("photo.png"))[0]
    classes = (int(one) for one in (network.module(image).argmax(), network.module[6].bias.argmax()))
    names = [f"“{network.class_name(one)}” ({one})" for one in classes]
    result = invoke("photo.png", "--units", "3", "--layers", "6", sparsity=1)
    message = f"the trace of photo.png lost the decision: it predicts {names[1]} instead of {names[0]}"
    assert names[0] != names[1] and f"warning: {message}" in result.stderr
    assert page(tmp_path).texts("p", style="warning") == [f"Warning: {message}."]
    assert page(tmp_path).texts("span", style="lost") == [f"lost the decision to {names[1]}"]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("none.png", {}, "no such image file: none.png"),
        ("3", {}, "no such image file: 3; with --units the arguments are photos, and channels are given as in --units"),
        ("unit_networks.py", {}, "not an image file, or damaged: unit_networks.py"),
        (".", {}, ". is a folder, not a photo"),
        ("photo.png photo.png", {}, "photos must differ, got photo.png, photo.png"),
        ("photo.png", {"--units": "best"}, "units must be auto, auto:COUNT or channels such as 3,17, got 'best'"),
        ("photo.png", {"--units": "auto:0"}, "units must be auto, auto:COUNT"),
        ("photo.png", {"--units": "3,-1"}, "units must be auto, auto:COUNT"),
        ("photo.png", {"--units": ""}, "units must be auto, auto:COUNT"),
        ("photo.png", {"--units": "3,12"}, "index of layer '3' must lie between 0 and 11, got 12"),
        ("photo.png", {"--layer": "33"}, "the model has no layer '33': did you mean '3'?"),
        ("photo.png", {"--layer": "encoder"}, "the model has no layer 'encoder': it has, for example, 0, 2, 6"),
        ("photo.png", {"--layer": "4"}, "feature map with several positions, but layer '4' returns [1, 12, 1, 1]"),
        ("photo.png", {"--model": "unit_networks:flat"}, "no module of flat returns a feature map"),
        ("photo.png", {"--method": "mako"}, "unknown method 'mako'"),
        ("photo.png", {"--steps": "0"}, "steps must be at least 1, got 0"),
        ("photo.png", {"--start": "none.png"}, "none.png"),
        ("photo.png", {"--trace": "one.safetensors"}, "--trace has no effect with --units"),
        ("photo.png", {"--keep": "0.5"}, "keep has no effect with sparsity 0.5"),
        ("photo.png", {"--layers": "9"}, "'9'"),
        ("photo.png", {"--model": "unit_networks:against"}, "no unit of layer '3' speaks for "),
        ("photo.png", {"--model": "unit_networks:broken", "--units": "5", "--layer": "2"}, "all weights of channel 5"),
        ("photo.png", {"--model": "unit_networks:broken", "--units": "5"}, "channel 5 of layer '3' never fires"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_bad_input_is_one_line(tmp_path, monkeypatch, given, options, message):
    finished = []
    draw = Drawing.draw
    monkeypatch.setattr(Drawing, "draw", lambda *a, **k: finished.append(draw(*a, **k)) or finished[-1])
    flags = [part for option in {"--units": "auto", **options}.items() for part in option]
    result = invoke(*flags, *given.split())
    line = result.stderr.splitlines()[-1]  # after progress, where only a trace or a picture tells
    assert "calibrate" not in result.stderr or "speaks for" in line
    assert (
        result.exit_code == 2
        and line.startswith("error: ")
        and message in line
        and result.stdout == ""
        and not finished
    )
    assert not (tmp_path / "out").exists()
