"""The gallery of a batch: its pages, made from the folder alone."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from batches import make_photos, run_small  # noqa: E402
from test_page import HOSTILE, Parsed  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast import Trace  # noqa: E402
from spade_fast.batch.results import (  # noqa: E402
    Results,
    read_report,
    report_file,
)
from spade_fast.batch.thumbnails import thumbnail  # noqa: E402
from spade_fast.cli import gallery  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.cli.gallery import Gallery  # noqa: E402
from spade_fast.inputs import LoadedModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")
METHODS = ("saliency", "gradcam")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def batch_options(model):
    """Return the options of the command for the settings of `out`."""
    shared = ["--model", model, "--sparsity", 0.5, "--layers", "2", "--augmentations", 6]
    return [*shared, "--methods", ",".join(METHODS)]


@pytest.fixture
def out(small, tmp_path):
    """A batch of four photos, of which one cannot be read."""
    make_photos(tmp_path / "photos", 3)
    (tmp_path / "photos/bad.png").write_text("x")
    run_small(tmp_path / "photos", tmp_path / "out", small, methods=METHODS, layers="2")
    return tmp_path / "out"


def lose(out, name):
    """Let a sample's trace predict another class: ``dog`` with 60 %."""
    path = out / "traces" / f"{name.replace('/', '%2F')}.safetensors"
    made = Trace.load(path)
    before = made.decision
    made.decision = replace(before, class_after=(before.class_before + 1) % 4, probability_after=0.6)
    made.save(path)


def samples(parsed):
    return {title: text for title, text in zip(parsed.texts("h3"), parsed.texts("article"), strict=True)}


@pytest.mark.parametrize("packed", [False, True])
def test_a_card_per_sample(small, out, packed):
    if packed:
        run_small(out.parent / "photos", out, small, methods=METHODS, pack=2, layers="2")
        assert not [*out.glob("traces/*")]
    made = Gallery(out)
    assert made.counts == {"kept": 3, "failed": 1} and made.write() == out / "index.html"
    html = (out / "index.html").read_text()
    parsed = Parsed(html)
    found = samples(parsed)
    assert list(found) == ["00.png", "01.png", "sub/02.png", "bad.png"]
    assert parsed.texts("h1") == ["4 samples"] and parsed.texts("h2") == ["Kept the decision", "Failed"]
    assert "not an image file" in found["bad.png"] and not parsed.all("nav")
    images = {attributes["alt"]: attributes["src"] for _, attributes, _ in parsed.all("img")}
    assert len(images) == 3 * (1 + 2 * len(METHODS)) and "Grad-CAM, trace of sub/02.png" in images
    assert not parsed.all("script", "link") and all(
        src.startswith("data:image/jpeg;base64,") for src in images.values()
    )
    for name in Results(out):
        trace = Results(out)[name]
        decision, names = trace.decision, ("ant", "bee", "cat", "dog")
        assert f"Dense network: {names[decision.class_before]} {decision.probability_before:.1%}" in found[name]
        assert f"SPADE trace: {names[decision.class_after]} {decision.probability_after:.1%}" in found[name]
        assert f"{trace.sparsity:.1%} removed in 1 layer" in found[name]
        assert "error limit" not in found[name] and "mean of" not in found[name]


def test_what_automatic_sparsity_found(small, out):
    options = {"sparsity": "auto", "keep": (1.0, 0.5), "solver": "sparsegpt", "methods": METHODS, "draws": 2}
    run_small(out.parent / "photos", out.parent / "auto", small, layers="2", **options)
    path = out.parent / "auto/traces/sub%2F02.png.safetensors"
    made = Trace.load(path)
    made.header["traces_lost"] = 3
    made.save(path)
    found = samples(Parsed(Gallery(path.parents[1]).write().read_text()))
    for name, made in Results(path.parents[1]).items():
        share, before = made.auto.score / made.auto.dense, ("ant", "bee", "cat", "dog")[made.decision.class_before]
        assert f"removed in 1 layer: error limit {made.auto.error:.3f} keeps {share:.1%} of {before}" in found[name]
        assert ("less than asked for" in found[name]) == (not made.auto.kept)
        lost = ", of which 3 lost the decision" if name == "sub/02.png" else ""
        assert f"Maps of the trace: mean of 4 traces{lost}" in found[name]
        assert ("of which" in found[name]) == bool(lost)


