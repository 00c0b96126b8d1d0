"""Forced choice: units, crops, pairs, and whether a picture is nearer to the right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spade_fast import Feature
from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case, clean_image
from studies.shared.measure import measure
from studies.shared.photos import Photo
from studies.visualization import forced_choice
from studies.visualization.forced_choice import (
    choices,
    choose_pair,
    compare,
    crops,
    means_at,
    questions,
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
    first, second = choose_pair(torch.stack([activations, activations]), places)
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


def test_of_crops_that_do_not_excite_a_unit_the_second_has_the_lowest_map() -> None:
    _, places = crops(torch.zeros(3, 224, 224))
    plain = torch.full((25,), -1.0)
    plain[0], plain[23], plain[24] = 1, -3, -2
    assert choose_pair(torch.stack([plain.clamp(min=0), plain]), places) == (0, 23)


def test_maps_are_read_at_the_places_of_crops() -> None:
    maps = torch.arange(9.0).view(1, 3, 3)
    whole, corner, across = slice(0, 30), slice(0, 10), slice(15, 25)
    found = means_at(maps, [(whole, whole), (corner, corner), (corner, across)], (30, 30))
    torch.testing.assert_close(found, torch.tensor([[4.0, 0.0, 1.5]]))


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
    for photo in (first, second):
        photo.image.paste((0, 40, 90), (10, 0, 30, 20))
    study = unit_study("x", loaded, {0: [first], 1: [second, first]}, layer="2")
    channels = [study.feature(case).index for case in study.cases]
    assert len(set(channels)) == 2 and {study.feature(case).layer for case in study.cases} == {"2"}
    activated = loaded.module[:4](study.cases[0].image).mean((2, 3))[0]
    assert channels[0] == int((activated * loaded.module.get_parameter("6.weight")[0]).argmax())
    assert study.others["another"][study.cases[0].name].name == "photo 1"


def test_a_channel_that_speaks_against_the_class_is_not_its_unit(
    loaded: LoadedModel, photos: Callable[..., list[Photo]]
) -> None:
    (photo,) = photos((255, 0, 0))
    photo.image.paste((0, 40, 90), (10, 0, 30, 20))
    activated = loaded.module[:4](clean_image(loaded, photo)).mean((2, 3))[0]
    strong, other = activated.argsort(descending=True)[:2].tolist()
    with torch.no_grad():
        loaded.module.get_parameter("6.weight")[0] = 0
        loaded.module.get_parameter("6.weight")[0, strong] = -5
        loaded.module.get_parameter("6.weight")[0, other] = 0.1
    study = unit_study("x", loaded, {0: [photo]}, layer="2")
    assert study.feature(study.cases[0]).index == other


def test_rows_are_compared_with_natural_crops_and_the_saliency_map(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case]
) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    with torch.no_grad():
        maps = [loaded.module[:4](case.image)[0] for case in cases]
    strongest = [int(of_case.mean((1, 2)).argmax()) for of_case in maps]
    units = {case.name: Feature(unit, layer="2") for case, unit in zip(cases, strongest, strict=True)}
    study = PictureStudy("small", loaded, cases, [{"dense": PictureRow("dense network")}], units, steps=2)
    measure(lambda: study, workers=1)
    asked = questions(study)
    for number, (case, pair) in enumerate(zip(cases, asked.pairs, strict=True)):
        own, places = crops(case.image[0] * 0.25 + 0.5)
        strong, weak = (next(n for n, crop in enumerate(own) if torch.equal(crop, one)) for one in pair)
        means = [float(maps[number][strongest[number]][place].mean()) for place in places]
        assert means[strong] == max(means) > means[weak], case.name
        assert not any(torch.equal(asked.natural[number], crop) for crop in own)
    comparison = compare(study, Judge(loaded))
    assert list(comparison.rows) == ["dense", "other unit", "natural", "map"]
    assert comparison.pairs == [("dense", "other unit"), ("natural", "dense")]
    assert comparison.unpainted == {"dense": [False] * 4}
    by_map = comparison.values["map"]
    assert by_map["right, %"] == {"full": asked.by_map, "64": asked.by_map}
    assert by_map["as the saliency map, %"] == {"full": [1.0] * 4, "64": [1.0] * 4}
    dense = comparison.values["dense"]
    assert dense["as the saliency map, %"]["64"] == [
        float(mine == other) for mine, other in zip(dense["right, %"]["64"], asked.by_map, strict=True)
    ]


def test_the_control_is_the_picture_of_the_next_unit(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case]
) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    units = {case.name: Feature(number, layer="2") for number, case in enumerate(cases)}
    study = PictureStudy("small", loaded, cases, [{"dense": PictureRow("dense network")}], units, steps=2)
    measure(lambda: study, workers=1)
    asked: list[list[torch.Tensor]] = []

    def guess(shown: list[torch.Tensor], pairs: torch.Tensor) -> list[float]:
        asked.append(shown)
        return [0.5] * len(shown)

    monkeypatch.setattr(forced_choice, "choices", guess)
    compare(study, Judge(loaded))
    own, permuted, _ = asked[:3]
    assert all(map(torch.equal, permuted, [*own[1:], own[0]]))
