"""Comparisons: paired differences, intervals over units, and their tables."""

from __future__ import annotations

import math

import pytest

from studies.visualization.comparing import Comparison, comparison_tables


@pytest.fixture
def comparison() -> Comparison:
    """Four questions about two classes; traces are right once more."""
    return Comparison(
        "A title",
        {"dense": "dense network", "auto": "trace"},
        {
            "dense": {"right, %": {"64": [0.0, 0.0, 1.0, 1.0]}, "about, %": {"removed": [math.nan] * 4}},
            "auto": {"right, %": {"64": [0.0, 1.0, 1.0, 1.0]}, "about, %": {"removed": [0.5] * 4}},
        },
        ["a", "a", "b", "b"],
        "classes",
        [("auto", "dense")],
    )


def test_summaries_hold_means_and_paired_differences_with_intervals_over_units(comparison: Comparison) -> None:
    summary = comparison.summary()
    dense, auto = summary["rows"]
    assert dense["right, %"]["64"] == {"mean": 50.0, "low": 0.0, "high": 100.0}
    assert auto["right, %"]["64"]["mean"] == 75 and auto["about, %"]["removed"]["mean"] == 50
    (difference,) = summary["differences"]
    assert difference["title"] == "trace, over dense network"
    assert difference["right, %"]["64"] == {"mean": 25.0, "low": 0.0, "high": 50.0}
    assert summary["units"] == 2


def test_tables_have_one_width_and_leave_unknown_cells_empty(comparison: Comparison) -> None:
    about, first, second = comparison_tables(comparison.summary())
    assert about.startswith("## A title") and "2 classes; brackets: 95 % by bootstrap over classes" in about
    assert "| trace, over dense network | +25.0 [+0.0, +50.0] |" in first
    assert len({line.count("|") for line in first.splitlines()}) == 1
    assert "| dense network |  |" in second


def test_some_of_the_questions_can_be_compared(comparison: Comparison) -> None:
    summary = comparison.only("b", [False, False, True, True]).summary()
    assert summary["title"] == "b" and summary["units"] == 1
    assert summary["differences"][0]["right, %"]["64"]["mean"] == 0
