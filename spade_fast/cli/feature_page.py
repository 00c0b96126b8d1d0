"""What pages of feature visualisation have in common: a row per feature, a cell per network, pictures in each cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade_fast._util.errors import DeadFeatureError
from spade_fast._util.files import REPORT
from spade_fast._util.versions import library_version
from spade_fast.cli.doctor import versions
from spade_fast.cli.drawings import Drawing, Drawn
from spade_fast.cli.html_pages import data_url, render_template
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import PruneConfig

PAGE = "index.html"
START = "start"


@dataclass(frozen=True)
class Picture:
    """A picture of a cell.

    Attributes
    ----------
    name
        Of its file, without suffix.
    pixels : ndarray ``[H, W, 3]``, uint8
    caption
        A short line of text.
    activation
        Of the feature in it; None if it is a photo, or a part of one.
    """

    name: str
    pixels: np.ndarray
    caption: str
    activation: float | None = None

    @property
    def address(self) -> str:
        """The picture as a data URL."""
        return data_url(self.pixels / 255)


@dataclass(frozen=True)
class Cell:
    """The pictures of a feature of one network, or photos or parts of them.

    Attributes
    ----------
    heading
        Names the network.
    captions, warnings
        Short lines of text below the pictures.
    pictures
        In the order of their numbers.
    missing
        Why there are none.
    small
        Whether the pictures are parts of photos.
    """

    heading: str
    captions: Sequence[str] = ()
    warnings: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    missing: str = ""
    small: bool = False


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes
    ----------
    title
        Its name.
    cells
        One per column.
    share
        Of the decision; None where there is no decision.
    """

    title: str
    cells: Sequence[Cell]
    share: float | None = None

    @property
    def wide(self) -> bool:
        """Whether a cell has several pictures of full size: then each takes the page's whole width."""
        return any(len(cell.pictures) > 1 and not cell.small for cell in self.cells)

    def entries(self) -> dict[str, Any]:
        """Return what ``report.json`` tells of it."""
        cells = [
            {
                "heading": cell.heading,
                "captions": [*(one.caption for one in cell.pictures), *cell.captions, *cell.warnings],
                "files": [f"{one.name}.png" for one in cell.pictures],
                "activations": [one.activation for one in cell.pictures if one.activation is not None],
                "missing": cell.missing or None,
            }
            for cell in self.cells
        ]
        return {"feature": self.title, **({} if self.share is None else {"share": self.share}), "cells": cells}


def drawn_pictures(stem: str, drawn: Drawn, drawing: Drawing, layer: str | None) -> list[Picture]:
    """Name the pictures of a feature, and say what its activation in each is."""
    names = [stem] if len(drawn.pictures) == 1 else [f"{stem}-{number + 1}" for number in range(len(drawn.pictures))]
    what = "logit" if layer is None else "activation"
    than = " above the mean of the others" if drawing.contrast else ""
    return [
        Picture(name, pixels, f"{what} {rounded(activation)}{than}", activation)
        for name, pixels, activation in zip(names, drawn.pictures, drawn.activations, strict=True)
    ]


def rounded(activation: float) -> str:
    """Return three digits of an activation."""
    return f"{activation:#.3g}".rstrip(".")


def start_cells(drawing: Drawing, network: LoadedModel, index: int, layer: str | None) -> list[Cell]:
    """Return the cell of the photo that pictures of a feature begin with, if there is one."""
    pixels = drawing.first_picture(network)
    if pixels is None or drawing.start is None:
        return []
    what, activation = "logit" if layer is None else "activation", drawing.first_activation(network, index, layer)
    return [
        Cell(
            "Start",
            [f"{what} {rounded(activation)} in it, in the dense network"],
            pictures=[Picture(START, pixels, drawing.start.name)],
        )
    ]


def check_drawn(cells: Sequence[Cell]) -> None:
    """Raise DeadFeatureError if no cell has a picture."""
    if not any(cell.pictures for cell in cells):
        raise DeadFeatureError(f"nothing could be drawn: {cells[0].missing}")


def tell_missing(rows: Sequence[Row], tell: Callable[[str], None]) -> None:
    """Tell which cells have no pictures, and why."""
    for row in rows:
        for cell in row.cells:
            if cell.missing:
                tell(f"not drawn: {row.title}, {cell.heading}: {cell.missing}")


def write_page(
    folder: Path,
    template: str,
    title: str,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    **content: Any,
) -> list[str]:
    """Write the pictures, ``index.html`` and ``report.json``, and return the names of all files of the folder.

    Parameters
    ----------
    folder
        Files that are there already belong to the result.
    template
        Name of the page's template.
    title, rows
        Of the page.
    settings
        Written into the report; those that are not the defaults are shown at the end of the page.
    notes
        What was assumed about the network.
    content
        Further values of the template.
    """
    from PIL import Image

    pictures = {one.name: one.pixels for row in rows for cell in row.cells for one in cell.pictures}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    page = render_template(
        template,
        title=title,
        rows=rows,
        settings=settings,
        notes=notes,
        changed=_changed(settings),
        version=library_version(),
        **content,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    own = [f"{name}.png" for name in pictures]
    others = {path.name for path in folder.iterdir()} - {*own, PAGE}
    names = [*own, *sorted(others), REPORT, PAGE]
    report = {
        "settings": settings,
        "notes": list(notes),
        "title": title,
        "features": [row.entries() for row in rows],
        "versions": versions(),
        "files": sorted(names),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return names


def _changed(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that are not the defaults in words; the page does not say where a photo lay."""
    usual = {**vars(Setup()), **PruneConfig(seed=Drawing.seed).record(), **Drawing().settings()}
    changed = {name: value for name, value in settings.items() if name in usual and value != usual[name]}
    words = []
    for name, value in changed.items():
        if value is True:
            words.append(name)
        elif isinstance(value, Mapping):
            words.append(f"{name} by layer")
        else:
            shown = Path(value).name if name == "start" else value
            words.append(f"{name} {', '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    return words
