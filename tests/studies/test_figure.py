"""The figure: which pictures are the best, the median and the worst."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case
from studies.shared.measure import measure
from studies.shared.records import Records
from studies.visualization import figure
from studies.visualization.figure import chosen, draw_chosen, draw_first
from studies.visualization.judges import Judge
from studies.visualization.painting import PictureRow, PictureStudy
from studies.visualization.recognition import look


def test_the_best_the_median_and_the_worst_by_probability_at_64_pixels_are_drawn(
    loaded: LoadedModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(records, "CACHE", tmp_path)
    study = PictureStudy("small", loaded, cases, [{"dense": PictureRow("dense network")}], steps=1)
    measure(lambda: study, workers=1)
    judge = Judge(loaded, {0: 0, 1: 1, 2: 2})
    seen = look(study, judge)
    score = {case.name: seen[study.key("dense", case)]["picture"]["64"]["probability"] for case in cases[:3]}
    found = chosen(study, seen, "dense", cases[:3])
    assert [(name, value) for name, _, value in found] == list(
        zip(("best", "median", "worst"), sorted(score.values(), reverse=True), strict=True)
    )
    assert all(score[case.name] == value for _, case, value in found)
    draw_chosen(study, judge, seen, tmp_path / "drawn.jpg")
    draw_first(study, tmp_path / "first.jpg", ["dense"])
    for name in ("drawn", "first"):
        with Image.open(tmp_path / f"{name}.jpg") as drawn:
            assert min(drawn.size) > 100


def test_all_rows_choose_among_the_classes_that_all_of_them_have(
    loaded: LoadedModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(records, "CACHE", tmp_path)
    rows = {"dense": PictureRow("dense network"), "fourier": PictureRow("Fourier", method="fourier", most=2)}
    study = PictureStudy("small", loaded, cases, [rows], steps=1)
    measure(lambda: study, workers=1)
    asked: dict[str, list[Case]] = {}
    real = figure.chosen

    def see(study: PictureStudy, seen: Records, row: str, among: list[Case]) -> list[tuple[str, Case, float]]:
        asked[row] = among
        return real(study, seen, row, among)

    monkeypatch.setattr(figure, "chosen", see)
    judge = Judge(loaded, {0: 0, 1: 1, 2: 2})
    draw_chosen(study, judge, look(study, judge), tmp_path / "drawn.jpg")
    assert asked == {"dense": cases[:2], "fourier": cases[:2]}
