"""Painting pictures: each once, resumable, under keys that change with what a picture depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spade_fast import Feature
from spade_fast._util.errors import DeadFeatureError, InvalidValueError
from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case
from studies.shared.ladders import Calibration
from studies.shared.making import Other
from studies.shared.measure import measure
from studies.shared.rows import Weights
from studies.visualization import painting
from studies.visualization.methods import FOURIER_MACO_VIEWS
from studies.visualization.painting import Painter, PictureRow, PictureStudy, open_picture, save_picture
from studies.visualization.recognition import pictures_of

CALIBRATION = Calibration(images=4, layers=("0", "2"))
HALF = Weights("sparsegpt", sparsity=0.5, calibration=CALIBRATION)
THEIRS = replace(HALF, whose="another")


@pytest.fixture
def study(loaded: LoadedModel, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PictureStudy:
    """Four cases; the first three have half a trace, and the first only another image."""
    monkeypatch.setattr(records, "CACHE", tmp_path)
    return PictureStudy(
        name="small",
        network=loaded,
        cases=cases,
        stages=[
            {"dense": PictureRow("dense network"), "half": PictureRow("half", HALF, most=3)},
            {"another": PictureRow("another", THEIRS), "fourier": PictureRow("Fourier", method="fourier", most=1)},
        ],
        others={"another": {cases[0].name: Other("other", cases[2].image, 3)}},
        steps=3,
    )


def test_pictures_of_the_rows_that_a_case_has_are_painted_and_nothing_twice(
    study: PictureStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in study.network.module.state_dict().items()}
    _, found = measure(lambda: study, workers=1)
    assert len(list(found)) == 4 + 3 + 1 + 1 == len(list(study.folder.iterdir()))
    assert all(torch.equal(value, before[name]) for name, value in study.network.module.state_dict().items())
    half = found[study.key("half", study.cases[0])]
    assert half["sparsity"] == pytest.approx(0.5, abs=0.01) and 0 < half["probability"] < 1
    shown = study.open("half", study.cases[0])
    assert set(shown) == {"picture", "drawn"} and {one.shape for one in shown.values()} == {(3, 30, 30)}
    assert not torch.equal(shown["picture"], study.open("dense", study.cases[0])["picture"])
    monkeypatch.setattr(Painter, "_paint", None)
    assert set(measure(lambda: study, workers=1)[1]) == set(found)


def test_what_is_independent_is_the_traced_image(study: PictureStudy) -> None:
    case = study.cases[0]
    assert {row: study.source(row, case) for row in study.rows} == {
        "dense": "photo 0",
        "half": "photo 0",
        "another": "other",
        "fourier": "photo 0",
    }


def test_pictures_by_the_method_of_the_studies_are_others(study: PictureStudy) -> None:
    case = study.cases[0]
    rows = {name: PictureRow(name, method=name) for name in ("fourier", FOURIER_MACO_VIEWS)}
    by_both = replace(study, stages=[rows])
    Painter(by_both)([(name, case.name) for name in rows])
    one, other = (by_both.open(name, case)["picture"] for name in rows)
    assert not torch.equal(one, other)


def test_what_an_interruption_left_is_painted_and_gives_the_same_pictures(study: PictureStudy) -> None:
    _, found = measure(lambda: study, workers=1)
    files = {file.name: file.read_bytes() for file in study.folder.iterdir()}
    lines = found.path.read_text(encoding="utf-8").splitlines(keepends=True)
    found.path.write_text("".join(lines[:4]) + lines[4][:20], encoding="utf-8")
    for file in study.folder.iterdir():
        file.write_bytes(b"")
    _, again = measure(lambda: study, workers=1)
    assert set(again) == set(found)
    kept = {study.file("dense", case).name for case in study.cases[:2]} | {
        study.file("half", case).name for case in study.cases[:2]
    }
    assert {file.name: file.read_bytes() for file in study.folder.iterdir()} == {
        name: b"" if name in kept else content for name, content in files.items()
    }


def test_the_first_stages_can_be_painted_alone(study: PictureStudy) -> None:
    first, found = measure(lambda: study, workers=1, stages=1)
    assert list(first.rows) == ["dense", "half"] and len(list(found)) == 7


def test_keys_change_with_all_that_a_picture_depends_on(study: PictureStudy) -> None:
    case = study.cases[0]

    def key(row: str, changed_case: Case = case, **changes: object) -> tuple[str, ...]:
        return replace(study, cases=[changed_case], **changes).key(row, changed_case)

    other_image = replace(case, image=case.image + 1)
    assert key("dense", other_image) == key("dense")
    assert key("half", other_image) != key("half") and key("half", replace(case, target=2)) != key("half")
    assert key("dense", replace(case, target=2)) != key("dense") != key("fourier")
    assert key("dense", features={case.name: Feature(1, layer="2")}) != key("dense")
    unit = {case.name: Feature(1, layer="2")}
    assert key("half", replace(case, target=2), features=unit) != key("half", features=unit)
    other = study.others["another"][case.name]
    for theirs in (replace(other, name="x"), replace(other, image=case.image), replace(other, target=0)):
        assert key("another", others={"another": {case.name: theirs}}) != key("another") != key("half")
    titled = [{"half": PictureRow("other words", HALF, most=1)}]
    assert key("half", stages=titled) == key("half")


def test_pictures_of_other_steps_or_another_spectrum_are_others(
    study: PictureStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = study.records().path
    assert replace(study, steps=4).records().path != before == study.records().path
    (tmp_path / "table.csv").write_text("0, 1, 1, 1")
    monkeypatch.setattr(painting, "TABLE", tmp_path / "table.csv")
    assert study.records().path != before


def test_a_feature_that_pruning_cut_off_is_recorded_and_one_of_the_dense_network_is_an_error(
    study: PictureStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise DeadFeatureError("nothing can excite it")

    painter = Painter(study)
    monkeypatch.setattr(painting, "visualize", fail)
    ((_, record),) = painter([("half", study.cases[0].name)])
    assert record["failed"] == "nothing can excite it"
    with pytest.raises(DeadFeatureError, match="excite"):
        painter([("dense", study.cases[0].name)])


def test_the_pictures_of_a_row_are_none_where_a_feature_was_cut_off(study: PictureStudy) -> None:
    dense = replace(study, stages=[{"dense": study.rows["dense"]}])
    _, found = measure(lambda: dense, workers=1)
    key = dense.key("dense", dense.cases[1])
    found.add(key, {**found[key], "failed": "why"})
    first, second, *_ = pictures_of(dense, "dense")
    assert first is not None and torch.equal(first, dense.open("dense", dense.cases[0])["picture"]) and second is None


def test_other_errors_on_traces_are_errors(study: PictureStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise InvalidValueError("the activation is not finite")

    monkeypatch.setattr(painting, "visualize", fail)
    with pytest.raises(InvalidValueError, match="not finite"):
        Painter(study)([("half", study.cases[0].name)])


def test_features_other_than_classes_are_shown(
    study: PictureStudy, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    asked: list[Feature] = []
    real: Callable[..., object] = painting.visualize

    def see(module: torch.nn.Module, feature: Feature, **options: object) -> object:
        asked.append(feature)
        return real(module, feature, **options)

    monkeypatch.setattr(painting, "visualize", see)
    unit = Feature(5, layer="2")
    of_units = replace(study, features={study.cases[0].name: unit})
    Painter(of_units)([("dense", case.name) for case in study.cases[:2]])
    assert asked == [unit, Feature(study.cases[1].target)]


def test_a_picture_and_its_drawn_version_are_kept_apart(tmp_path: Path) -> None:
    picture, drawn = torch.full((3, 4, 6), 0.2), torch.full((3, 4, 6), 0.8)
    save_picture(tmp_path / "folder" / "one.png", picture, drawn)
    shown = open_picture(tmp_path / "folder" / "one.png")
    torch.testing.assert_close(shown["picture"], picture)
    torch.testing.assert_close(shown["drawn"], drawn)
