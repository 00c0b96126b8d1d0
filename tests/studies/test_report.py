"""Tables: means, differences and intervals of the records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from spade_fast.inputs.networks import LoadedModel
from studies.shared import records, report
from studies.shared.cases import Case
from studies.shared.measure import Study
from studies.shared.records import Records
from studies.shared.report import interval, share_of_tuning, summarise, tables, write
from studies.shared.rows import DENSE, EIGHT, GRADIENTS, Row, Source, kept, row
from studies.shared.scores import localisation

HEIGHTS = {"dense": 0.5, "edges": 0.625, "auto": 0.75, "tuned": 0.875}


@pytest.fixture
def study(loaded: LoadedModel, cases: list[Case]) -> Study:
    rows = {
        "dense": row("dense network", Source(DENSE), methods=EIGHT),
        "edges": Row("edge detector", plain="edges"),
        "auto": row("automatic", kept("sparsegpt", 0.9), methods=EIGHT),
        "tuned": row("tuned", kept("sparsegpt", 0.5)),
    }
    return Study("x", "Some score", loaded, cases, [rows], localisation, "auc", pairs=[("auto", "dense")])


@pytest.fixture
def measured(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """The second photo has scores an eighth higher; methods beyond the gradients have a quarter more."""
    monkeypatch.setattr(records, "CACHE", tmp_path)
    found = study.records()
    for name, height in HEIGHTS.items():
        for number, case in enumerate(study.cases):
            base = height + 0.125 * (number // 2)
            scores = {m: base + (0 if m in GRADIENTS else 0.25) for m in study.rows[name].methods}
            facts = {"probability": 0.5, "predicted": float(number != 0)} if name != "edges" else {}
            found.add(study.key(name, case), {"source": case.source, **facts, "auc": scores, "pointing": scores})
    return found


def test_summaries_hold_means_gains_and_intervals_over_photos(study: Study, measured: Records) -> None:
    summary = summarise(study, measured)
    auto = summary["rows"]["auto"]
    assert auto["mean"] == {"mean": 81.25, "low": 75.0, "high": 87.5}
    assert auto["gain over dense"] == {"mean": 25.0, "low": 25.0, "high": 25.0}
    assert auto["mean of all methods"]["mean"] == pytest.approx(81.25 + 25 * 5 / 8)
    assert auto["gain over dense of all methods"]["mean"] == pytest.approx(25)
    assert auto["P(target)"] == 50 and auto["target predicted"] == 75
    assert "mean of all methods" not in summary["rows"]["tuned"] and "P(target)" not in summary["rows"]["edges"]
    assert summary["methods"] == list(GRADIENTS)
    assert (summary["questions"], summary["images"], summary["sources"]) == (4, 4, 2)
    (line,) = summary["differences"]
    assert (line["of"], line["and"], line["difference"]["mean"]) == ("automatic", "dense network", 25.0)
    assert share_of_tuning(summary, "auto", "tuned") == pytest.approx(100 * 25 / 37.5)


def test_tables_tell_how_much_was_measured_and_have_one_width(study: Study, measured: Records) -> None:
    first, second = tables(summarise(study, measured))
    about, _, *lines = first.splitlines()
    assert "4 questions, 4 images, 2 photos" in about and "Guided backprop" in about
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 4
    assert "| automatic | dense network | +25.0 [+25.0, +25.0] |" in second


def test_files_hold_the_tables_and_numbers_rounded_without_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = write("name", "A title", ["one\n", "two\n"], {"value": 1 / 3, "none": math.nan})
    assert path.read_text(encoding="utf-8") == "# A title\n\none\n\ntwo\n"
    assert path.with_suffix(".json").read_text(encoding="utf-8") == '{\n "value": 0.33333,\n "none": null\n}\n'


def test_maps_without_energy_do_not_count() -> None:
    found = [{"energy": {"a": 0.5, "b": math.nan, "c": 1.0}}, {"energy": {"a": math.nan, "b": math.nan, "c": math.nan}}]
    first, second = report._means(found, "energy", "abc")
    assert first == 0.75 and np.isnan(second)
    assert interval([0.5, math.nan, 0.5], ["x", "x", "y"]) == {"mean": 50.0, "low": 50.0, "high": 50.0}
    assert all(np.isnan(value) for value in interval([math.nan] * 2, ["x", "y"]).values())
