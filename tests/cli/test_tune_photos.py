"""The command that searches sparsities for photos, and the commands that use its file."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("typer")
pytest.importorskip("yaml")
Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner  # noqa: E402

from spade_fast import ImageAugmenter, InvalidValueError, PruneConfig, Trace, Tuning, trace, tune  # noqa: E402
from spade_fast.attribution.metrics import auc, insertion_curve  # noqa: E402
from spade_fast.cli import tune_photos  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.cli.options import pruning_options  # noqa: E402
from spade_fast.inputs.networks import load_model  # noqa: E402
from spade_fast.pruning import tuning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photos(photo, tmp_path):
    """Two photos of noise, 40 x 30 and 30 x 50."""
    other = tmp_path / "other.png"
    Image.open(photo).rotate(90, expand=True).resize((30, 50)).save(other)
    return [photo, other]


def dense_maps(module, images, targets):
    """A score: the insertion AUC of the gradient's map, judged on the dense network."""
    dense = copy.deepcopy(module)

    def score(model, i):
        given = images[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(given)[0, targets[i]], given)
        return float(auc(insertion_curve(dense, images[i], gradient.abs().sum(1), targets[i])))

    return score


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("stages", ["auto", "blocks"])
@pytest.mark.parametrize("score", ["insertion", "sparsity"])
def test_command_is_the_search_for_its_score(small, photos, tmp_path, solver, stages, score):
    out = tmp_path / "tuned.yaml"
    options = ["--model", small, "--solver", solver, "--augmentations", 6, "--seed", 3, "--layers", "*"]
    options += ["--keep", 0.95, *(["--score", score] if score != "insertion" else [])]
    options += ["--stages", "blocks", "--candidates", "0.4,0.8", "--rounds", 2] if stages == "blocks" else []
    result = invoke("tune", *photos, *options, "--out", out)
    assert result.exit_code == 0, result.output
    made = Tuning.load(out)
    assert result.stdout.splitlines() == [*made.summary().splitlines(), str(out)]
    loaded = load_model(small)
    images = [loaded.preprocess(Image.open(path))[0] for path in photos]
    targets = [int(loaded.module(image).argmax()) for image in images]
    augmenter = ImageAugmenter(6, loaded.mean, loaded.std, 3)
    samples = [augmenter(image, path.name) for image, path in zip(images, photos, strict=True)]
    same = {"candidates": [0.4, 0.8], "rounds": 2} if stages == "blocks" else {}
    expected = tune(
        loaded.module,
        samples,
        None if score == "sparsity" else dense_maps(loaded.module, images, targets),
        inputs=images,
        solver=solver,
        stages=stages,
        keep=0.95,
        **same,
    )
    assert made.sparsity == expected.sparsity and made.options.get("keep") == expected.options.get("keep")
    for one, other in zip(made.history, expected.history, strict=True):
        assert replace(one, score=None) == replace(other, score=None)
        assert one.score == (None if other.score is None else pytest.approx(other.score, rel=1e-5))
    assert made.settings["photos"] == ["photo.png", "other.png"] and made.settings["score"] == score
    assert ("method" in made.settings) == (score == "insertion") and made.settings["keep"] == 0.95
    assert made.settings["stages"] == ("auto" if stages == "auto" else {"6": ["6"], "2": ["2"], "0": ["0"]})


@pytest.mark.parametrize(
    ("layers", "share", "pruned", "removed"),
    # The network has 3*9*12 + 12*9*12 + 12*4 = 324 + 1296 + 48 weights.
    [("6", 0.5, 48 / 1668, 24 / 1668), ("2,6", 0.5, 1344 / 1668, 672 / 1668), ("*", 0.25, 1.0, 0.25)],
)
def test_a_network_left_mostly_dense_is_said(small, photos, tmp_path, layers, share, pruned, removed):
    out = tmp_path / "tuned.yaml"
    options = ["--model", small, "--augmentations", 4, "--layers", layers, "--candidates", share, "--stages", "layers"]
    result = invoke("tune", photos[0], *options, "--score", "sparsity", "--keep", 0.01, "--out", out)
    assert result.exit_code == 0, result.output
    settings = Tuning.load(out).settings
    assert settings["share_in_pruned_layers"] == pytest.approx(pruned)
    assert settings["share_removed"] == pytest.approx(removed)
    said = f"warning: most of the network stays dense: {pruned:.1%} of its weights lie in layers that are pruned, and "
    assert (f"{said}{removed:.1%} of them all are removed" in result.stderr) == (pruned < 0.5)
    assert ("stays dense" in result.output) == (pruned < 0.5)


