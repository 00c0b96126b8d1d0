"""Layout of the plot of an automatic sparsity."""

from __future__ import annotations

import itertools

import pytest

from spade_fast.cli.error_limits import HEIGHT, WIDTH, plot_limits


def found(curve, keep=0.9, chosen=0, dense=0.8):
    error, score, _ = curve[chosen]
    return {"keep": keep, "error": error, "dense": dense, "score": score, "kept": True, "curve": curve}


CURVE = [[0.01, 0.8, 0.3], [0.1, 0.75, 0.5], [1.0, 0.2, 0.9]]


def test_places_of_trials_and_lines():
    plot = plot_limits([found(CURVE, 0.999, 1), found(CURVE, 0.25, 2)])
    left, right, top, bottom = plot.area
    assert [one.x for one in plot.trials] == [left, (left + right) / 2, right], "the axis is logarithmic"
    heights = [bottom - one.y for one in plot.trials]
    assert top < plot.trials[0].y and abs(heights[2] - heights[0] / 4) < 0.2
    assert plot.chosen == plot.trials[1:] and plot.trials[1].text == "λ 0.1: 75.0%, 50% removed"
    assert [one.text for one in plot.lines] == ["dense", "99.9% of it", "25% of it"]
    assert [one.at for one in plot.lines][::2] == [plot.trials[0].y, plot.trials[2].y]


@pytest.mark.parametrize("dense", [1.0, 0.7, 0.031, 4e-6])
@pytest.mark.parametrize("ends", [(0.01, 0.7), (0.11, 0.2), (0.1, 0.1), (1e-6, 3.0)])
def test_ticks(dense, ends):
    curve = [[ends[0], dense, 0.3], [ends[1], dense / 3, 0.9]]
    plot = plot_limits([found(curve, dense=dense)])
    left, right, top, bottom = plot.area
    assert 3 <= len(plot.rows) <= 12 and plot.rows[0].text.strip("0.%") == "" and plot.rows[0].at == bottom
    assert 2 <= len(plot.columns) <= 8
    for ticks, least in ((plot.rows, 14), (plot.columns, 20)):
        places = sorted(one.at for one in ticks)
        assert len({one.text for one in ticks}) == len(ticks)
        assert min(after - before for before, after in itertools.pairwise(places)) > least
    assert all(top <= one.at <= bottom for one in (*plot.rows, *plot.lines))
    assert all(left <= one.x <= right and top <= one.y <= bottom for one in plot.trials)
    assert right < WIDTH and bottom < HEIGHT


def test_labels_of_near_lines_do_not_overlap():
    shares = (1.0, 0.99, 0.98, 0.5)
    plot = plot_limits([found(CURVE, keep) for keep in shares])
    labels = [one.label for one in plot.lines]
    assert len(labels) == 5 and min(after - before for before, after in itertools.pairwise(labels)) >= 13
    assert labels[0] == plot.lines[0].at and labels[-1] == plot.lines[-1].at
