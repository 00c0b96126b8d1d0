"""Recognition: which photos stand for which class, what is compared on which classes, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case
from studies.shared.ladders import Calibration
from studies.shared.measure import measure
from studies.shared.photos import Photo
from studies.shared.rows import Weights
from studies.visualization import recognition
from studies.visualization.judges import Judge
from studies.visualization.methods import FOURIER_MACO_VIEWS
from studies.visualization.painting import PictureRow, PictureStudy
from studies.visualization.recognition import (
    NO_PHOTO,
    PHOTO,
    Sizes,
    class_photos,
    class_study,
    comparisons,
    look,
    photo_key,
    scores,
)

RED, GREEN, BLUE, DARK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 30)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)


@pytest.fixture
def colours() -> LoadedModel:
    """Predicts red, green or blue; the darker the photo, the less probable."""
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    with torch.no_grad():
        module.get_parameter("2.weight").copy_(torch.eye(3))
        module.get_parameter("2.bias").zero_()
    return LoadedModel("colours", module.eval(), (0.5,) * 3, (0.25,) * 3, 24, 24, class_names=("red", "green", "blue"))


def test_the_first_photos_are_taken_as_they_are_and_of_others_the_confident_ones(
    colours: LoadedModel, photos: Callable[..., list[Photo]]
) -> None:
    taken = photos(DARK, RED, RED, GREEN, DARK, BLUE)
    found = class_photos(colours, taken, 1)
    assert {target: [photo.name for photo in of] for target, of in found.items()} == {
        2: ["photo 0", "photo 5"],
        0: ["photo 1", "photo 2"],
        1: ["photo 3"],
    }
    assert list(found) == [2, 0, 1]  # of the first photos, of two photos, the rest
    assert list(class_photos(colours, taken[1:], 0)) == [0, 1, 2]


def test_photos_are_shown_to_a_network_once(
    colours: LoadedModel, photos: Callable[..., list[Photo]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = class_photos(colours, photos(RED, GREEN), 0)
    with monkeypatch.context() as patched:
        patched.setattr(recognition, "probabilities", None)
        assert list(class_photos(colours, photos(RED, GREEN), 0)) == list(found) == [0, 1]
    assert list(class_photos(colours, photos(BLUE, GREEN), 0)) == [2, 1]  # another photo of the same name


def test_each_class_has_its_own_photo_the_next_classs_and_another_of_its_own(
    colours: LoadedModel, photos: Callable[..., list[Photo]]
) -> None:
    found = class_photos(colours, photos(RED, GREEN, GREEN, BLUE, BLUE), 0)
    study = class_study("x", colours, found, Sizes(classes=3, controls=2, same=1))
    assert [(case.name, case.sample, case.target) for case in study.cases] == [
        ("1 green", "photo 1", 1),
        ("2 blue", "photo 3", 2),
        ("0 red", "photo 0", 0),
    ]
    assert {name: other.name for name, other in study.others["another"].items()} == {
        "1 green": "photo 3",
        "2 blue": "photo 0",
        "0 red": "photo 1",
    }
    assert {name: (other.name, other.target) for name, other in study.others["same"].items()} == {
        "1 green": ("photo 2", 1)
    }
    count = {row: sum(study.has(row, case) for case in study.cases) for row in study.rows}
    assert count["dense"] == count["auto"] == 3 and count["same"] == 1
    assert {count[row] for row in set(study.rows) - {"dense", "auto", "same"}} == {2}
    assert [list(stage) for stage in study.stages[:4]] == [["dense", "auto"], ["another"], ["half"], ["magnitude"]]
    assert list(study.stages[-1]) == ["same"]
    methods = {row: of_row.method for row, of_row in study.rows.items() if of_row.method != "maco"}
    assert methods == {"fourier": "fourier", "fourier auto": "fourier", "fourier views": FOURIER_MACO_VIEWS}
    used = {row for rows, pairs in recognition.COMPARISONS.values() for row in (*rows, *sum(pairs, ()))}
    assert used == set(study.rows)


def test_scores_count_ranks_below_one_and_five_and_what_could_not_be_painted_as_not_recognised() -> None:
    def seen(rank: int, probability: float) -> dict[str, dict[str, float]]:
        return {side: {"rank": rank, "probability": probability} for side in ("full", "96", "64", "48")}

    both = [
        {"picture": seen(0, 0.9), "drawn": seen(5, 0.1)},
        {"picture": seen(4, 0.2), "drawn": seen(0, 0.1)},
        {"picture": seen(5, 0.1), "drawn": seen(1, 0.1)},
        None,
    ]
    facts = [{"probability": 0.5, "sparsity": 0.4}, {"probability": 0.5}, {"probability": 0.5}, {"failed": "why"}]
    found = scores(both, facts)
    assert found["top-1, %"]["64"] == [1, 0, 0, 0] and found["top-5, %"]["64"] == [1, 1, 0, 0]
    assert found["top-5, %"]["64, drawn"] == [0, 1, 1, 0]
    assert found["probability, %"]["full"] == [0.9, 0.2, 0.1, 0]
    networks = found["networks, %"]
    assert networks["weights removed"][0] == 0.4 and math.isnan(networks["weights removed"][1])
    photo = scores([{"picture": seen(0, 0.9)}], [None])
    assert photo["top-1, %"]["64"] == [1] and math.isnan(photo["top-1, %"]["64, drawn"][0])


@pytest.fixture
def study(loaded: LoadedModel, cases: list[Case]) -> PictureStudy:
    half = Weights("sparsegpt", sparsity=0.5, calibration=Calibration(images=4, layers=("0", "2")))
    rows = {"dense": PictureRow("dense network"), "half": PictureRow("half", half, most=2)}
    kinds = (PHOTO, PHOTO, PHOTO, NO_PHOTO)
    of_kinds = [replace(case, kind=kind, source=case.name) for case, kind in zip(cases, kinds, strict=True)]
    study = PictureStudy("small", loaded, of_kinds, [rows], steps=2)
    measure(lambda: study, workers=1)
    return study


COMPARED = {
    "all": (("dense",), ()),
    "halves": (("dense", "half"), (("half", "dense"),)),
    "later": (("dense", "of a later stage"), ()),
}


def test_rows_are_compared_on_the_classes_that_have_all_of_them_and_that_the_judge_knows(
    study: PictureStudy, loaded: LoadedModel
) -> None:
    judge = Judge(loaded, {0: 0, 1: 1, 3: 3})
    every, halves = comparisons(study, judge, COMPARED)
    assert every.sources == {"dense": ["case 0", "case 1", "case 3"]} and list(every.rows) == ["dense"]
    assert halves.sources["half"] == ["case 0", "case 1"] and list(halves.rows) == ["photo", "dense", "half"]
    assert halves.unpainted == {"dense": [False, False], "half": [False, False]}
    assert not math.isnan(every.values["dense"]["networks, %"]["probability in the photo"][0])
    assert math.isnan(every.values["dense"]["networks, %"]["probability in the photo"][2])  # it has no photo


def test_what_could_not_be_painted_is_counted(
    study: PictureStudy, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted = study.records()
    key = study.key("half", study.cases[0])
    painted.add(key, {**painted[key], "failed": "why"})
    _, halves = comparisons(study, Judge(loaded), COMPARED)
    assert halves.unpainted["half"] == [True, False]
    assert [column[0] for column in halves.values["half"]["probability, %"].values()] == [0] * 5


def test_a_judge_sees_each_picture_once_and_another_judge_again(
    study: PictureStudy, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = look(study, Judge(loaded))
    assert len(list(seen)) == 3 + 4 + 2
    picture = seen[study.key("dense", study.cases[1])]
    assert set(picture) == {"picture", "drawn"} and set(seen[photo_key(study.cases[0])]) == {"picture"}
    with monkeypatch.context() as patched:
        patched.setattr(recognition, "verdicts", None)
        again = look(study, Judge(loaded))
    assert {key: again[key] for key in again} == {key: seen[key] for key in seen}
    with torch.no_grad():
        other = replace(loaded, module=torch.nn.Sequential(*loaded.module[:-1], torch.nn.Linear(8, 4)))
    assert look(study, Judge(other)).path != seen.path
