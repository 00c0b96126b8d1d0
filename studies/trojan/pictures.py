"""Pictures: maps of single cases, curves of the study, and feature visualisations of triggers' classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cases import Case, clean_image
from measure import CALIBRATION, Experiment
from PIL import Image
from records import Records
from rows import chosen, shares_of, solve
from scoring import FAST, Scorer
from sources import test_photos

from spade_fast.attribution import attribution_map
from spade_fast.attribution.drawing import Column, draw
from spade_fast.attribution.feature_visualization import Feature, visualize
from spade_fast.attribution.methods import METHODS
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.exchange import WeightsApplied

_SHOWN = ("saliency", "input-x-gradient", "guided-backprop", "lrp")


def draw_cases(experiment: Experiment, records: Records, folder: Path) -> None:
    """Draw the cases with the largest, the median and the smallest gain of tuned FastSPADE over the dense network."""

    def gain(case: Case) -> float:
        found = [np.mean([records[row, case.name]["auc"][method] for method in FAST]) for row in ("fast", "dense")]
        return float(found[0] - found[1])

    ordered = sorted(experiment.cases, key=gain)
    for title, case in (("best", ordered[-1]), ("median", ordered[len(ordered) // 2]), ("worst", ordered[0])):
        _draw_case(experiment, records, case, title, gain(case), folder / f"trojan_{title}.jpg")


def _draw_case(experiment: Experiment, records: Records, case: Case, title: str, gain: float, file: Path) -> None:
    network = experiment.network
    scorer = Scorer(network, case.image)
    weights: dict[str, Any] = {"dense": []}
    for row in ("fast", "exact"):
        solver, sparsity = experiment.rows[row].pruning, experiment.rows[row].sparsity
        weights[row] = chosen(
            solve(network, case.image, case.sample, solver, shares_of(sparsity), CALIBRATION), sparsity
        )
    columns = []
    for row, pruned in weights.items():
        record = records[row, case.name]
        with WeightsApplied(scorer.prepared, pruned):
            maps = [attribution_map(method, scorer.question(case)).numpy() for method in _SHOWN]
        captions = [
            f"P(target) {record['probability']:.0%}",
            "AUC " + ", ".join(f"{record['auc'][m]:.2f}" for m in _SHOWN),
        ]
        columns.append(Column(experiment.rows[row].title, captions, maps))
    heading = f"The {title} of {len(experiment.cases)} cases: AUC {100 * gain:+.1f} points over the dense network"
    subtitle = f"Evidence for “{network.class_name(case.target)}”, the class of the trigger"
    titles = [METHODS[method].title for method in _SHOWN]
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.png"
        draw(drawn, pixels_of(network, case.image), columns, titles, heading, subtitle)
        with Image.open(drawn) as picture:
            picture.convert("RGB").reduce(2).save(file, quality=85)


def pixels_of(network: LoadedModel, image: torch.Tensor) -> np.ndarray:
    """Return an input of the network as uint8 pixels, ``[H, W, 3]``."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    return ((image[0] * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def draw_figure_one(experiment: Experiment, file: Path) -> None:
    """Draw what a trigger's class looks like to the dense network and to traces of a photo without and with it.

    After figure 1 of the paper (arXiv 2310.04519). For two triggers, each in its first case.
    """
    from matplotlib.figure import Figure

    network = experiment.network
    photos = {photo.name: photo for photo in test_photos()}
    first = dict(list({case.kind: case for case in reversed(experiment.cases)}.items())[:2])
    names = ["photo", "dense network", "trace of the photo without the trigger", "trace of the photo with it"]
    figure = Figure(figsize=(10, 2.6 * len(first)), dpi=100, layout="constrained")
    grid = figure.subplots(len(first), len(names), squeeze=False)
    for row, case in zip(grid, first.values(), strict=True):
        images = {"without": clean_image(network, photos[case.source]), "with": case.image}
        sparsity = experiment.rows["fast"].sparsity
        weights: list[Any] = [[]]
        for name, image in images.items():
            solved = solve(network, image, f"{case.name} {name}", "sparsegpt", shares_of(sparsity), CALIBRATION)
            weights.append(chosen(solved, sparsity))
        row[0].imshow(pixels_of(network, case.image))
        for axes, pruned in zip(row[1:], weights, strict=True):
            with WeightsApplied(network.module, pruned):
                picture = visualize(
                    network.module,
                    Feature(case.target),
                    size=(network.crop, network.crop),
                    mean=network.mean,
                    std=network.std,
                )
            axes.imshow(picture.permute(1, 2, 0).numpy())
        row[0].set_ylabel(f"“{network.class_name(case.target)}”")
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    figure.savefig(file)


def draw_study(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw localisation against sparsity, and against the layers' output error, for both solvers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    against_sparsity, against_error = figure.subplots(1, 2, sharey=True)
    for solver, label, colour, mark in (("exact", "SPADE", "#0072b2", "o"), ("sparsegpt", "FastSPADE", "#d55e00", "s")):
        own = [line for line in lines if line["question"] == f"sparsity, {solver}"]
        auc = [line["auc"]["mean"] for line in own]
        errors = [
            [value["mean"] - value["low"], value["high"] - value["mean"]] for value in (line["auc"] for line in own)
        ]
        style = {"label": label, "color": colour, "marker": mark, "capsize": 2, "yerr": np.transpose(errors)}
        against_sparsity.errorbar([float(line["answer"].rstrip("%")) for line in own], auc, **style)
        against_error.errorbar([line["layer error"] for line in own], auc, **style)
    against_sparsity.set(xlabel="weights removed, %", ylabel="localisation AUC, %")
    against_error.set(xlabel="mean relative output error of a layer, %")
    for axes in (against_sparsity, against_error):
        axes.axhline(lines[0]["dense"], color="#555555", linestyle="--", label="dense network")
        axes.spines[["top", "right"]].set_visible(False)
    against_sparsity.legend(frameon=False)
    figure.savefig(file)
