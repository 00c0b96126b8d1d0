"""Renders an explanation as a single self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade_fast._util.extras import extra_for
from spade_fast.attribution.drawing import COLOURS, Column, overlay
from spade_fast.cli.columns import row_titles
from spade_fast.cli.error_limits import ErrorLimits, plot_limits
from spade_fast.cli.explanation import (
    empty_maps,
    equal_levels,
    explained,
    noise_warnings,
    solver_warnings,
    trace_title,
    traces_of,
)
from spade_fast.cli.html_pages import data_url, render_template
from spade_fast.pruning.config import SOLVERS


@dataclass(frozen=True)
class _Trace:
    """The content of the page for one trace.

    Attributes
    ----------
    title
        Its solver, and what tells it from the other traces.
    target, top
        The explained class and the most probable classes, each with ``name`` and ``probability``.
    against
        Probability of the explained class among it and the other one, if there is one.
    decision_kept
        Whether it predicts the same class as the dense network.
    removed, removed_of_network
        Shares of zeros: among the weights of its layers, and among the whole network's.
    layers
        Reports of its layers.
    """

    title: str
    target: Mapping[str, Any]
    top: Sequence[Mapping[str, Any]]
    against: float | None
    decision_kept: bool
    removed: float
    removed_of_network: float
    layers: Sequence[Mapping[str, Any]]

    @property
    def best(self) -> Mapping[str, Any]:
        return self.top[0]

    @property
    def pruned(self) -> list[Mapping[str, Any]]:
        """Reports of the layers that were not skipped."""
        return [layer for layer in self.layers if not layer["note"]]


@dataclass(frozen=True)
class _Solver:
    """The content of the page for one solver.

    Attributes
    ----------
    name, title
        Its key and its name.
    traces
        All its traces, the mildest of the first draw first.
    found
        How the automatic sparsities of the first draw were found, from the report; empty for another sparsity.
    warnings
        What is to be known of its traces.
    equal
        Which of its levels are the same trace.
    """

    name: str
    title: str
    traces: Sequence[_Trace]
    found: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    equal: Sequence[str]

    @property
    def plot(self) -> ErrorLimits | None:
        return plot_limits(self.found) if self.found else None

    @property
    def description(self) -> str:
        """What the plot shows, in words."""
        chosen = [f"λ {one['error']:.3g} with {one['score']:.1%} to keep {100 * one['keep']:g}%" for one in self.found]
        trials = self.plot.trials if self.plot else ()
        return f"{len(trials)} trials. Dense network: {self.found[0]['dense']:.1%}. Chosen: {'; '.join(chosen)}."


def render(report: Mapping[str, Any], photo: np.ndarray, columns: Sequence[Column]) -> str:
    """Render the page with all images embedded.

    Parameters
    ----------
    report
        Content of ``report.json``.
    photo : ndarray ``[H, W, 3]``, uint8
    columns
        Columns of maps, each with one attribution map ``[h, w]`` per method in the report's settings.

    Returns
    -------
    str
        An HTML document without scripts and without references to other files or sites.
    """
    with extra_for("the page needs"):
        from matplotlib import colormaps

    settings = dict(report["settings"])
    settings["solvers"] = [f"{SOLVERS[solver]} ({solver})" for solver in settings["solvers"]]
    rows = [
        (title, [data_url(overlay(photo, column.maps[row])) for column in columns])
        for row, title in enumerate(row_titles(settings["methods"], settings["smooth"] is not None))
    ]
    solvers = [_solver(solver, report) for solver in report["settings"]["solvers"]]
    predictions = [("Dense network", report["predictions"]["dense"]["top"])]
    predictions += [(solver.traces[0].title, solver.traces[0].top) for solver in solvers]
    return render_template(
        "page.html",
        report=report,
        settings={**settings, "image": Path(settings["image"]).name},
        dense=report["predictions"]["dense"],
        solvers=solvers,
        kept=explained(report),
        empty_maps=empty_maps(report),
        noise_warnings=noise_warnings(report),
        predictions=predictions,
        columns=columns,
        photo=data_url(photo / 255),
        rows=rows,
        scale=data_url(colormaps[COLOURS](np.linspace(0, 1, 256))[None, :, :3]),
    )


def _solver(solver: str, report: Mapping[str, Any]) -> _Solver:
    own = traces_of(solver, report)
    traces = [
        _Trace(
            trace_title(one, own),
            report["predictions"][name]["target"],
            report["predictions"][name]["top"],
            report["predictions"][name]["against"],
            one["decision_kept"],
            one["removed"],
            one["network_sparsity"],
            one["layers"],
        )
        for name, one in own.items()
    ]
    found = [one["auto"] for one in own.values() if one["draw"] == 0 and one["auto"] is not None]
    warnings, equal = solver_warnings(solver, report), equal_levels(solver, report)
    return _Solver(solver, SOLVERS[solver], traces, found, warnings, equal)
