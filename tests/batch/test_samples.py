"""Which files of a folder, or of a pattern, are samples."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner  # noqa: E402

from spade_fast import InputError  # noqa: E402
from spade_fast.batch import run  # noqa: E402
from spade_fast.batch.samples import find_samples, skipped_text  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.inputs.networks import load_model  # noqa: E402

Image.init()  # fills Image.SAVE

FORMATS = {
    ".jpg": "JPEG",
    ".JPEG": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".pgm": "PPM",
    ".ppm": "PPM",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".TIFF": "TIFF",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
}


@pytest.fixture
def folder(tmp_path):
    """A folder as it comes from a Mac by way of a zip file and Windows: two photos among other things."""
    folder = tmp_path / "photos"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8))
    for place in ("", "sub", "__MACOSX/sub", ".hidden"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        image.save(folder / place / "a.png")
    for name in ("._a.png", ".b.png", "Thumbs.db", ".DS_Store", "desktop.ini", "sub/._a.png", "__MACOSX/._a.png"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    for name in ("notes.txt", "a.eps", "sub/a.heic", "README"):
        (folder / name).write_bytes(b"text")
    return folder


def test_all_formats_are_taken(tmp_path, small):
    loaded = load_model(small)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    for suffix, name in FORMATS.items():
        if name in Image.SAVE:
            image = Image.fromarray(pixels)
            (image.convert("L") if suffix == ".pgm" else image).save(tmp_path / f"a{suffix}", name)
    expected = sorted(path.name for path in tmp_path.glob("a.*"))
    found = find_samples(tmp_path)
    assert found.ids == expected and len(expected) > 10
    assert all(found.load(index, loaded).shape == (1, 3, 16, 16) for index in range(len(found.ids)))


def test_hidden_and_other_files_are_skipped_and_counted(folder):
    found = find_samples(folder)
    assert found.ids == ["a.png", "sub/a.png"]
    # two folders, and six files outside them
    assert found.skipped == {"hidden": 8, "other": 4}
    assert skipped_text(found.skipped) == " (skipped 8 hidden or system files, 4 files that are not photos)"
    assert skipped_text({"hidden": 1, "other": 1}) == " (skipped 1 hidden or system file, 1 file that is not a photo)"
    assert skipped_text({"hidden": 0}) == "" and find_samples([3]).skipped == {}


def test_patterns_take_what_they_match_but_no_system_files(folder):
    found = find_samples(f"{folder}/**/*.png")
    assert found.ids == ["a.png", "sub/a.png"] and found.skipped["hidden"] == 1  # __MACOSX/sub/a.png
    assert find_samples(f"{folder}/.hidden/*").ids == ["a.png"] and find_samples(f"{folder}/*.txt").ids == ["notes.txt"]


def test_a_folder_without_photos(folder):
    for path in (folder / "a.png", folder / "sub/a.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no images in folder .*\.jfif.* \(skipped 8 hidden .*, 4 files"):
        find_samples(folder)


def test_skipped_files_are_told(small, folder, tmp_path):
    out = tmp_path / "out"
    settings = {"model": small, "sparsity": 0.5, "augmentations": 2, "workers": 0}
    summary = run(folder, out, **settings)
    assert summary.finished == 2 and summary.skipped == {"hidden": 8, "other": 4}
    options = ["--model", small, "--sparsity", "0.5", "--augmentations", "2", "--workers", "0", "--out", str(out)]
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(app, ["batch", str(folder), *options, *more])
        assert result.exit_code == 0, result.output
        assert "2 samples (skipped 8 hidden or system files, 4 files that are not photos)" in result.stdout
    assert json.loads((out / "run.json").read_text())


def test_items_are_read_as_files_are(small, tmp_path):
    loaded = load_model(small)
    exif = Image.Exif()
    exif[274] = 6
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.dstack([noise, noise[..., 0]])).save(tmp_path / "transparent.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    paths = sorted(tmp_path.glob("*.png"))
    files, items = find_samples(f"{tmp_path}/*.png"), find_samples([(Image.open(path), 0) for path in paths])
    plain = loaded.preprocess(Image.fromarray(noise))[0]
    for index, path in enumerate(paths):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sample = items.load(index, loaded)
            assert sample.equal(files.load(index, loaded)) and not sample.equal(plain)
        # Once for the item and once for the file.
        cautions = [f"Transparent parts are shown on the mean colour of the network's input, RGB {loaded.ground}."] * 2
        assert [str(one.message) for one in said] == cautions * (path.name == "transparent.png")
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:700])
    with pytest.raises(ValueError, match="not an image file, or damaged: the image"):
        find_samples([Image.open(tmp_path / "cut.png")]).load(0, loaded)


@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "photo.png"])
def test_pipes_in_the_place_of_samples(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"Not a regular file: .*{name}"):
        find_samples(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    found = find_samples(tmp_path)
    assert found.ids == ["one.png"] and found.skipped == {"hidden": 0, "other": 1}
