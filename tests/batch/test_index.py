"""The index of a batch, and lists in Parquet."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from batches import make_photos, run_small  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast import Decision  # noqa: E402
from spade_fast.batch import write_index  # noqa: E402
from spade_fast.batch.index import COLUMNS  # noqa: E402
from spade_fast.batch.samples import find_samples  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.pruning.traces import Trace  # noqa: E402


@pytest.fixture
def out(small, tmp_path):
    make_photos(tmp_path / "photos", 3)
    (tmp_path / "photos/bad.png").write_text("x")
    run_small(tmp_path / "photos", tmp_path / "out", small, layers="2")
    return tmp_path / "out"


def test_one_row_per_sample(out):
    table = parquet.read_table(out / "index.parquet")
    assert table.column_names == list(COLUMNS)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert sorted(rows) == ["00.png", "01.png", "bad.png", "sub/02.png"]
    assert rows["bad.png"]["state"] == "failed" and rows["bad.png"]["error"].startswith("not an image file")
    row = rows["sub/02.png"]
    made = Trace.load(out / row["file"])
    assert (row["state"], row["error"], row["layers"], row["fallbacks"]) == ("finished", None, 1, 0)
    assert row["sparsity"] == made.sparsity and row["largest_error"] == row["mean_error"]
    assert row["largest_error"] == pytest.approx(made.reports[0].measured_error)
    assert made.decision == Decision(**{field: row[field] for field in asdict(made.decision)})
    assert (
        row["decision_kept"] == (row["class_before"] == row["class_after"]) and rows["bad.png"]["decision_kept"] is None
    )
    assert all(row[f"seconds_{stage}"] > 0 for stage in ("load", "augment", "forward", "gram", "solve"))


def test_what_automatic_sparsity_found(small, tmp_path):
    make_photos(tmp_path / "photos", 3)
    options = {"sparsity": "auto", "keep": (1.0, 0.5), "solver": "sparsegpt", "methods": ["saliency"]}
    run_small(tmp_path / "photos", tmp_path / "out", small, layers="2", **options)
    for row in parquet.read_table(tmp_path / "out/index.parquet").to_pylist():
        made = Trace.load(tmp_path / "out" / row["file"])
        assert (row["error_limit"], row["enough_kept"]) == (made.auto.error, made.auto.kept)
        assert row["share_kept"] == made.auto.score / made.auto.dense
        assert row["target"] == made.target == f"class {row['class_before']}"
        assert row["share_kept"] == pytest.approx(row["probability_after_of_class_before"] / row["probability_before"])
        assert row["enough_kept"] == (row["share_kept"] >= 1)
        assert ("less than the 100% asked for" in (row["warnings"] or "")) == (not row["enough_kept"])
        assert (row["traces"], row["traces_lost"]) == (2, 0) and row["seconds_search"] > 0


def test_a_given_sparsity_has_no_limit(out):
    rows = parquet.read_table(out / "index.parquet").to_pylist()
    assert {row["traces"] for row in rows if row["state"] == "finished"} == {1}
    assert {row[name] for row in rows for name in ("error_limit", "target", "share_kept", "enough_kept")} == {None}


def test_damaged_headers(out):
    path = out / "traces/00.png.safetensors"
    right = path.read_bytes()
    for place in range(0, 8 + int.from_bytes(right[:8], "little"), 9):
        path.write_bytes(right[:place] + bytes([right[place] ^ 1 << place % 7]) + right[place + 1 :])
        assert write_index(out) == {"finished": 2, "failed": 1, "damaged": 1}


def test_a_temporary_file_that_another_run_removes(out, monkeypatch):
    replace = os.replace

    def once(temporary, path):
        monkeypatch.setattr(os, "replace", replace)
        Path(temporary).unlink()
        replace(temporary, path)

    (out / "index.parquet").unlink()
    monkeypatch.setattr(os, "replace", once)
    assert write_index(out).total() == 4 and (out / "index.parquet").exists()


def test_it_can_be_rebuilt_from_the_files(out):
    table = parquet.read_table(out / "index.parquet")
    (out / "index.parquet").unlink()
    result = CliRunner().invoke(app, ["index", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["1 failed, 3 finished", str(out / "index.parquet"), str(out / "index.html")]
    assert parquet.read_table(out / "index.parquet").equals(table)
    error = out / "errors/bad.png.json"
    error.unlink()
    error.symlink_to(out / "gone")  # as one that another run removes after it was listed
    assert write_index(out) == {"finished": 3}


def test_lost_and_damaged_files(out):
    (out / "reports/00.png.json").unlink()
    (out / "reports/01.png.json").write_text("{")
    cut = out / "traces/01.png.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (out / "errors/00.png.json").write_text(json.dumps({"id": "00.png", "error": "before"}))
    assert write_index(out) == {"finished": 2, "failed": 1, "damaged": 1}
    rows = {row["file"]: row for row in parquet.read_table(out / "index.parquet").to_pylist()}
    assert rows["traces/00.png.safetensors"]["seconds_solve"] is None
    assert rows["traces/01.png.safetensors"]["state"] == "damaged"


def test_fallbacks_and_warnings(small, tmp_path):
    Path(sys.path[0], "idle_network.py").write_text(
        "import small_network, torch\n"
        "def loaded():\n"
        "    loaded = small_network.loaded()\n"
        "    loaded.module[2].register_module('idle', torch.nn.Linear(200, 2))\n"
        "    return loaded\n"
    )
    run_small([torch.full((3, 16, 16), 9.0)], tmp_path / "out", "idle_network:loaded", layers=["2", "2.idle"])
    (row,) = parquet.read_table(tmp_path / "out/index.parquet").to_pylist()
    assert row["id"] == "0" and row["fallbacks"] == 1 and row["layers"] == 1
    assert "lie outside 0-1" in row["warnings"]


def test_other_folders_and_a_missing_package(out, tmp_path, monkeypatch):
    result = CliRunner().invoke(app, ["index", str(tmp_path)])
    assert result.exit_code == 2 and "not the folder of a batch" in result.stderr
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = CliRunner().invoke(app, ["index", str(out)])
    assert result.exit_code == 2 and "pip install 'spade_fast[cluster]'" in result.stderr


def test_lists_in_parquet(tmp_path):
    make_photos(tmp_path / "photos", 2)
    columns = {"path": ["photos/00.png", "photos/01.png"], "id": [7, 8], "label": [1, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    listed = find_samples(tmp_path / "list.parquet")
    assert listed.ids == ["7", "8"] and listed.paths == [str(tmp_path / f"photos/0{i}.png") for i in (0, 1)]
    (tmp_path / "list.parquet").write_text("not a table")
    with pytest.raises(ValueError, match=r"list.parquet is not a Parquet file"):
        find_samples(tmp_path / "list.parquet")