def test_what_is_kept_is_named(small, out):
    run_small(
        out.parent / "photos",
        out.parent / "rather",
        small,
        layers="2",
        sparsity="auto",
        methods=METHODS,
        target="small_network:rather",
    )
    page = Gallery(out.parent / "rather").write().read_text()
    for name, made in Results(out.parent / "rather").items():
        assert f"keeps {made.auto.share:.1%} of {made.target}" in samples(Parsed(page))[name]


def test_the_photo_and_the_maps_are_those_of_the_sample(out):
    Gallery(out).write()
    images = {one["alt"]: one["src"] for _, one, _ in Parsed((out / "index.html").read_text()).all("img")}

    def shown(alt):
        with Image.open(io.BytesIO(base64.b64decode(images[alt].partition(",")[2]))) as picture:
            return np.asarray(picture.convert("L"), float)

    with Image.open(out.parent / "photos/00.png") as photo:
        seen = photo.resize((25, 20), Image.Resampling.BILINEAR).crop((4, 2, 20, 18)).convert("L")
    assert np.abs(shown("photo of 00.png") - np.asarray(seen, float)).mean() < 12
    assert np.abs(shown("photo of 00.png") - shown("photo of 01.png")).mean() > 16
    found = Results(out).maps("00.png")["trace.saliency"].numpy()
    assert np.corrcoef(shown("Saliency, trace of 00.png").ravel(), found.ravel())[0, 1] > 0.7


def test_samples_that_lost_the_decision_come_first(small, out):
    lose(out, "sub/02.png")
    made = Gallery(out)
    assert made.counts == {"lost": 1, "kept": 2, "failed": 1}
    made.write()
    parsed = Parsed((out / "index.html").read_text())
    assert list(samples(parsed)) == ["sub/02.png", "00.png", "01.png", "bad.png"]
    assert parsed.texts("h2")[0] == "Lost the decision" and "Lost the decision: 1." in parsed.texts("header")[0]
    marked = [title for title, text in samples(parsed).items() if "lost the decision" in text]
    assert marked == ["sub/02.png"] and parsed.texts("span", style="lost") == ["lost the decision"]


def test_commands_write_it_and_count_lost_decisions(small, out):
    options = batch_options(small)
    again = ["batch", out.parent / "photos", *options, "--workers", 0, "--out", out]
    result = invoke(*again)
    assert result.exit_code == 1 and result.stdout.splitlines()[-2:] == [str(out / "index.html"), str(out)]
    assert "lost the decision" not in result.output and (out / "index.html").exists()
    lose(out, "00.png")
    (out.parent / "photos/bad.png").unlink()
    (out / "errors/bad.png.json").unlink()
    assert "warning: 1 trace lost the decision: see" in invoke(*again).stderr
    assert "span" not in (out / "index.html").read_text(), "nothing new was done"
    result = invoke("index", out)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == str(out / "index.html")
    assert Parsed((out / "index.html").read_text()).texts("h3")[0] == "00.png"


def test_pages_that_are_missing_are_written_again(small, out, monkeypatch):
    monkeypatch.setattr(gallery, "_PICTURES_PER_PAGE", 10)
    monkeypatch.setattr(gallery, "_LEAST_PER_PAGE", 1)
    (out.parent / "photos/bad.png").unlink()
    (out / "errors/bad.png.json").unlink()
    options = batch_options(small)
    for missing in ("index.html", "gallery/2.html"):
        Gallery(out).write()
        (out / missing).unlink()
        result = invoke("batch", out.parent / "photos", *options, "--workers", 0, "--out", out)
        assert result.exit_code == 0 and "3 finished (3 in earlier runs)" in result.stdout
        assert (out / "index.html").exists() and (out / "gallery/2.html").exists(), missing


