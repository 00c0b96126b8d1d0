"""Results are those of the sample and run that they are asked for; damage is found, and made good by the next run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")
parquet = pytest.importorskip("pyarrow.parquet")

from batches import contents, make_photos, settings  # noqa: E402

from spade_fast import InvalidValueError, UnknownSampleError, UserError  # noqa: E402
from spade_fast.batch import OutputError, Results, Summary, run, write_index  # noqa: E402
from spade_fast.batch.results import read_report, report_file  # noqa: E402

Again = Callable[[], Summary]


@pytest.fixture
def out(small, tmp_path) -> Path:
    make_photos(tmp_path / "photos", 3)
    run(tmp_path / "photos", tmp_path / "out", **settings(small, methods=["saliency"]), workers=0)
    return tmp_path / "out"


@pytest.fixture
def again(small, tmp_path, out) -> Again:
    return lambda: run(tmp_path / "photos", out, **settings(small, methods=["saliency"]), workers=0)


def flip(path: Path, place: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)


def swap(one: Path, other: Path) -> None:
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)


def other_run(small, tmp_path) -> Path:
    options = settings(small, methods=["saliency"], augmentations=7)
    run(tmp_path / "photos", tmp_path / "other", **options, workers=0)
    return tmp_path / "other"


def read(results: Results, kind: str, name: str) -> object:
    return results[name] if kind == "traces" else results.maps(name)


@pytest.mark.parametrize("kind", ["traces", "maps"])
def test_swapped_files(out, kind):
    swap(out / kind / "00.png.safetensors", out / kind / "01.png.safetensors")
    for name, other in (("00.png", "01.png"), ("01.png", "00.png")):
        with pytest.raises(InvalidValueError, match=rf"{name}.safetensors was made from sample '{other}', not '{name}"):
            read(Results(out), kind, name)
    read(Results(out), kind, "sub/02.png")


@pytest.mark.parametrize("kind", ["traces", "maps"])
def test_files_of_another_run(small, tmp_path, out, kind):
    other = other_run(small, tmp_path)
    name = f"{kind}/00.png.safetensors"
    (out / name).write_bytes((other / name).read_bytes())
    with pytest.raises(InvalidValueError, match=r"00.png.safetensors was made by a run of other settings"):
        read(Results(out), kind, "00.png")


@pytest.mark.parametrize("kind", ["traces", "maps"])
@pytest.mark.parametrize("foreign", [False, True])
def test_swapped_members_of_packs(small, tmp_path, out, kind, foreign):
    source = other_run(small, tmp_path) if foreign else out
    run(tmp_path / "photos", out, **settings(small, methods=["saliency"]), workers=0, pack=9)
    (pack,) = out.glob("packs/*")
    names = {f"{kind}/00.png.safetensors": f"{kind}/01.png.safetensors"}
    with ZipFile(pack) as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
        comment = archive.comment
    files = {entry.filename: found for entry, found in members}
    if foreign:
        changed = {name: (source / name).read_bytes() for name in names}
    else:
        changed = {one: files[other] for name, of in names.items() for one, other in ((name, of), (of, name))}
    with ZipFile(pack, "w") as archive:
        archive.comment = comment
        for entry, found in members:
            archive.writestr(entry, changed.get(entry.filename, found))
    with pytest.raises(InvalidValueError, match="by a run of other settings" if foreign else "from sample '01.png'"):
        read(Results(out), kind, "00.png")
    read(Results(out), kind, "sub/02.png")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("maps/00.png.safetensors", lambda path: path.write_bytes(b"")),
        ("maps/00.png.safetensors", lambda path: flip(path, -1)),
        ("maps/00.png.safetensors", lambda path: flip(path, 20)),
        ("traces/00.png.safetensors", lambda path: flip(path, -1)),
        ("traces/00.png.safetensors", lambda path: flip(path, 20)),
        ("traces/00.png.safetensors", lambda path: path.write_bytes(b"")),
        ("reports/00.png.json", lambda path: path.write_text('{"together": 1e99}')),
        ("reports/00.png.json", lambda path: path.write_text('{"together": Infinity}')),
        ("reports/00.png.json", lambda path: path.write_text("[" * 100_000)),
        ("reports/00.png.json", lambda path: path.write_text("")),
        (
            "reports/00.png.json",
            lambda path: path.write_text(path.read_text().replace('er": ', 'er": 1')),
        ),
    ],
)
def test_damaged_samples_are_done_again_and_the_rest_is_kept(out, again, name, damage):
    before, kept = contents(out), (out / "traces/01.png.safetensors").stat().st_mtime_ns
    damage(out / name)
    states = write_index(out)
    assert states == {"finished": 2, "damaged": 1}
    rows = {row["file"]: row for row in parquet.read_table(out / "index.parquet").to_pylist()}
    assert rows["traces/00.png.safetensors"]["state"] == "damaged"
    if not name.startswith("reports"):
        with pytest.raises(InvalidValueError, match=r"00.png.safetensors is"):
            read(Results(out), name.split("/")[0], "00.png")
    summary = again()
    assert (summary.before, summary.finished) == (2, 1) and contents(out) == before
    assert (out / "traces/01.png.safetensors").stat().st_mtime_ns == kept
    assert write_index(out) == {"finished": 3}


@pytest.mark.parametrize(("kind", "suffix"), [("maps", "safetensors"), ("reports", "json")])
def test_swapped_maps_and_reports_are_made_again(out, again, kind, suffix):
    before = contents(out)
    swap(out / kind / f"00.png.{suffix}", out / kind / f"01.png.{suffix}")
    assert write_index(out) == {"finished": 1, "damaged": 2}
    assert again().finished == 2 and contents(out) == before and write_index(out) == {"finished": 3}


@pytest.mark.parametrize("value", [1e99, -1, 2**31, "3", [1], {"a": 1}])
def test_reports_with_a_right_hash_that_make_no_sense(out, value):
    path = out / "reports/00.png.json"
    report = read_report(path)
    assert report is not None and report["together"] == 1
    path.write_bytes(report_file({**report, "together": value}))
    assert write_index(out) == ({"finished": 3} if value == -1 else {"finished": 2, "damaged": 1})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": NaN}', "[]", '"x"', "9" * 5000])
def test_a_hostile_run_file(out, text):
    (out / "run.json").write_text(text)
    with pytest.raises(InvalidValueError, match=r"run.json is missing or damaged"):
        Results(out)


def test_pipes_in_the_folder(out):
    for name in ("traces/00.png.safetensors", "reports/01.png.json", "packs/a.zip", "errors/b.json"):
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    with pytest.raises(UserError, match="Not a regular file"):
        Results(out)["00.png"]
    assert write_index(out) == {"finished": 1, "damaged": 3}
    (out / "run.json").unlink()
    os.mkfifo(out / "run.json")
    with pytest.raises(UserError, match="Not a regular file"):
        Results(out)


@pytest.mark.parametrize("kind", ["traces", "maps", "reports"])
def test_a_run_into_pipes(out, again, kind):
    (path,) = (out / kind).glob("00.png*")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OutputError, match=rf"{path} is a pipe, a socket or a device"):
        again()
    path.unlink()
    assert again().finished == (0 if kind == "reports" else 1), "a report may be lost"


def test_another_sample_in_the_place_of_one(out):
    (out / "traces/01.png.safetensors").write_bytes((out / "traces/00.png.safetensors").read_bytes())
    assert write_index(out) == {"finished": 2, "damaged": 1}


def compressed(pack: Path) -> None:
    """As someone might who repacks a batch to save space; or who makes one that unpacks to 1000 times its size."""
    with ZipFile(pack) as archive:
        members, comment = [(entry.filename, archive.read(entry)) for entry in archive.infolist()], archive.comment
    with ZipFile(pack, "w", ZIP_DEFLATED) as archive:
        archive.comment = comment
        for name, found in members:
            archive.writestr(name, found)
        archive.writestr("traces/zeros.safetensors", bytes(10**7))


def overlapping(pack: Path) -> None:
    """Members that share their bytes, so that they are larger together than the file."""
    with ZipFile(pack) as archive:
        entries, comment = archive.infolist(), archive.comment
    with ZipFile(pack, "a") as archive:
        archive.comment = comment
        for _ in range(20):
            archive.filelist += [entries[0]]
        archive._didModify = True


@pytest.mark.parametrize("change", [compressed, overlapping])
def test_packs_that_are_larger_inside(small, tmp_path, out, again, change, monkeypatch):
    before = contents(out)
    run(tmp_path / "photos", out, **settings(small, methods=["saliency"]), workers=0, pack=9)
    (pack,) = out.glob("packs/*")
    change(pack)
    monkeypatch.setattr(ZipFile, "read", lambda *arguments: pytest.fail("a member was unpacked"))
    monkeypatch.setattr(ZipFile, "open", lambda *arguments: pytest.fail("a member was unpacked"))
    results = Results(out)
    with pytest.raises(UnknownSampleError, match=rf"no traces of sample '00.png'; {pack} is damaged"):
        results["00.png"]
    assert [found.header for found in results.stored()] == [None] and write_index(out) == {"damaged": 1}
    monkeypatch.undo()
    assert again().finished == 3
    assert contents(out) == before and [path.name for path in out.glob("packs/*")] == [f"{pack.name}.damaged"]


def test_errors_have_a_hash(out):
    path = out / "errors/bad.json"
    path.write_bytes(report_file({"id": "bad", "error": "why"}))
    assert write_index(out) == {"finished": 3, "failed": 1}
    path.write_text(json.dumps({"id": "bad", "error": ["why"]}))
    assert write_index(out) == {"finished": 3}


def test_maps_are_those_that_were_written(out):
    maps = Results(out).maps("00.png")
    assert sorted(maps) == ["dense.saliency", "trace.saliency"]
    assert all(torch.isfinite(each).all() for each in maps.values())
