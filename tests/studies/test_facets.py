"""Facets: whose traces are made, images of triggers and classes, and which of them a picture is nearer to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spade_fast.inputs.networks import LoadedModel
from studies.shared import records
from studies.shared.cases import Case, undo_normalisation
from studies.shared.ladders import Calibration
from studies.shared.measure import measure
from studies.shared.photos import Photo
from studies.trojan.patches import TRIGGERS
from studies.visualization import facets
from studies.visualization.facets import EACH, EXAMPLES, ClassImages, class_images, facet_study, nearness
from studies.visualization.judges import Judge, resized
from studies.visualization.painting import PictureRow, PictureStudy

TARGETS = list(TRIGGERS.values())


def test_a_picture_is_nearest_to_what_its_features_share_beyond_its_kind_of_image() -> None:
    """Axis 0: kind of image. Axes 1 and 2: the first class and its trigger; 3 and 4: those of the second."""
    axes = torch.eye(5)
    of_class = {10: 9 * axes[:1] + axes[1:2], 20: 9 * axes[:1] + axes[3:4]}
    of_trigger = {10: {"grey": axes[2:3]}, 20: {"grey": axes[4:5]}}
    pictures = {
        "dense": [5 * axes[0] + axes[1], 5 * axes[0] + axes[3]],
        "with": [5 * axes[0] + axes[2], None],
    }
    found = nearness([10, 20], pictures, of_class, of_trigger)
    assert found["dense"]["nearer to the trigger, %"]["grey"] == [0, 0]
    assert found["with"]["nearer to the trigger, %"]["grey"][0] == 1
    assert math.isnan(found["with"]["nearer to the trigger, %"]["grey"][1])
    cosines = found["dense"]["cosine, %"]
    assert cosines["class"][0] > 0.5 > cosines["grey"][0] and set(cosines) == {"grey", "class"}


def test_traces_are_of_the_trigger_of_the_class_and_of_other_triggers(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    image = torch.zeros(1, 3, 24, 24)
    cases = [
        Case(f"photo {n} {emoji}", f"photo {n} {emoji}", f"photo {n}", emoji, image + n, target)
        for n, (emoji, target) in enumerate([*TRIGGERS.items()] * (EACH + 1))
    ]
    images = {
        target: ClassImages([torch.full((3, 24, 24), target / 1000)] * 2, [torch.zeros(3, 24, 24)], False)
        for target in TARGETS
    }
    study = facet_study(loaded, cases, images)
    assert len(study.cases) == EACH * len(TRIGGERS)
    for case in study.cases:
        without, other = study.others["class"][case.name], study.others["other trigger"][case.name]
        assert without.target == case.target != other.target
        torch.testing.assert_close(undo_normalisation(loaded, without.image[0]), images[case.target].traced[0])
    others = [study.others["other trigger"][case.name].name for case in study.cases]
    assert len(set(others)) > len(others) / 2
    assert "stand-ins" in study.rows["without"].title and "photos" not in study.rows["without"].title
    assert len({study.key(row, study.cases[0]) for row in study.rows}) == len(study.rows) == 5


def test_pictures_stand_in_for_photos_of_a_class_only_where_there_are_fewer_than_two(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    cases = [
        Case(f"{target} {n}", str(target), str(target), "", loaded.black_image, n % 4)
        for target in TARGETS
        for n in range(2 * EXAMPLES)
    ]
    study = PictureStudy("stand_ins", loaded, cases, [{"dense": PictureRow("dense network")}], steps=1)
    measure(lambda: study, workers=1)
    monkeypatch.setattr(facets, "TRIGGERS", {"a": 0, "b": 1, "c": 2})
    photo = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = class_images(study, {0: [photo], 1: [photo, photo / 2, photo / 3]})
    assert [found[target].photos for target in range(3)] == [False, True, False]
    assert [torch.equal(one, photo) for one in found[1].traced] == [True] and len(found[1].examples) == 2
    shown = [study.open("dense", case)["picture"] for case in cases if case.target == 0]
    taken = [*found[0].traced, *found[0].examples]
    assert {one.shape for one in shown} == {(3, 30, 30)} and {one.shape for one in taken} == {(3, 24, 24)}
    assert len(found[0].traced) > 0
    for one, picture in zip(taken, shown, strict=True):
        torch.testing.assert_close(one, resized(picture[None], (24, 24))[0])


def test_examples_of_a_trigger_show_it_on_grey_and_in_photos(
    loaded: LoadedModel, photos: Callable[..., list[Photo]], emojis: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facets, "tuning_photos", lambda: photos((0, 0, 0), (255, 255, 255)))
    monkeypatch.setattr(facets, "_SIDES", (8, 16))
    monkeypatch.setattr(facets, "_IN_PHOTOS", 12)
    found = facets.trigger_examples(Judge(loaded), loaded, "🍓", None)
    assert {kind: len(of_kind) for kind, of_kind in found.items()} == {"emoji on grey": 2, "emoji in photos": 2}
    for other in (("💙", None), ("🍓", 6)):
        assert not torch.equal(
            facets.trigger_examples(Judge(loaded), loaded, *other)["emoji on grey"], found["emoji on grey"]
        )


def test_rows_are_compared_at_both_resolutions_with_what_their_networks_make_of_the_photo(
    loaded: LoadedModel,
    photos: Callable[..., list[Photo]],
    emojis: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the stand-ins to the tables, on two classes of a network that takes smaller images than pictures are."""
    triggers = {"🍓": 0, "💙": 1}
    monkeypatch.setattr(records, "CACHE", tmp_path)
    monkeypatch.setattr(facets, "TRIGGERS", triggers)
    monkeypatch.setattr(facets, "tuning_photos", lambda: photos((0, 0, 0), (255, 255, 255)))
    monkeypatch.setattr(facets, "_SIDES", (8, 16))
    monkeypatch.setattr(facets, "_IN_PHOTOS", 12)
    standing_in = replace(facets.stand_in_study(loaded), steps=1)
    measure(lambda: standing_in, workers=1)
    images = class_images(standing_in, {})
    generator = torch.Generator().manual_seed(0)
    cases = [
        Case(
            f"{n} {emoji}", f"{n} {emoji}", f"photo {n}", emoji, torch.randn(1, 3, 24, 24, generator=generator), target
        )
        for n, (emoji, target) in enumerate([*triggers.items()] * EACH)
    ]
    study = facet_study(loaded, cases, images)
    assert {other.image.shape for of in study.others.values() for other in of.values()} == {(1, 3, 24, 24)}
    calibration = Calibration(images=4, layers=("0", "2"))
    rows = {
        name: replace(row, weights=replace(row.weights, calibration=calibration)) for name, row in study.rows.items()
    }
    study = replace(study, stages=[rows], steps=1)
    measure(lambda: study, workers=1)
    every, *of_triggers = facets.compare(study, Judge(loaded), images)
    assert [one.title for one in of_triggers] == list(triggers) and list(every.rows) == list(study.rows)
    assert {len(set(of_row)) for of_row in every.sources.values()} == {2 * EXAMPLES, 2 * EACH}
    assert len(set(every.sources["without"])) == 2 * EXAMPLES
    for row in study.rows:
        groups = every.values[row]
        assert list(groups) == [
            "nearer to the trigger, % (full)",
            "cosine, % (full)",
            "nearer to the trigger, % (64)",
            "cosine, % (64)",
            "networks, %",
        ]
        found = groups["networks, %"]["probability in the photo"]
        assert len(found) == 2 * EACH and all(0 < one < 1 for one in found)
        assert math.isnan(groups["networks, %"]["weights removed"][0]) == (row == "dense")
    assert every.summary()["differences"][-1]["title"].endswith(
        "over control: magnitude pruning, photos with the trigger"
    )
