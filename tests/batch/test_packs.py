"""Finished samples in zip files: the same results, and nothing is lost while they are moved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")

from batches import claimed_by_another, contents, make_photos, no_leftovers, run_small, settings, small_job

from spade_fast.batch import OutputError, Results, run, write_index
from spade_fast.batch.store import Store


@pytest.fixture
def photos(tmp_path) -> Path:
    make_photos(tmp_path / "photos", 5)
    return tmp_path / "photos"


def packs(out: Path) -> list[int]:
    """The number of samples in each zip file; none is in two of them."""
    sizes, seen = [], set()
    for path in out.glob("packs/[!.]*.zip"):
        with ZipFile(path) as archive:
            traces = [name for name in archive.namelist() if name.startswith("traces/")]
        assert not seen.intersection(traces)
        seen.update(traces)
        sizes.append(len(traces))
    return sorted(sizes)


@pytest.fixture
def two_layouts(small, photos, tmp_path) -> tuple[Path, Path]:
    """The same batch in single files, and in packs of two."""
    options = settings(small, methods=["saliency"])
    single, packed = tmp_path / "single", tmp_path / "packed"
    run(photos, single, **options, workers=0, samples_per_solve=2)
    run(photos, packed, **options, workers=0, samples_per_solve=1, pack=2)
    return single, packed


def test_packed_results_are_the_same(two_layouts, tmp_path):
    single, packed = two_layouts
    assert packs(packed) == [1, 2, 2] and not [*packed.glob("traces/*"), *packed.glob("maps/*")]
    assert contents(packed) == contents(single)
    singles, found = Results(single), Results(packed)
    assert list(singles) == sorted(found) == ["00.png", "01.png", "03.png", "04.png", "sub/02.png"]
    for name, trace in singles.items():
        assert all(torch.equal(found[name].weight(layer), trace.weight(layer)) for layer in trace.layers)
        maps = found.maps(name)
        assert sorted(maps) == ["dense.saliency", "trace.saliency"]
        assert all(torch.equal(maps[key], value) for key, value in singles.maps(name).items())
    for path in packed.glob("packs/[!.]*"):
        with ZipFile(path) as archive:
            archive.extractall(tmp_path / "unzipped")
    unzipped = {path.name for path in (tmp_path / "unzipped").rglob("*.*")}
    assert contents(tmp_path / "unzipped") == contents(single) and "sub%2F02.png.json" in unzipped


def test_a_run_resumes_after_packs(small, two_layouts, photos):
    single, packed = two_layouts
    options = settings(small, methods=["saliency"])
    assert run(photos, packed, **options, workers=0, pack=2).before == 5
    make_photos(photos / "more", 2)
    summary = run(photos, packed, **options, workers=0)
    assert (summary.before, summary.finished) == (5, 2) and packs(packed) == [1, 2, 2]
    assert run(photos, packed, **options, workers=0, pack=9).before == 7 and packs(packed) == [1, 2, 2, 2]
    assert run(photos, single, **options, workers=0, pack=9).finished == 2 and packs(single) == [7]
    assert contents(single) == contents(packed)


def test_missing_results(small, two_layouts, photos, tmp_path):
    for out in two_layouts:
        with pytest.raises(KeyError, match="no traces of sample 'absent'"):
            Results(out)["absent"]
        assert "absent" not in Results(out) and "00.png" in Results(out)
    run_small(photos, tmp_path / "bare", small)
    with pytest.raises(KeyError, match=r"no maps of sample '00.png'"):
        Results(tmp_path / "bare").maps("00.png")
    with pytest.raises(ValueError, match="not the folder of a batch"):
        Results(photos)


def test_damaged_packs(small, two_layouts, photos):
    single, packed = two_layouts
    cut, changed = [path for path in packed.glob("packs/*") if len(ZipFile(path).namelist()) == 6]
    with ZipFile(changed) as archive:
        trace = archive.infolist()[0]
    damaged = bytearray(changed.read_bytes())
    damaged[trace.header_offset + trace.file_size] ^= 1
    changed.write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged: Bad CRC-32"):
        Results(packed)[trace.filename.removeprefix("traces/").removesuffix(".safetensors")]
    cut.write_bytes(cut.read_bytes()[:-100])
    assert [found.file for found in Results(packed).stored() if found.header is None] == [f"packs/{cut.name}"]
    assert len(Results(packed)) == 3
    summary = run(photos, packed, **settings(small, methods=["saliency"]), workers=0, pack=3)
    assert (summary.before, summary.finished) == (2, 3) and len(Results(packed)) == 5
    assert contents(packed) == contents(single) and packs(packed) == [1, 1, 3]
    aside = {path.name for path in packed.glob("packs/*.damaged")}
    assert aside == {f"{cut.name}.damaged", f"{changed.name}.damaged"}


@pytest.mark.parametrize("kind", ["traces", "maps", "reports"])
def test_damage_in_a_pack_is_made_good(small, two_layouts, photos, kind):
    """Only the damaged sample is made again; the others of its pack are kept."""
    pytest.importorskip("pyarrow")
    single, packed = two_layouts
    options = settings(small, methods=["saliency"])
    pack = max(packed.glob("packs/*"), key=lambda path: len(ZipFile(path).namelist()))
    with ZipFile(pack) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.startswith(kind))
    damaged = bytearray(pack.read_bytes())
    damaged[entry.header_offset + entry.file_size] ^= 1
    pack.write_bytes(damaged)
    assert write_index(packed) == {"finished": 4, "damaged": 1}
    assert run(photos, packed, **options, workers=0, dry_run=True).before == 4 and pack.exists()
    summary = run(photos, packed, **options, workers=0)
    assert (summary.before, summary.finished) == (4, 1) and write_index(packed) == {"finished": 5}
    assert contents(packed) == contents(single) and not pack.exists()
    assert packs(packed) == [1, 2] and len([*packed.glob("traces/*")]) == len([*packed.glob("reports/*")]) == 2
    assert run(photos, packed, **options, workers=0).before == 5


def test_swapped_members_of_a_pack_are_made_again(small, two_layouts, photos):
    single, packed = two_layouts
    pack = max(packed.glob("packs/*"), key=lambda path: len(ZipFile(path).namelist()))
    with ZipFile(pack) as archive:
        members, comment = [(entry, archive.read(entry)) for entry in archive.infolist()], archive.comment
    one, other = (place for place, (entry, _) in enumerate(members) if entry.filename.startswith("traces/"))
    members[one], members[other] = (members[one][0], members[other][1]), (members[other][0], members[one][1])
    with ZipFile(pack, "w") as archive:
        archive.comment = comment
        for entry, found in members:
            archive.writestr(entry, found)
    assert run(photos, packed, **settings(small, methods=["saliency"]), workers=0).finished == 2
    assert contents(packed) == contents(single)


def test_packs_do_not_write_elsewhere(small, two_layouts, photos):
    _, packed = two_layouts
    pack = max(packed.glob("packs/*"), key=lambda path: len(ZipFile(path).namelist()))
    with ZipFile(pack) as archive:
        members, comment = [(entry, archive.read(entry)) for entry in archive.infolist()], archive.comment
    with ZipFile(pack, "w") as archive:
        archive.comment = comment
        for entry, found in members:
            entry.filename = entry.filename.replace("/", "/../../", 1)
            archive.writestr(entry, found)
    before = {*packed.parent.rglob("*.*")}
    assert run(photos, packed, **settings(small, methods=["saliency"]), workers=0).finished == 2
    assert {path.parent.parent for path in {*packed.parent.rglob("*.*")} - before} == {packed}


def test_any_damage_to_a_pack(two_layouts):
    single, packed = two_layouts
    pack = max(packed.glob("packs/*"), key=lambda path: path.stat().st_size)
    right = pack.read_bytes()
    with ZipFile(pack) as archive:
        names, directory = archive.namelist(), archive.start_dir
        report = next(entry for entry in archive.infolist() if entry.filename.startswith("reports/"))
    header = [report.header_offset + place for place in range(30 + len(report.filename))]
    for number, place in enumerate([*header, *range(directory, len(right))]):
        damaged = bytearray(right)
        damaged[place] ^= 1 << number % 8
        pack.write_bytes(damaged)
        try:
            found = list(Results(packed).stored())
        except ValueError as error:
            assert "of other settings or another model, or is damaged" in str(error) and place > len(right) - 100
            continue
        whole = sum(stored.header is not None for stored in found)
        assert whole == 5 if place in header else whole >= 3, "of a damaged report no more is lost"
    pack.write_bytes(right)
    assert len(names) == 6 and contents(packed) == contents(single)


def test_reading_while_samples_are_packed(small, photos, tmp_path):
    out = tmp_path / "out"
    job, _ = small_job(photos, out, small)
    run_small(photos, out, small)
    found = Results(out).stored()
    first = next(found)
    Store(job).pack_all(2)
    files = {stored.header["header"]["sample_id"]: stored.file for stored in [first, *found]}
    assert sorted(files) == ["00.png", "01.png", "03.png", "04.png", "sub/02.png"]
    assert [file.split("/")[0] for file in files.values()] == ["traces"] + ["packs"] * 4


def test_packs_of_other_settings_do_not_mix(small, two_layouts, photos, tmp_path):
    other = tmp_path / "other"
    run_small(photos / "00.png", other, small)
    (other / "packs").mkdir()
    pack = next(two_layouts[1].glob("packs/[!.]*"))
    (other / "packs" / pack.name).write_bytes(pack.read_bytes())
    with pytest.raises(ValueError, match=r"zip was made by a run of other settings"):
        run_small(photos, other, small)


@pytest.mark.parametrize("moment", ["write", "unlink", "second unlink"])
def test_killed_while_it_packs(small, photos, tmp_path, moment):
    out = tmp_path / "out"
    run_small(photos, out, small)
    expected = contents(out)
    child = os.fork()
    if child == 0:
        if moment == "write":
            shutil.copyfileobj = lambda *_, **__: os._exit(9)
        else:
            steps = iter([Path.unlink] * (moment != "unlink"))
            Path.unlink = lambda *paths, **options: next(steps, lambda *_, **__: os._exit(9))(*paths, **options)
        run_small(photos, out, small, pack=5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(out.glob("traces/*"))) == 5
    assert packs(out) == ([] if moment == "write" else [5]) and no_leftovers(out) == (moment != "write")
    assert run_small(photos, out, small, pack=3).before == 5
    assert contents(out) == expected and no_leftovers(out) and not [*out.glob("traces/*"), *out.glob("reports/*")]
    assert packs(out) == ([2, 3] if moment == "write" else [5])


def test_samples_claimed_by_others_are_skipped(small, photos, tmp_path):
    out = tmp_path / "out"
    job, _ = small_job(photos, out, small)
    run_small(photos, out, small)
    with claimed_by_another(job, "00.png"):
        Store(job).pack_all(9)
        assert packs(out) == [4] and [path.name for path in out.glob("traces/*")] == ["00.png.safetensors"]
    Store(job).pack_all(9)
    assert packs(out) == [1, 4]


def test_a_full_disk_while_it_packs(small, photos, small_disk):
    out = small_disk / "out"
    run_small(photos, out, small)
    expected = contents(out)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(free - 8 * 1024))
    with pytest.raises(OutputError, match="No space left on device"):
        run_small(photos, out, small, pack=5)
    assert contents(out) == expected and no_leftovers(out) and not packs(out)
    (small_disk / "filler").unlink()
    run_small(photos, out, small, pack=5)
    assert contents(out) == expected and packs(out) == [5]
