"""What pages of feature visualisation have in common: a row per feature, a cell per network, pictures in each cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spade_fast._util.files import REPORT
from spade_fast._util.versions import library_version
from spade_fast.cli.doctor import versions
from spade_fast.cli.html_pages import data_url, render_template
from spade_fast.pruning.traces import Trace

PAGE = "index.html"


@dataclass(frozen=True)
class Cell:
    """The pictures of a feature of one network, or crops of photos that excite it.

    Attributes
    ----------
    heading
        Names the network.
    captions, warnings
        Short lines of text below the pictures.
    pictures
        By the name of their file without suffix ``[H, W, 3]``, uint8.
    missing
        Why there are none.
    """

    heading: str
    captions: Sequence[str] = ()
    warnings: Sequence[str] = ()
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    missing: str = ""

    @property
    def addresses(self) -> list[str]:
        """The pictures as data URLs."""
        return [data_url(picture / 255) for picture in self.pictures.values()]


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

    def entries(self) -> dict[str, Any]:
        """Return what ``report.json`` tells of it."""
        cells = [
            {
                "heading": cell.heading,
                "captions": [*cell.captions, *cell.warnings],
                "files": [f"{name}.png" for name in cell.pictures],
                "missing": cell.missing or None,
            }
            for cell in self.cells
        ]
        return {"feature": self.title, **({} if self.share is None else {"share": self.share}), "cells": cells}


def numbered(stem: str, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Name pictures, of which there are one or several."""
    if len(pictures) == 1:
        return {stem: pictures[0]}
    return {f"{stem}-{number}": picture for number, picture in enumerate(pictures, 1)}


def removed(trace: Trace) -> str:
    """Say how much of its layers a trace removes."""
    return f"{trace.sparsity:.1%} removed in {len(trace.layers)} layer{'' if len(trace.layers) == 1 else 's'}"


def write_page(
    folder: Path, template: str, title: str, rows: Sequence[Row], settings: Mapping[str, Any], **content: Any
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
        Shown at the end of the page, and written into the report.
    content
        Further values of the template.
    """
    from PIL import Image

    pictures = {name: picture for row in rows for cell in row.cells for name, picture in cell.pictures.items()}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    shown = {name: _shown(name, value) for name, value in settings.items()}
    page = render_template(template, title=title, rows=rows, settings=shown, version=library_version(), **content)
    (folder / PAGE).write_text(page, encoding="utf-8")
    own = [f"{name}.png" for name in pictures]
    others = {path.name for path in folder.iterdir()} - {*own, PAGE}
    names = [*own, *sorted(others), REPORT, PAGE]
    report = {
        "settings": settings,
        "title": title,
        "features": [row.entries() for row in rows],
        "versions": versions(),
        "files": sorted(names),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return names


def _shown(name: str, value: Any) -> Any:
    """Return a setting as the page shows it, which does not say where a photo lay."""
    if name == "start" and value is not None:
        return Path(value).name
    return ", ".join(map(str, value)) if isinstance(value, list) else value