def test_many_samples_are_paged(out, monkeypatch):
    monkeypatch.setattr(gallery, "_PICTURES_PER_PAGE", 10)
    monkeypatch.setattr(gallery, "_LEAST_PER_PAGE", 1)
    (out / "gallery").mkdir()
    for stale in ("3.html", "07.html", "notes.html"):
        (out / "gallery" / stale).write_text("old")
    Gallery(out).write()
    assert sorted(path.name for path in (out / "gallery").iterdir()) == ["2.html", "notes.html"]
    first, second = (Parsed((out / name).read_text()) for name in ("index.html", "gallery/2.html"))
    assert [*samples(first), *samples(second)] == ["00.png", "01.png", "sub/02.png", "bad.png"]
    assert [one["href"] for _, one, _ in first.all("a")] == ["gallery/2.html"] * 2
    assert [one["href"] for _, one, _ in second.all("a")] == ["../index.html"] * 2
    assert second.texts("strong") == ["2"] * 2
    monkeypatch.setattr(gallery, "_MOST_SAMPLES", 1)
    Gallery(out).write()
    only = Parsed((out / "index.html").read_text())
    assert list(samples(only)) == ["00.png"] and "the first 1; index.parquet has them all" in only.texts("header")[0]
    assert only.texts("h1") == ["4 samples"] and not (out / "gallery/2.html").exists()


def test_what_is_missing_or_damaged_is_left_out(out):
    path = out / "reports/00.png.json"
    path.write_bytes(report_file({**read_report(path), "thumbnail": "////", "class_names": None}))
    (out / "reports/01.png.json").unlink()
    cut = out / "traces/sub%2F02.png.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    made = Gallery(out)
    assert made.counts == {"kept": 2, "damaged": 1, "failed": 1}
    (out / "maps/01.png.safetensors").write_bytes(b"cut")
    made.write()
    parsed = Parsed((out / "index.html").read_text())
    found = samples(parsed)
    assert "class " in found["00.png"] and "class " in found["01.png"]
    assert "its maps cannot be shown" in found["01.png"]
    alts = [one["alt"] for _, one, _ in parsed.all("img")]
    assert alts == [f"{title}, {which} of 00.png" for title in ("Saliency", "Grad-CAM") for which in ("dense", "trace")]
    assert "traces/sub%2F02.png.safetensors" in found


def test_hostile_ids(small, tmp_path):
    class Hostile(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise ValueError(HOSTILE)

    run_small(Hostile(), tmp_path / "out", small)
    Gallery(tmp_path / "out").write()
    parsed = Parsed((tmp_path / "out/index.html").read_text())
    assert f"ValueError: {HOSTILE}" in samples(parsed)["0"] and not parsed.all("img")


def test_no_samples_and_other_folders(out, tmp_path):
    for path in [*out.glob("traces/*"), *out.glob("errors/*")]:
        path.unlink()
    Gallery(out).write()
    assert Parsed((out / "index.html").read_text()).texts("h1") == ["0 samples"]
    result = invoke("index", tmp_path)
    assert result.exit_code == 2 and "not the folder of a batch" in result.stderr


@pytest.mark.parametrize(("shape", "size"), [((3, 300, 200), (75, 112)), ((1, 8, 8), (8, 8)), ((3, 1000, 1), (1, 112))])
def test_thumbnails(shape, size):
    model = LoadedModel("x", torch.nn.Identity(), (0.5,) * shape[0], (0.25,) * shape[0])
    encoded = thumbnail(torch.full((1, *shape), 1.0), model)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.size == size and np.abs(np.asarray(picture, float) - 191).max() <= 3
    assert thumbnail(torch.zeros(1, 4, 8, 8), model) is None and thumbnail(torch.zeros(1, 2, 8, 8), model) is None
