"""Maps of rows: those of traces are the package's, means are of normalised maps, goals are the ones asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from captum.attr import InputXGradient, Saliency
from torch import Tensor

import spade_fast
from spade_fast._util.draws import add_noise, noise_deviation
from spade_fast.attribution import SmoothGrad, attribution_map
from spade_fast.attribution.methods import Question
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case, probabilities
from studies.shared.ladders import Calibration
from studies.shared.making import Maker, Other, smallest_that_holds
from studies.shared.rows import DENSE, Row, Rows, Source, Weights, draws, fixed, kept, row, two_levels
from studies.shared.signed_smoothgrad import signed_smoothgrad

CALIBRATION = Calibration(images=4, layers=("0", "2"))
METHODS = ("saliency", "input-x-gradient")


def maps_of(maker: Maker, case: Case, rows: Rows) -> dict[str, dict[str, Tensor]]:
    return {name: maps for name, maps, _ in maker.maps(case, rows)}


def facts_of(maker: Maker, case: Case, *sources: Source) -> dict[str, float]:
    ((_, _, facts),) = maker.maps(case, {"row": row("title", *sources, methods=("saliency",))})
    return facts


def own_map(maker: Maker, case: Case, method: str) -> Tensor:
    return attribution_map(method, Question(maker.prepared, case.image, case.target, maker.network.black))


def test_an_automatic_row_has_the_maps_of_the_packages_automatic_trace(loaded: LoadedModel, cases: list[Case]) -> None:
    case, maker = cases[1], Maker(loaded, cases[1].image)
    found = maps_of(maker, case, {"auto": row("", kept("sparsegpt", 0.8, calibration=CALIBRATION), methods=METHODS)})
    made = spade_fast.trace(
        loaded.module,
        CALIBRATION.augmented(loaded, case.image, case.sample),
        inputs=case.image,
        target=case.target,
        keep=0.8,
        solver="sparsegpt",
        layers=["0", "2"],
    )
    assert made.auto is not None and made.sparsity > 0
    with made.applied(loaded.module):
        for method in METHODS:
            torch.testing.assert_close(found["auto"][method], own_map(maker, case, method))
    facts = facts_of(maker, case, kept("sparsegpt", 0.8, calibration=CALIBRATION))
    assert facts["limit"] == made.auto.error and facts["probability"] == pytest.approx(made.auto.score)
    assert facts["kept"] == 1 and facts["layer error"] <= facts["limit"]


@pytest.mark.parametrize("method", METHODS)
def test_signed_smoothgrad_is_captums_over_the_packages_copies(
    loaded: LoadedModel, cases: list[Case], method: str
) -> None:
    case, smooth = cases[0], SmoothGrad(noise=0.2, copies=10)
    maker = Maker(loaded, case.image)
    question = Question(maker.prepared, case.image, case.target, loaded.black)
    deviation = noise_deviation(case.image, smooth.noise)
    copies = [add_noise(case.image, deviation, [f"smoothgrad/{index}"], torch.float32) for index in range(10)]
    captums = Saliency(maker.prepared) if method == "saliency" else InputXGradient(maker.prepared)
    options = {"abs": False} if method == "saliency" else {}
    expected = sum(captums.attribute(copy, target=case.target, **options) for copy in copies).detach() / 10
    found = signed_smoothgrad(method, question, smooth)
    torch.testing.assert_close(found, expected.abs().sum(1)[0])
    assert float(found.sum()) < float(attribution_map(method, question, smooth).sum())  # magnitudes do not cancel out


def test_the_network_is_dense_again_after_any_row(loaded: LoadedModel, cases: list[Case]) -> None:
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    maker = Maker(loaded, cases[0].image, neurons=("2",))
    traces = two_levels("exact", calibration=CALIBRATION)
    rows = {"traces": row("", *traces), "pathway": row("", *two_levels("pathway")), "dense": row("", Source(DENSE))}
    alone = maps_of(maker, cases[0], {"dense": rows["dense"]})
    together = maps_of(maker, cases[0], rows)
    assert all(torch.equal(value, before[name]) for name, value in loaded.module.state_dict().items())
    assert torch.equal(together["dense"]["saliency"], alone["dense"]["saliency"])


def test_means_are_of_maps_divided_by_their_sums_group_by_group(loaded: LoadedModel, cases: list[Case]) -> None:
    dense, half = Source(DENSE), fixed("sparsegpt", 0.5, CALIBRATION)
    most = fixed("sparsegpt", {"2": 0.85}, CALIBRATION)
    maker = Maker(loaded, cases[0].image)
    rows = {
        "dense": row("", dense, methods=METHODS),
        "half": row("", half, methods=METHODS),
        "most": row("", most, methods=METHODS),
        "mean": Row("", ((dense,), (half, most)), METHODS),
    }
    found = maps_of(maker, cases[0], rows)
    for method in METHODS:
        one, two, three = (found[name][method] / found[name][method].sum() for name in ("dense", "half", "most"))
        expected = one / 2 + two / 4 + three / 4
        mean = found["mean"][method]
        torch.testing.assert_close(mean / mean.sum(), expected)


def test_what_is_known_of_several_networks_is_averaged_without_the_dense_one(
    loaded: LoadedModel, cases: list[Case]
) -> None:
    maker, case = Maker(loaded, cases[0].image), cases[0]
    half, most = (fixed("sparsegpt", share, CALIBRATION) for share in (0.5, 0.85))
    single = [facts_of(maker, case, one) for one in (half, most)]
    both = facts_of(maker, case, half, most, Source(DENSE))
    for fact in ("sparsity", "layer error", "probability"):
        assert both[fact] == pytest.approx((single[0][fact] + single[1][fact]) / 2)
    assert single[0]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert both["seconds of the ladder"] == single[0]["seconds of the ladder"]  # one ladder serves both
    dense = facts_of(maker, case, Source(DENSE))
    expected = float(probabilities(loaded, case.image)[case.target])
    assert dense["probability"] == pytest.approx(expected) and "sparsity" not in dense


def test_goals_are_the_probability_of_the_case_of_its_rival_or_of_the_other_image(
    loaded: LoadedModel, cases: list[Case]
) -> None:
    case = cases[0]
    other = Other("other", cases[2].image, 3)
    maker = Maker(loaded, case.image, {"theirs": {case.name: other}})
    maker.made(case, DENSE)
    for weights, image, target in (
        (Weights("sparsegpt", keep=0.5, calibration=CALIBRATION), case.image, case.target),
        (Weights("sparsegpt", keep=0.5, goal="rival", calibration=CALIBRATION), case.image, case.rival),
        (Weights("sparsegpt", keep=0.5, whose="theirs", calibration=CALIBRATION), case.image, case.target),
        (Weights("sparsegpt", keep=0.5, whose="theirs", goal="theirs", calibration=CALIBRATION), other.image, 3),
    ):
        assert maker._goal(case, weights)() == pytest.approx((float(probabilities(loaded, image)[target]),))
    noisy = Weights("sparsegpt", keep=0.5, calibration=replace(CALIBRATION, noise=0.05))
    assert len(maker._goal(case, noisy)()) == 2


def test_another_images_trace_is_solved_for_that_image(loaded: LoadedModel, cases: list[Case]) -> None:
    case, second = cases[0], cases[2]
    maker = Maker(loaded, case.image, {"theirs": {case.name: Other(second.sample, second.image, second.target)}})
    weights = replace(fixed("sparsegpt", 0.5, CALIBRATION).weights, whose="theirs")
    expected = spade_fast.trace(
        loaded.module,
        CALIBRATION.augmented(loaded, second.image, second.sample),
        sparsity=0.5,
        solver="sparsegpt",
        layers=["0", "2"],
    )
    with maker.made(case, weights).applied():
        torch.testing.assert_close(loaded.module.get_parameter("2.weight").detach(), expected.weight("2"))


def test_a_pathway_keeps_as_few_neurons_as_the_score_allows(loaded: LoadedModel, cases: list[Case]) -> None:
    maker, case = Maker(loaded, cases[0].image, neurons=("2", "4")), cases[0]
    strict, loose = (facts_of(maker, case, kept("pathway", keep)) for keep in (0.99, 0.5))
    dense = float(probabilities(loaded, case.image)[case.target])
    assert strict["kept"] == loose["kept"] == 1
    assert strict["probability"] >= 0.99 * dense and loose["probability"] >= 0.5 * dense
    assert strict["sparsity"] <= loose["sparsity"]


def test_plain_maps_are_one_for_all_methods(loaded: LoadedModel, cases: list[Case]) -> None:
    maker = Maker(loaded, cases[0].image)
    ((_, maps, facts),) = maker.maps(cases[0], {"edges": Row("", plain="edges", methods=METHODS)})
    assert maps["saliency"] is maps["input-x-gradient"] and facts == {}


def test_bisection_finds_the_last_that_holds_and_the_first_if_none_does() -> None:
    values = (1.0, 0.8, 0.6, 0.4)
    assert smallest_that_holds(values, lambda value: value > 0.5) == 0.6
    assert smallest_that_holds(values, lambda value: False) == 1.0
    assert smallest_that_holds(values, lambda value: True) == 0.4


def test_draws_have_two_levels_each() -> None:
    found = draws("sparsegpt", 3, 8)
    assert [(one.weights.calibration.draw, one.weights.keep) for one in found] == [
        (draw, keep) for draw in range(3) for keep in (0.9, 0.5)
    ]
