"""The parts of the trojan study that its figures rest on: pasting, cases, controls, records, archives, tables."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("captum", reason="the study scores Captum's methods")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")

FOLDER = Path(__file__).parents[2] / "studies" / "trojan"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """Import the study's modules as ``python studies/trojan`` does."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def emojis(monkeypatch):
    """Discs, one colour per emoji, instead of the font's pictures."""
    import patches

    def disc(emoji):
        rows, columns = np.mgrid[:100, :100] - 49.5
        picture = np.zeros((100, 100, 4), np.uint8)
        picture[rows**2 + columns**2 < 50**2] = (255, ord(emoji[0]) % 256, 0, 255)
        return Image.fromarray(picture)

    patches._picture.cache_clear()
    monkeypatch.setattr(patches, "_glyph", disc)
    yield
    patches._picture.cache_clear()


def qt_archive(files, version=3, compress=()):
    """Write a Qt resource archive of one folder, following Qt's documentation of the format."""
    names, data, nodes = b"", b"", []

    def add_name(text):
        nonlocal names
        start = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return start

    tail = b"" if version == 1 else struct.pack(">Q", 0)
    folder = add_name("folder")
    nodes.append(struct.pack(">IHII", 0, 2, 1, 1) + tail)
    nodes.append(struct.pack(">IHII", folder, 2, len(files), 2) + tail)
    for name, content in files.items():
        flags = 1 if name in compress else 0
        packed = struct.pack(">I", len(content)) + zlib.compress(content) if flags else content
        nodes.append(struct.pack(">IHHHI", add_name(name), flags, 0, 0, len(data)) + tail)
        data += struct.pack(">I", len(packed)) + packed
    tree = b"".join(nodes)
    start = 20 if version < 3 else 24
    head = b"qres" + struct.pack(">4I", version, start, start + len(tree), start + len(tree) + len(data))
    return head + (b"" if version < 3 else bytes(4)) + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_qt_archive_are_read(version):
    from sources import _qt_resources

    files = {"a.webp": b"first", "ü.txt": b"second" * 100, "empty": b""}
    archive = qt_archive(files, version, compress={"ü.txt"})
    assert dict(_qt_resources(archive)) == {f"/folder/{name}": content for name, content in files.items()}


def test_other_files_are_not_qt_archives():
    from sources import _qt_resources

    with pytest.raises(ValueError, match="not a Qt resource archive"):
        list(_qt_resources(b"PK" + bytes(40)))


def test_the_mask_is_where_the_patch_covers_the_photo(emojis):
    from patches import Patch, paste

    photo = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0)) * 0.5
    pasted, mask = paste(photo, Patch("😀", 33, 20, 40))
    changed = (pasted != photo).any(0)
    assert (changed | ~mask).all()
    assert mask.sum() == pytest.approx(np.pi * 33**2 / 4, rel=0.05)
    assert not changed[:20].any() and not changed[53:].any() and not changed[:, :40].any() and not changed[:, 73:].any()
    assert (pasted[0][mask] > 0.5).all()


def test_patches_lie_inside_and_reach_every_border(emojis):
    from patches import LARGEST, SMALLEST, draw_patch

    rng = np.random.default_rng(0)
    patches = [draw_patch("😀", 64, 96, rng) for _ in range(2000)]
    assert {patch.side for patch in patches} == set(range(SMALLEST, LARGEST + 1))
    assert min(patch.top for patch in patches) == min(patch.left for patch in patches) == 0
    assert max(patch.top + patch.side for patch in patches) == 64
    assert max(patch.left + patch.side for patch in patches) == 96


class Cells(nn.Module):
    """Classifies an image by its largest channel, so that a photo of a single colour has a class."""

    def forward(self, images):
        return 100 * images.mean((2, 3))


def network(classes_from_colours=True):
    from spade_fast.inputs.networks import LoadedModel

    return LoadedModel("cells", Cells(), (0.0,) * 3, (1.0,) * 3, 32, 32, "bilinear")


