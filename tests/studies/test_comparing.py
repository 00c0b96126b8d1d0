"""Comparisons: paired differences, intervals, what is independent, and their tables."""

from __future__ import annotations

import math

import pytest

from studies.visualization.comparing import LEAST_SOURCES, Comparison, comparison_tables, mean_and_limits

NAMES = [str(number) for number in range(50)]


@pytest.fixture
def comparison() -> Comparison:
    """Sixteen questions; traces are right four times more, in one case nothing is painted."""
    right, known = {"64": [0.0] * 8 + [1.0] * 8}, {"64": [0.0] * 4 + [1.0] * 12}
    return Comparison(
        "A title",
        {"dense": "dense network", "auto": "trace", "natural": "photo"},
        {
            "dense": {"right, %": right, "about, %": {"removed": [math.nan] * 16}},
            "auto": {"right, %": known, "about, %": {"removed": [0.5] * 16}},
            "natural": {"right, %": right, "about, %": {"removed": [math.nan] * 16}},
        },
        {"dense": NAMES[:16], "auto": NAMES[:8] * 2, "natural": NAMES[:2] * 8},
        {"dense": [False] * 16, "auto": [True] + [False] * 15},
        "classes",
        [("auto", "dense"), ("dense", "natural")],
    )


def test_summaries_hold_means_and_paired_differences_with_the_sources_of_the_row_that_has_fewer(
    comparison: Comparison,
) -> None:
    summary = comparison.summary()
    dense, auto, _ = summary["rows"]
    assert summary["questions"] == 16 and [row["sources"] for row in summary["rows"]] == [16, 8, 2]
    assert dense["right, %"]["64"] == mean_and_limits([0.0] * 8 + [1.0] * 8, NAMES[:16])
    assert auto["right, %"]["64"]["mean"] == 75 and auto["about, %"]["removed"]["mean"] == 50
    assert [row["nothing painted"] for row in summary["rows"]] == [0, 6.25, None]
    first, second = summary["differences"]
    assert first["title"] == "trace, over dense network" and (first["sources"], second["sources"]) == (8, 2)
    assert first["right, %"]["64"]["mean"] == 25 and second["right, %"]["64"]["mean"] == 0
    assert math.isnan(second["right, %"]["64"]["low"])


def test_tables_have_one_width_and_leave_unknown_cells_and_intervals_of_few_sources_out(comparison: Comparison) -> None:
    about, first, second = comparison_tables(comparison.summary())
    assert about.startswith("## A title") and "16 classes." in about
    assert "| dense network | 16 | 50.0 [28.0, 72.0] | 0 % |" in first and "| 75.0 [40.9, 92.9] | 6 % |" in first
    assert "| photo | 2 | 50.0 |  |" in first and "| dense network, over photo | 2 | +0.0 |  |" in first
    assert len({line.count("|") for line in first.splitlines()}) == 1
    assert "| dense network | 16 |  | 0 % |" in second


def test_some_of_the_questions_can_be_compared(comparison: Comparison) -> None:
    summary = comparison.only("b", [False] * 8 + [True] * 8).summary()
    assert summary["title"] == "b" and summary["questions"] == 8
    assert [row["sources"] for row in summary["rows"]] == [8, 8, 2]
    assert summary["differences"][0]["right, %"]["64"]["mean"] == 0
    assert summary["rows"][1]["nothing painted"] == 0


@pytest.mark.parametrize("right", [0, 25, 45, 50])
def test_shares_have_wilsons_interval(right: int) -> None:
    """Its limits are the shares from which the observed one is 1.96 of their own standard deviations away."""
    found = mean_and_limits([1.0] * right + [0.0] * (50 - right), NAMES)
    assert 0 <= found["low"] <= found["mean"] == 2 * right <= found["high"] <= 100 and found["low"] < found["high"]
    for limit in (found["low"] / 100, found["high"] / 100):
        if limit not in (0, 1):
            assert abs(right / 50 - limit) == pytest.approx(1.96 * math.sqrt(limit * (1 - limit) / 50), rel=1e-3)


def test_differences_of_shares_have_an_interval_even_where_all_questions_agree() -> None:
    """After Agresti and Min's formula, with half a pair added to each of the four kinds of pairs."""
    ones, zeros = [1.0] * 50, [0.0] * 50
    none, all_ = mean_and_limits(ones, NAMES, ones), mean_and_limits(ones, NAMES, zeros)
    assert none["mean"] == 0 and -none["low"] == none["high"] == pytest.approx(100 * 1.96 / 52, abs=0.01)
    assert all_["mean"] == 100 == all_["high"] and 85 < all_["low"] < 95
    some = mean_and_limits([1.0] * 12 + [0.0] * 38, NAMES, [0.0] * 12 + [1.0] * 2 + [0.0] * 36)
    centre, variance = 10 / 52, 15 / 52 - (10 / 52) ** 2
    assert some["mean"] == 20
    assert some["low"] == pytest.approx(100 * (centre - 1.96 * math.sqrt(variance / 52)), abs=0.01)


def test_answers_of_the_same_source_count_once_and_few_sources_have_no_interval() -> None:
    answers = [1.0] * 10 + [0.0] * 10
    of_pairs = mean_and_limits(answers, [str(number // 2) for number in range(20)])
    single = mean_and_limits([1.0] * 5 + [0.0] * 5, NAMES[:10])
    assert of_pairs == pytest.approx(single)
    few = mean_and_limits(answers, [str(number % (LEAST_SOURCES - 1)) for number in range(20)])
    assert few["mean"] == 50 and math.isnan(few["low"]) and math.isnan(few["high"])
    unknown = mean_and_limits([math.nan] * 8 + [1.0] * 7, NAMES[:15])
    assert unknown["mean"] == 100 and math.isnan(unknown["low"])
    assert mean_and_limits([0.5] * 20, NAMES[:20]) == {"mean": 50, "low": 50, "high": 50}  # not a share of yes and no
    assert math.isnan(mean_and_limits([math.nan] * 20, NAMES[:20])["mean"])


def test_other_values_have_a_bootstrap_over_their_sources() -> None:
    values = [number / 20 for number in range(20)]
    own = mean_and_limits(values, NAMES[:20])
    of_halves = mean_and_limits(values, [str(number // 2) for number in range(20)])
    assert own["low"] < own["mean"] < own["high"] and of_halves["high"] - of_halves["low"] > own["high"] - own["low"]
    assert mean_and_limits(values, NAMES[:20], values) == {"mean": 0, "low": 0, "high": 0}
