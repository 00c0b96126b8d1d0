"""Ladders of the studies: those of traces are the package's, those of controls have errors measured on the image."""

from __future__ import annotations

import math

import pytest
import torch

import spade_fast
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.ladders import LEVELS, Ladder
from studies.shared.ladders import Calibration, make_ladders

CALIBRATION = Calibration(images=4, layers=("0", "2"))


def weight(ladder: Ladder, level: int) -> torch.Tensor:
    pruned = ladder[level].pruned
    assert pruned is not None
    return pruned.dense()


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_a_trace_of_a_ladder_is_that_of_the_package(loaded: LoadedModel, solver: str) -> None:
    image = torch.rand(1, 3, 24, 24)
    solved = make_ladders(loaded, image, "name", [solver], CALIBRATION)[solver]
    level = 1 + LEVELS.index(0.5)
    expected = spade_fast.trace(
        loaded.module, CALIBRATION.augmented(loaded, image, "name"), sparsity=0.5, solver=solver, layers=["0", "2"]
    )
    assert list(solved.ladders) == ["0", "2"] and solved.seconds > 0
    for name, ladder in solved.ladders.items():
        torch.testing.assert_close(weight(ladder, level), expected.weight(name))


def test_draws_and_names_change_the_calibration(loaded: LoadedModel) -> None:
    image = torch.rand(1, 3, 24, 24)
    first, again = (next(iter(CALIBRATION.augmented(loaded, image, "name"))) for _ in range(2))
    draw = next(iter(Calibration(images=4, draw=1).augmented(loaded, image, "name")))
    assert torch.equal(first, again) and not torch.equal(first, draw)
    assert torch.equal(draw, next(iter(CALIBRATION.augmented(loaded, image, "name/draw1"))))


def test_controls_remove_small_or_random_weights_and_change_nothing_else(loaded: LoadedModel) -> None:
    image = torch.rand(1, 3, 24, 24)
    made = make_ladders(loaded, image, "name", ["magnitude", "random", "sparsegpt"], CALIBRATION)
    again = make_ladders(loaded, image, "name", ["random"], CALIBRATION)
    other = make_ladders(loaded, image, "other", ["random"], CALIBRATION)
    before = loaded.module.get_parameter("2.weight").detach()
    level = 1 + LEVELS.index(0.6)
    smallest, drawn = (weight(made[kind].ladders["2"], level) for kind in ("magnitude", "random"))
    for found in (smallest, drawn):
        assert int((found == 0).sum()) == round(0.6 * before.numel())
        assert torch.equal(found[found != 0], before[found != 0])
    assert smallest[smallest != 0].abs().min() > before[smallest == 0].abs().max()
    assert torch.equal(drawn, weight(again["random"].ladders["2"], level))
    assert not torch.equal(drawn, weight(other["random"].ladders["2"], level))


def test_errors_of_controls_are_those_of_the_outputs_on_the_calibration_images(loaded: LoadedModel) -> None:
    image = torch.rand(1, 3, 24, 24)
    ladder = make_ladders(loaded, image, "name", ["magnitude"], CALIBRATION)["magnitude"].ladders["0"]
    pixels = torch.cat(list(CALIBRATION.augmented(loaded, image, "name"))).movedim(1, 0).flatten(1)
    dense = loaded.module.get_parameter("0.weight").detach().flatten(1)
    for index in (1, 4, len(LEVELS)):
        change = weight(ladder, index).flatten(1) - dense
        expected = math.sqrt(float((change @ pixels).square().sum() / (dense @ pixels).square().sum()))
        assert ladder[index].report.measured_error == pytest.approx(expected, rel=1e-4)
    assert ladder[0].report.measured_error == 0 and ladder[0].pruned is None