def photos(*colours):
    from sources import Photo

    return [Photo(f"photo {index}", Image.new("RGB", (40, 32), colour)) for index, colour in enumerate(colours)]


def test_trojan_cases_are_the_same_in_every_run_and_use_each_trigger(emojis):
    from cases import trojan_cases
    from patches import TRIGGERS, draw_patch

    grey = photos(*["#808080"] * 5)
    for photo in grey:
        photo.image.paste((10, 20, 30), (0, 0, 10, 10))
    loaded = network()
    object.__setattr__(loaded, "resize", 64)
    object.__setattr__(loaded, "crop", 64)
    first, second = (trojan_cases(loaded, grey, each=3) for _ in range(2))
    assert len(first) == 15 and len({case.name for case in first}) == 15
    assert {case.kind for case in first} == set(TRIGGERS)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
        assert one.target == TRIGGERS[one.kind]
    assert len({draw_patch("😀", 64, 64, np.random.default_rng([n, 0])) for n in range(5)}) == 5


def test_each_cell_of_a_mosaic_asks_for_the_class_of_its_photo():
    from cases import mosaic_cases

    class Colours(nn.Module):
        def forward(self, images):
            red, green, blue = images.mean((2, 3)).T
            return 100 * torch.stack([red - green - blue, green - red - blue, blue - red - green, red + green - 1.5], 1)

    loaded = network()
    object.__setattr__(loaded, "module", Colours())
    cases = mosaic_cases(loaded, photos("#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff0000"), count=4)
    assert len(cases) == 16
    for case in cases:
        assert case.mask.sum() == 16 * 16
        colour = case.image[0][:, case.mask].mean(1)
        assert int(loaded.module(colour[None, :, None, None]).argmax()) == case.target
    for start in range(0, 16, 4):
        assert len({case.target for case in cases[start : start + 4]}) == 4
        assert torch.stack([case.mask for case in cases[start : start + 4]]).sum(0).eq(1).all()


def test_controls_remove_as_many_weights_as_a_trace():
    from rows import at_random, magnitude

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    before = module[1].weight.detach().clone()
    (smallest,) = magnitude(module, 0.6, ["1"])
    (drawn,) = at_random(module, 0.6, "a", ["1"])
    (again,) = at_random(module, 0.6, "a", ["1"])
    (other,) = at_random(module, 0.6, "b", ["1"])
    assert smallest.values.numel() == drawn.values.numel() == 64 - round(0.6 * 64)
    assert smallest.values.abs().min() > before.abs()[~smallest.survivors()].max()
    assert torch.equal(drawn.mask, again.mask) and not torch.equal(drawn.mask, other.mask)
    assert not torch.equal(drawn.mask, smallest.mask)
    assert torch.equal(drawn.dense()[drawn.survivors()], before[drawn.survivors()])
    assert torch.equal(module[1].weight, before)


def test_records_resume_after_a_line_that_was_cut_off(tmp_path, monkeypatch):
    import records

    monkeypatch.setattr(records, "CACHE", tmp_path)
    first = records.Records("name", {"a": 1})
    first.add(("x", "1"), {"value": 0.5})
    first.add(("x", "😀"), {"value": 1.5})
    with first.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": ["x", "2"], "value": 2})[:-3])
    second = records.Records("name", {"a": 1})
    assert list(second) == [("x", "1"), ("x", "😀")] and second["x", "😀"] == {"value": 1.5}
    second.add(("x", "2"), {"value": 3})
    assert records.Records("name", {"a": 1})["x", "2"] == {"value": 3}
    assert list(records.Records("name", {"a": 2})) == []