def test_other_commands_take_the_file(small, photos, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text('sparsity:\n  "6": 0.5\n  "0": 0.25\n')
    options = ["--model", small, "--augmentations", 4, "--sparsity", path]
    out = tmp_path / "trace.safetensors"
    result = invoke("trace", photos[0], *options, "--out", out)
    assert result.exit_code == 0, result.output
    made = Trace.load(out)
    loaded = load_model(small)
    image, _ = loaded.preprocess(Image.open(photos[0]))
    batches = ImageAugmenter(4, loaded.mean, loaded.std, 0)(image, "photo.png")
    expected = trace(loaded.module, batches, sparsity={"6": 0.5, "0": 0.25})
    assert made.layers == expected.layers == ("0", "6")  # those of the file
    assert all(torch.equal(made.weight(name), expected.weight(name)) for name in made.layers)
    result = invoke("explain", photos[0], *options, "--methods", "saliency", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["traces"]["exact"]["sparsity"] == report["settings"]["sparsity"] == {"6": 0.5, "0": 0.25}
    assert Trace.load(tmp_path / "out" / "trace-exact.safetensors").layers == ("0", "6")
    limited = invoke("trace", photos[0], *options, "--layers", "6", "--out", out)
    assert limited.exit_code == 0 and Trace.load(out).layers == ("6",)
    path.write_text("sparsity: {absent: 0.5}")
    refused = invoke("trace", photos[0], *options, "--out", out)
    assert refused.exit_code == 2 and "layer name 'absent' matches no layer" in refused.stderr


def test_options_replace_those_of_a_file_with_automatic_sparsity(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text("sparsity: auto\nkeep: 0.7\nlayers: [body.*, head]\n")
    config = pruning_options(sparsity=str(path))
    assert config == PruneConfig(sparsity="auto", keep=0.7, layers=["body.*", "head"], seed=0)
    config = pruning_options(sparsity=str(path), keep="0.5", layers="head")
    assert config == PruneConfig(sparsity="auto", keep=0.5, layers=["head"], seed=0)
    path.write_text("sparsity: auto\n")
    assert pruning_options(sparsity=str(path)) == pruning_options() == PruneConfig(seed=0)
    path.write_text("sparsity: {head: 0.5}\n")
    assert pruning_options(sparsity=str(path)).sparsity == {"head": 0.5}
    with pytest.raises(InvalidValueError, match=r"keep has no effect with sparsity .*tuned.yaml"):
        pruning_options(sparsity=str(path), keep="0.9")


def test_localisation(small, photos, tmp_path, monkeypatch):
    seen = []

    def localisation_auc(maps, masks):
        ((found,), (mask,)) = maps, masks
        seen.append((found, mask))
        return (found[mask].mean() / found.mean())[None]

    monkeypatch.setattr(tune_photos, "localisation_auc", localisation_auc)
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in photos:
        mask = Image.new("L", Image.open(path).size)
        mask.paste(1, (0, 0, mask.width // 2, mask.height))
        mask.save(masks / path.name)
    options = ["--model", small, "--augmentations", 4, "--score", "localisation", "--masks", masks]
    options += ["--candidates", 0.5, "--keep", 0.1, "--out", tmp_path / "tuned.yaml"]
    result = invoke("tune", *photos, *options, "--method", "input-x-gradient")
    assert result.exit_code == 0, result.output
    made = Tuning.load(tmp_path / "tuned.yaml")
    assert made.settings["method"] == "input-x-gradient" and made.settings["score"] == "localisation"
    assert len(seen) == 4 and all(found.shape == (16, 16) for found, _ in seen)
    assert all(mask.dtype == torch.bool and mask[:, :8].all() and not mask[:, 9:].any() for _, mask in seen)

    Image.new("L", (40, 30)).save(masks / "photo.png")
    result = invoke("tune", *photos, *options)
    assert (
        result.exit_code == 2
        and "photo.png: the part of the mask that the network sees must have pixels both inside and outside"
        in result.stderr
    )
    Image.new("L", (30, 40)).save(masks / "photo.png")
    result = invoke("tune", *photos, *options)
    assert result.exit_code == 2 and "is not a mask of photo.png: its size is 30x40 instead of 40x30" in result.stderr
    (masks / "other.png").unlink()
    (masks / "photo.png").unlink()
    result = invoke("tune", *photos, *options)
    assert result.exit_code == 2 and "no such image file" in result.stderr


def test_masks_of_all_kinds(small, photo, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tune_photos, "localisation_auc", lambda maps, masks: (seen.append(masks[0]), masks.float().mean())[1]
    )
    exif = Image.Exif()
    exif[274] = 6
    Image.open(photo).save(photo, exif=exif)  # 30 x 40 when upright
    masks = tmp_path / "masks"
    masks.mkdir()
    options = ["--model", small, "--augmentations", 2, "--score", "localisation", "--masks", masks]
    options += ["--candidates", 0.5, "--keep", 0.1, "--layers", 0, "--out", tmp_path / "tuned.yaml"]
    ids = np.zeros((40, 30), np.uint16)
    ids[:14], ids[14:20] = 1, 300
    inside = ids > 0
    rgba = np.full((40, 30, 4), 255, np.uint8)
    rgba[..., 3] *= inside
    palette = Image.fromarray(inside.astype(np.uint8))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for mask, extra in (
        (Image.fromarray(ids), {}),
        (Image.fromarray(np.rot90(ids).copy()), {"exif": exif}),
        (Image.fromarray(rgba), {}),
        (palette, {"transparency": 0}),
        (Image.fromarray(inside), {}),
    ):
        mask.save(masks / "photo.png", **extra)
        result = invoke("tune", photo, *options)
        assert result.exit_code == 0, result.output
        assert seen[-1][:8].all() and not seen[-1][9:].any(), "the upper half"
    Image.new("L", (40, 30), 255).save(masks / "photo.png")
    result = invoke("tune", photo, *options)
    assert result.exit_code == 2 and "its size is 40x30 instead of 30x40" in result.stderr


def test_deletion_is_of_the_dense_network(small, photos, tmp_path, monkeypatch):
    seen = []

    def deletion_curve(model, images, maps, target):
        seen.append((next(model.parameters()).flatten()[:9].clone(), maps.clone()))
        return maps.flatten(1)[:, ::50]

    monkeypatch.setattr(tune_photos, "deletion_curve", deletion_curve)
    monkeypatch.setattr(tune_photos, "auc", lambda curve: curve.mean(1))
    options = ["--model", small, "--augmentations", 4, "--score", "deletion", "--layers", "0", "--candidates", 0.8]
    options += ["--stages", "layers", "--keep", 0.01]
    result = invoke("tune", photos[0], *options, "--out", tmp_path / "tuned.yaml")
    assert result.exit_code == 0, result.output
    (before, dense), (after, pruned) = seen
    assert torch.equal(before, after) and not torch.allclose(dense, pruned)
    made = Tuning.load(tmp_path / "tuned.yaml")
    assert made.before == pytest.approx(1 - float(dense.flatten()[::50].mean()))
    assert made.history[0].score == pytest.approx(1 - float(pruned.flatten()[::50].mean()))
    assert made.settings["method"] == "saliency"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"IMAGE": "absent.jpg"}, "no such image file: absent.jpg"),
        ({"--model": "magic"}, "unknown model 'magic'"),
        ({"--model": "small_network:maps"}, "one row of logits"),
        ({"--solver": "both"}, "unknown solver 'both': choose from exact, sparsegpt"),
        ({"--score": "beauty"}, "unknown score 'beauty': choose from insertion, deletion, localisation, sparsity"),
        ({"--score": "localisation"}, "localisation needs a folder of masks"),
        ({"--masks": "."}, "masks are used with the score localisation only, got score 'insertion'"),
        ({"--keep": "90"}, "keep must be above 0 and at most 1, got 90.0: did you mean 0.9?"),
        ({"--keep": "0.5,0.9"}, "keep must be a number, got '0.5,0.9'"),
        ({"--candidates": "0.5,0"}, "with stages='auto', candidates must be shares to keep, above 0"),
        ({"--stages": "blocks", "--candidates": "0"}, "candidates must include a sparsity above 0"),
        ({"--method": "magic"}, "unknown method 'magic'"),
        ({"IMAGE": "."}, ". is a folder, not a photo; name the photos in it: spade-fast tune ./*.jpg"),
        ({"--score": "localization"}, "unknown score 'localization': did you mean 'localisation'?"),
        ({"--score": "localisation", "--masks": "none"}, "no such folder of masks: none"),
        ({"--score": "localisation", "--masks": "."}, "photo.png is not a mask of photo.png: its size is"),
        ({"--score": "deletion", "--method": "gradcam", "--model": "small_network:norm"}, "Grad-CAM cannot be used on"),
        ({"--candidates": "0.5,80"}, "candidates[1] must lie between 0 and 1, got 80.0: did you mean 0.8?"),
        ({"--candidates": "0.5,x"}, "candidates must be a number, got 'x'"),
        ({"--candidates": "0.5,2"}, "candidates[1] must lie between 0 and 1"),
        ({"--stages": "parts"}, "stages must be 'auto', 'blocks', 'layers'"),
        ({"--stages": "block"}, "got 'block': did you mean 'blocks'?"),
        ({"--rounds": "0"}, "rounds must be at least 1"),
        ({"--rounds": "2"}, "rounds must be 1 with stages='auto', got 2"),
        ({"--augmentations": "0"}, "augmentations must be at least 1"),
        ({"--device": "gpu"}, "device 'gpu' cannot be used"),
        ({"--layers": "body.*"}, "body."),
        ({"--out": "absent/tuned.yaml"}, "cannot write the sparsity: folder absent does not exist"),
        ({"--out": "."}, "cannot write the sparsity: . is a folder"),
    ],
)
def test_bad_input_is_one_line(small, photo, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "solve_samples", lambda *_: pytest.fail("work began before the checks"))
    if changes.get("--masks") == ".":
        Image.new("L", (8, 8)).save("mask.png")
        (tmp_path / "masks").mkdir()
        (tmp_path / "mask.png").rename("masks/photo.png")
        changes = {**changes, "--masks": "masks"}
    options = {"--model": small, "--augmentations": "4", "--out": "tuned.yaml", **changes}
    image = options.pop("IMAGE", "photo.png")
    result = invoke("tune", image, *(part for option in options.items() for part in option))
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0] and result.stdout == ""
    assert not list(tmp_path.glob("**/*.yaml"))


@pytest.mark.parametrize("command", ["trace", "explain"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("much", "sparsity must be a number, a file FILE.yaml or auto, got 'much'"),
        ("absent.yaml", "no such sparsity file: absent.yaml"),
        ("list.yml", "list.yml has no entry 'sparsity'"),
        ("high.yaml", "high.yaml: the sparsity of '0' must lie between 0 and 1, got 3"),
    ],
)
def test_bad_sparsities_are_one_line(small, photo, tmp_path, monkeypatch, command, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yml").write_text("[0.5]")
    (tmp_path / "high.yaml").write_text("sparsity: {'0': 3}")
    result = invoke(command, "photo.png", "--model", small, "--sparsity", given, "--out", "made")
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0] and result.stdout == ""
    assert not (tmp_path / "made").exists()


def test_missing_yaml(small, photo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for arguments in (["tune", photo], ["trace", photo, "--sparsity", "tuned.yaml"]):
        result = invoke(*arguments, "--model", small, "--out", tmp_path / "made")
        assert result.exit_code == 2 and "pip install 'spade_fast[cli]'" in result.stderr


def test_help():
    result = invoke("tune", "--help")
    assert result.exit_code == 0 and "insertion" in result.output
