"""Measuring a study: every row on every case, each once, under keys that change with what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case
from studies.shared.ladders import Calibration
from studies.shared.making import Maker, Other
from studies.shared.measure import Study, Worker, measure
from studies.shared.rows import DENSE, Row, Source, fixed, row
from studies.shared.scores import localisation


@pytest.fixture
def study(loaded: LoadedModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    calibration = Calibration(images=4, layers=("0", "2"))
    return Study(
        name="small",
        title="a title",
        network=loaded,
        cases=cases,
        stages=[
            {"dense": row("dense network", Source(DENSE)), "edges": Row("edges", plain="edges")},
            {"half": row("half", fixed("sparsegpt", 0.5, calibration))},
        ],
        score=localisation,
        metric="auc",
        pairs=[("half", "dense")],
    )


def test_all_rows_are_scored_on_all_cases_and_nothing_twice(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = measure(lambda: study, workers=1)
    assert len(list(found)) == 3 * 4
    one = found[study.key("half", study.cases[0])]
    assert one["source"] == "photo 0" and set(one["auc"]) == {"saliency", "input-x-gradient", "guided-backprop"}
    assert one["sparsity"] == pytest.approx(0.5, abs=0.01)
    edges = found[study.key("edges", study.cases[0])]
    assert len(set(edges["auc"].values())) == 1

    monkeypatch.setattr(Maker, "maps", None)  # nothing is left to be made
    again = measure(lambda: study, workers=1)[1]
    assert {key: again[key] for key in again} == {key: found[key] for key in found}


def test_what_an_interruption_left_is_measured_and_gives_the_same_numbers(study: Study) -> None:
    _, found = measure(lambda: study, workers=1)
    lines = found.path.read_text(encoding="utf-8").splitlines(keepends=True)
    found.path.write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    _, again = measure(lambda: study, workers=1)
    assert set(again) == set(found)
    for key in found:
        assert {name: value for name, value in again[key].items() if not name.startswith("seconds")} == {
            name: value for name, value in found[key].items() if not name.startswith("seconds")
        }


def test_keys_change_with_the_row_the_image_the_class_and_the_others_but_not_with_titles(study: Study) -> None:
    case = study.cases[0]

    def key(row_name: str = "half", **changes: object) -> tuple[str, ...]:
        changed = replace(study, **changes)
        return changed.key(row_name, changed.cases[0])

    def with_row(new: Row) -> tuple[str, ...]:
        return key(stages=[study.stages[0], {"half": new}])

    before, half = key(), study.rows["half"]
    assert key("dense") != before
    assert with_row(replace(half, title="other words")) == before
    assert with_row(replace(half, methods=("saliency",))) != before
    noisy = replace(half.groups[0][0].weights, calibration=Calibration(images=4, layers=("0", "2"), noise=0.1))
    assert with_row(replace(half, groups=((Source(noisy),),))) != before
    assert key(cases=[replace(case, target=3)]) != before
    assert key(cases=[replace(case, image=case.image + 1)]) != before
    other = Other("other", torch.zeros(1, 3, 24, 24), 0)
    assert key(others={"theirs": {case.name: other}}) != before
    assert key(others={"theirs": {"another case": other}}) == before


def test_records_of_another_network_or_score_are_others(study: Study, loaded: LoadedModel) -> None:
    before = study.records().path
    assert study.records().path == before
    with torch.no_grad():
        loaded.module.get_parameter("6.bias").add_(1)
    assert study.records().path != before


def test_a_worker_measures_the_rows_and_cases_of_its_task(study: Study) -> None:
    finished = Worker(study)([("dense", "case 2"), ("edges", "case 2"), ("edges", "case 3")])
    assert [(record["row"], key[1]) for key, record in finished] == [
        ("dense", "case 2"),
        ("edges", "case 2"),
        ("edges", "case 3"),
    ]
    assert {record["source"] for _, record in finished} == {"photo 1"}


def test_the_first_stages_can_be_measured_alone(study: Study) -> None:
    first, found = measure(lambda: study, workers=1, stages=1)
    assert len(list(found)) == 2 * 4 and list(first.rows) == ["dense", "edges"] and not first.pairs
