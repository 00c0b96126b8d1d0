"""Forced choice: units, crops, pairs, and whether a picture is nearer to the right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case
from studies.shared.measure import measure
from studies.shared.photos import Photo
from studies.visualization.forced_choice import (
    choices,
    choose_pair,
    compare,
    crops,
    questions,
    unit_activations,
    unit_study,
)
from studies.visualization.judges import Judge
from studies.visualization.painting import PictureRow, PictureStudy


def test_crops_cover_the_photo_and_each_lies_at_its_place() -> None:
    photo = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(0))
    found, places = crops(photo)
    assert found.shape == (25, 3, 8, 10) and len(places) == 25
    covered = torch.zeros(24, 30)
    for crop, (rows, columns) in zip(found, places, strict=True):
        assert torch.equal(crop, photo[:, rows, columns])
        covered[rows, columns] += 1
    assert bool((covered > 0).all())


@pytest.mark.parametrize("strong", range(25))
def test_the_second_crop_excites_least_of_those_that_do_not_overlap_the_first(strong: int) -> None:
    _, places = crops(torch.zeros(3, 224, 224))
    activations = torch.arange(25.0)
    activations[strong] = 100
    first, second = choose_pair(activations, places)
    assert first == strong != second
    shared = torch.zeros(224, 224)
    for rows, columns in (places[first], places[second]):
        shared[rows, columns] += 1
    assert float(shared.max()) == 1
    apart = [
        number
        for number, (rows, columns) in enumerate(places)
        if abs(rows.start - places[strong][0].start) >= 74 or abs(columns.start - places[strong][1].start) >= 74
    ]
    assert second == min(apart)  # activations rise with the number


def test_a_picture_chooses_the_crop_with_nearer_features_and_without_one_the_choice_is_a_guess() -> None:
    """Axis 0: what all pictures have; axes 1 and 2: the crops of the first question; 3 and 4: those of the second."""
    axes = torch.eye(5)
    pairs = torch.stack([torch.stack([axes[1], axes[2] + axes[0]]), torch.stack([axes[3] + axes[0], axes[4]])])
    pictures = [7 * axes[0] + axes[1], 7 * axes[0] + axes[4]]
    assert choices(pictures, pairs) == [1, 0]
    assert choices([pictures[0], None], torch.stack([pairs[0], pairs[1]]))[1] == 0.5
    assert choices([None, None], pairs) == [0.5, 0.5]


def test_units_are_the_channels_that_contribute_most_each_for_one_photo(
    loaded: LoadedModel, photos: Callable[..., list[Photo]]
) -> None:
    first, second = photos((255, 0, 0), (255, 0, 0))
    study = unit_study("x", loaded, {0: [first], 1: [second, first]}, layer="2", activated="4")
    channels = [study.feature(case).index for case in study.cases]
    assert len(set(channels)) == 2 and {study.feature(case).layer for case in study.cases} == {"2"}
    image = study.cases[0].image
    activated = loaded.module[:4](image).mean((2, 3))[0]
    expected = (activated * loaded.module.get_parameter("6.weight")[0]).abs()
    assert channels[0] == int(expected.argmax())
    assert study.others["another"][study.cases[0].name].name == "photo 1"


def test_activations_of_crops_are_those_of_the_layer(loaded: LoadedModel) -> None:
    cut = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = unit_activations(loaded, "2", cut)
    expected = loaded.module[:3](Judge(loaded).sees(cut)).mean((2, 3))
    torch.testing.assert_close(found, expected)
    assert not loaded.module.get_submodule("2")._forward_hooks


def test_rows_are_compared_with_natural_crops_and_the_saliency_map(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case]
) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    from spade_fast import Feature

    units = {case.name: Feature(number, layer="2") for number, case in enumerate(cases)}
    study = PictureStudy("small", loaded, cases, [{"dense": PictureRow("dense network")}], units, steps=2)
    measure(lambda: study, workers=1)
    asked = questions(study)
    for number, (case, pair) in enumerate(zip(cases, asked.pairs, strict=True)):
        strong, weak = unit_activations(loaded, "2", pair)[:, number].tolist()
        assert strong > weak, case.name
        own, _ = crops(asked.natural.new_tensor(0) + (case.image[0] * 0.25 + 0.5))
        assert not any(torch.equal(asked.natural[number], crop) for crop in own)
    comparison = compare(study, Judge(loaded))
    assert list(comparison.rows) == ["dense", "natural", "map"] and comparison.pairs == [("natural", "dense")]
    by_map = comparison.values["map"]["forced choice, %"]
    assert by_map["right"] == asked.by_map and by_map["as the saliency map"] == [1.0] * 4
    dense = comparison.values["dense"]["forced choice, %"]
    assert dense["as the saliency map"] == [
        float(mine == other) for mine, other in zip(dense["right"], asked.by_map, strict=True)
    ]
