"""Renders an explanation as a single self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade_fast._util.extras import extra_for
from spade_fast.attribution.drawing import COLOURS, overlay
from spade_fast.attribution.methods import METHODS
from spade_fast.cli.html_pages import data_url, render_template
from spade_fast.pruning.config import SOLVERS


@dataclass(frozen=True)
class _Network:
    """The content of the page for one network.

    Attributes
    ----------
    title
        Name of the network.
    target, top
        The explained class and the most probable classes, each with ``name`` and ``probability``, from the report.
    decision_kept
        Whether it predicts the same class as the dense network.
    removed_of_network
        Share of the whole network's weights that the pruned layers lack; 0 for the dense network.
    layers
        Reports of its layers; None for the dense network.
    """

    title: str
    target: Mapping[str, Any]
    top: Sequence[Mapping[str, Any]]
    decision_kept: bool
    removed_of_network: float
    layers: Sequence[Mapping[str, Any]] | None

    @property
    def best(self) -> Mapping[str, Any]:
        return self.top[0]

    @property
    def pruned(self) -> list[Mapping[str, Any]]:
        """Reports of the layers that were not skipped."""
        return [layer for layer in self.layers or () if not layer["note"]]

    @property
    def removed(self) -> float:
        """Share of zeros among the weights of the pruned layers."""
        weights = [math.prod(layer["shape"]) for layer in self.pruned]
        zeros = sum(layer["reached"] * count for layer, count in zip(self.pruned, weights, strict=True))
        return zeros / sum(weights) if weights else 0.0


def render(report: Mapping[str, Any], photo: np.ndarray, maps: Mapping[str, Sequence[np.ndarray]]) -> str:
    """Render the page with all images embedded.

    Parameters
    ----------
    report
        Content of ``report.json``.
    photo : ndarray ``[H, W, 3]``, uint8
    maps
        For each network in the report's predictions, one attribution map ``[h, w]`` per method in the report's
        settings.

    Returns
    -------
    str
        An HTML document without scripts and without references to other files or sites.
    """
    with extra_for("the page needs"):
        from matplotlib import colormaps

    settings = dict(report["settings"])
    settings["solvers"] = [f"{SOLVERS[solver]} ({solver})" for solver in report["traces"]]
    networks = [
        _Network(
            SOLVERS.get(name, "Dense network"),
            prediction["target"],
            prediction["top"],
            name not in report["traces"] or report["traces"][name]["decision_kept"],
            report["traces"][name]["network_sparsity"] if name in report["traces"] else 0.0,
            report["traces"][name]["layers"] if name in report["traces"] else None,
        )
        for name, prediction in report["predictions"].items()
    ]
    rows = [
        (METHODS[method].title, [data_url(overlay(photo, maps[name][row])) for name in report["predictions"]])
        for row, method in enumerate(settings["methods"])
    ]
    return render_template(
        "page.html",
        report=report,
        settings={**settings, "image": Path(settings["image"]).name},
        networks=networks,
        photo=data_url(photo / 255),
        rows=rows,
        scale=data_url(colormaps[COLOURS](np.linspace(0, 1, 256))[None, :, :3]),
    )