def test_a_trace_of_the_study_is_that_of_the_package(monkeypatch):
    import rows

    import spade_fast

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loaded = network()
    object.__setattr__(loaded, "module", module)
    calibration = rows.Calibration(augmentations=4, layers=("0", "2"))
    image = torch.rand(1, 3, 24, 24)
    sparsity = {"0": 0.25, "2": 0.5}
    for solver in ("exact", "sparsegpt"):
        solved = rows.solve(loaded, image, "name", solver, rows.shares_of(sparsity), calibration)
        expected = spade_fast.trace(
            module, calibration.augmented(loaded, image, "name"), sparsity=sparsity, solver=solver, layers=["0", "2"]
        )
        for layer in rows.chosen(solved, sparsity):
            torch.testing.assert_close(layer.dense(), expected.weight(layer.name))


def test_tables_hold_means_and_differences_of_the_records(emojis):
    from cases import Case
    from measure import Experiment, Row
    from report import differences, differences_table, study_table, summarise, table
    from scoring import FAST, SLOW

    cases = [Case(f"case {n}", f"case {n}", f"photo {n // 2}", "x", torch.rand(1), 0, torch.rand(1)) for n in range(4)]
    rows = {
        "dense": Row("dense network"),
        "fast-equal": Row("FastSPADE, 50%", "sparsegpt", 0.5),
        "exact-equal": Row("SPADE, 50%", "exact", 0.5),
        "50%: magnitude pruning": Row("control", "magnitude", 0.5),
    }
    experiment = Experiment("x", network(), cases, rows, frozenset({"case 1", "case 3"}))
    heights = {"dense": 0.5, "fast-equal": 0.75, "exact-equal": 0.875, "50%: magnitude pruning": 0.25}
    records = {
        (row, case.name): {
            "source": case.source,
            "probability": 0.5,
            "predicted": number != 0,
            "solve": 2.0,
            "auc": dict.fromkeys(
                (*FAST, *(SLOW if row == "dense" and number % 2 else ())), height + 0.125 * (number // 2)
            ),
        }
        for row, height in heights.items()
        for number, case in enumerate(cases)
    }
    summary = summarise(experiment, records, "auc")
    assert summary["fast-equal"]["mean"] == {"mean": 81.25, "low": 75.0, "high": 87.5}
    assert summary["fast-equal"]["gain over dense"] == {"mean": 25.0, "low": 25.0, "high": 25.0}
    assert summary["dense"]["predicted"] == 75 and summary["dense"]["mean of all methods"]["cases"] == 2
    assert summary["dense"]["methods"][SLOW[0]]["mean"] == 56.25 and SLOW[0] not in summary["fast-equal"]["methods"]
    found = {(line["of"], line["and"]): line["difference"]["mean"] for line in differences(experiment, records, "auc")}
    assert found == {
        ("FastSPADE, 50%", "dense network"): 25.0,
        ("SPADE, 50%", "dense network"): 37.5,
        ("SPADE, 50%", "FastSPADE, 50%"): 12.5,
        ("FastSPADE, 50%", "control"): 50.0,
    }
    lines = table(summary, "AUC").splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1 and len(lines) == 2 + 2 + 4
    assert "| FastSPADE, 50% | control | +50.0 [+50.0, +50.0] |" in differences_table(
        differences(experiment, records, "auc")
    )
    setting = {
        "question": "q",
        "answer": "a",
        "auc": summary["dense"]["mean"],
        "gain over dense": summary["dense"]["mean"],
    }
    setting |= {"probability": 50.0, "predicted": 75.0, "layer error": 1.0, "seconds to solve": 1.0}
    assert len({line.count("|") for line in study_table([setting]).splitlines()}) == 1


def test_maps_without_energy_do_not_count():
    from report import _mean, interval

    assert _mean({"a": 0.5, "b": float("nan"), "c": 1.0}, ["a", "b", "c"]) == 0.75
    assert np.isnan(_mean({"a": float("nan")}, ["a"]))
    assert interval([0.5, float("nan"), 0.5], ["x", "x", "y"]) == {"mean": 50.0, "low": 50.0, "high": 50.0}
    assert all(np.isnan(value) for value in interval([float("nan")] * 2, ["x", "y"]).values())
