"""Pictures: maps of single cases, feature visualisations of triggers' classes, and curves of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from spade_fast.attribution.drawing import Column, draw
from spade_fast.attribution.methods import METHODS
from spade_fast.attribution.visualization import Feature, visualize
from spade_fast.attribution.visualization.views import canvas
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case, clean_image, undo_normalisation
from studies.shared.making import Maker, Other
from studies.shared.measure import Study
from studies.shared.photos import test_photos
from studies.shared.records import Records
from studies.shared.report import RESULTS
from studies.shared.rows import GRADIENTS, Weights

_SHOWN = {
    "dense": "Dense network",
    "fast two": "FastSPADE, two levels",
    "smooth": "SmoothGrad",
    "fast two, smooth": "Both",
}


def draw_cases(study: Study, records: Records) -> None:
    """Draw the cases with the largest, the median and the smallest gain of two-level FastSPADE over the dense one."""

    def gain(case: Case) -> float:
        found = [records[study.key(row, case)][study.metric] for row in ("fast two", "dense")]
        two, dense = (float(np.mean([of[method] for method in GRADIENTS])) for of in found)
        return two - dense

    ordered = sorted(study.cases, key=gain)
    for title, case in (("best", ordered[-1]), ("median", ordered[len(ordered) // 2]), ("worst", ordered[0])):
        _draw_case(study, records, case, title, gain(case), RESULTS / f"trojan_{title}.jpg")


def _draw_case(study: Study, records: Records, case: Case, title: str, gain: float, file: Path) -> None:
    maker = Maker(study.network, case.image)
    columns = []
    for row, maps, _ in maker.maps(case, {row: study.rows[row] for row in _SHOWN}):
        record = records[study.key(row, case)]
        captions = [
            f"P(target) {record['probability']:.0%}",
            "AUC " + ", ".join(f"{record[study.metric][method]:.2f}" for method in GRADIENTS),
        ]
        columns.append(Column(_SHOWN[row], captions, [maps[method].numpy() for method in GRADIENTS]))
    heading = f"The {title} of {len(study.cases)} cases: AUC {100 * gain:+.1f} points over the dense network"
    subtitle = f"Evidence for “{study.network.class_name(case.target)}”, the class of the trigger"
    titles = [METHODS[method].title for method in GRADIENTS]
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.png"
        draw(drawn, pixels_of(study.network, case.image), columns, titles, heading, subtitle)
        with Image.open(drawn) as picture:
            picture.convert("RGB").reduce(2).save(file, quality=85)


def pixels_of(network: LoadedModel, image: torch.Tensor) -> np.ndarray:
    """Return an input of the network as uint8 pixels, ``[H, W, 3]``."""
    colours = undo_normalisation(network, image[0])
    return (colours.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def draw_classes(study: Study) -> None:
    """Draw what a trigger's class looks like to the dense network and to traces of a photo without and with it.

    After figure 1 of the paper (arXiv 2310.04519). For two triggers, each in its first case.
    """
    from matplotlib.figure import Figure

    network = study.network
    photos = {photo.name: photo for photo in test_photos()}
    first = dict(list({case.kind: case for case in reversed(study.cases)}.items())[:2])
    names = ["photo", "dense network", "trace of the photo without the trigger", "trace of the photo with it"]
    figure = Figure(figsize=(10, 2.6 * len(first)), dpi=100, layout="constrained")
    grid = figure.subplots(len(first), len(names), squeeze=False)
    for row, case in zip(grid, first.values(), strict=True):
        image = clean_image(network, photos[case.source])
        without = Other(case.source, image, int(network.module(image).argmax()))
        maker = Maker(network, case.image, {"clean": {case.name: without}})
        row[0].imshow(pixels_of(network, case.image))
        traces = (
            Weights(),
            Weights("sparsegpt", keep=0.9, whose="clean", goal="theirs"),
            Weights("sparsegpt", keep=0.9),
        )
        for axes, weights in zip(row[1:], traces, strict=True):
            with maker.made(case, weights).applied():
                (picture,) = visualize(
                    network.module,
                    Feature(case.target),
                    size=canvas(network.size),
                    view=network.size,
                    mean=network.mean,
                    std=network.std,
                ).pictures
            axes.imshow(picture.permute(1, 2, 0).numpy())
        row[0].set_ylabel(f"“{network.class_name(case.target)}”")
        for axes in row:
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    figure.savefig(RESULTS / "trojan_class.jpg")


def draw_settings(summary: Mapping[str, Any], file: Path) -> None:
    """Draw localisation against sparsity and against the layers' output error, for given and automatic sparsities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    against_sparsity, against_error = figure.subplots(1, 2, sharey=True)
    curves = (
        ("sparsity, exact: ", "SPADE", "#0072b2", "o"),
        ("sparsity, sparsegpt: ", "FastSPADE", "#d55e00", "s"),
        ("share kept: ", "FastSPADE, automatic", "#009e73", "^"),
    )
    for question, label, colour, mark in curves:
        own = [row for name, row in summary["rows"].items() if name.startswith(question)]
        means = [row["mean"] for row in own]
        errors = np.transpose([[mean["mean"] - mean["low"], mean["high"] - mean["mean"]] for mean in means])
        style = {"label": label, "color": colour, "marker": mark, "capsize": 2, "yerr": errors}
        for axes, fact in ((against_sparsity, "weights removed"), (against_error, "layer error")):
            axes.errorbar([row[fact] for row in own], [mean["mean"] for mean in means], **style)
    against_sparsity.set(xlabel="weights removed, %", ylabel="localisation AUC, %")
    against_error.set(xlabel="mean relative output error of a layer, %")
    for axes in (against_sparsity, against_error):
        axes.axhline(summary["rows"]["dense"]["mean"]["mean"], color="#555555", linestyle="--", label="dense network")
        axes.spines[["top", "right"]].set_visible(False)
    against_sparsity.legend(frameon=False)
    figure.savefig(file)
