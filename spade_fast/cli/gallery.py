"""The gallery of a batch: pages with a picture, the predictions and the maps of each sample, made from its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.errors import UserError
from spade_fast._util.extras import require
from spade_fast._util.files import write_whole, writing
from spade_fast._util.versions import library_version
from spade_fast.attribution.drawing import overlay
from spade_fast.attribution.methods import METHODS
from spade_fast.batch.index import index_rows
from spade_fast.batch.results import Results, read_run
from spade_fast.batch.thumbnails import SIDE, decode_thumbnail
from spade_fast.cli.html_pages import data_url, render_template
from spade_fast.pruning.config import SOLVERS

PAGE, _FOLDER = "index.html", "gallery"
GROUPS = {"lost": "Lost the decision", "kept": "Kept the decision", "failed": "Failed", "damaged": "Damaged files"}
_MOST_SAMPLES = 10_000
_PICTURES_PER_PAGE, _LEAST_PER_PAGE = 200, 10


class Gallery:
    """The samples of a batch in the order of the gallery: those that lost the decision first.

    Attributes
    ----------
    counts : Counter of str
        Number of samples by key of `GROUPS`.

    Raises
    ------
    ValueError
        `folder` is not that of a batch.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._results = folder, Results(folder)
        self._settings = read_run(folder)["settings"]
        self.counts: Counter[str] = Counter()
        self._rows: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
        for row in index_rows(self._results, folder):
            row.update(_class_names(row))
            row["kept"] = _kept(row)
            group = row["state"] if row["state"] != "finished" else "kept" if row["decision_kept"] else "lost"
            self.counts[group] += 1
            if len(self._rows[group]) < _MOST_SAMPLES:
                self._rows[group].append(row)

    def is_complete(self) -> bool:
        """Whether all pages exist."""
        return all(self._path(number).exists() for number in range(1, len(self._pages()) + 1))

    def write(self) -> Path:
        """Write ``index.html`` and the pages after it, with at most 10,000 samples; return the first page's path.

        Raises
        ------
        OutputError
            A page cannot be written.
        ImportError
            A package is missing.
        """
        for package in ("jinja2", "matplotlib", "PIL"):
            require(package, "the gallery needs")
        pages = self._pages()
        with writing(self._folder):
            (self._folder / _FOLDER).mkdir(exist_ok=True)
            for number in range(len(pages), 0, -1):  # the first page last: it stands for a complete gallery
                page = self._page(number, len(pages), pages[number - 1])
                write_whole(self._path(number), page.encode(), "the gallery")
            for path in (self._folder / _FOLDER).glob("*.html"):  # of a longer gallery before
                if path.stem.isdecimal() and int(path.stem) > len(pages):
                    path.unlink()
        return self._path(1)

    def _pages(self) -> list[list[tuple[str, dict[str, Any]]]]:
        """Return the samples of each page, with the titles of their groups."""
        ordered = [
            (title, row)
            for group, title in GROUPS.items()
            for row in sorted(self._rows[group], key=lambda row: str(row.get("id")))
        ][:_MOST_SAMPLES]
        per_page = max(_LEAST_PER_PAGE, _PICTURES_PER_PAGE // (1 + 2 * len(self._settings["methods"])))
        return [ordered[start : start + per_page] for start in range(0, len(ordered), per_page)] or [[]]

    def _path(self, number: int) -> Path:
        return self._folder / (PAGE if number == 1 else f"{_FOLDER}/{number}.html")

    def _page(self, number: int, pages: int, rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
        def link(other: int) -> str:
            if other == 1:
                return PAGE if number == 1 else f"../{PAGE}"
            return f"{_FOLDER}/{other}.html" if number == 1 else f"{other}.html"

        return render_template(
            "gallery.html",
            settings=self._settings,
            network=SOLVERS[self._settings["solver"]],
            counts=[(title, self.counts[group]) for group, title in GROUPS.items() if self.counts[group]],
            total=self.counts.total(),
            shown=min(self.counts.total(), _MOST_SAMPLES),
            number=number,
            links=[link(other) for other in range(1, pages + 1)],
            samples=[(title, row, self._pictures(row)) for title, row in rows],
            version=library_version(),
        )

    def _pictures(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """Return the pictures of a sample with their captions: as the network sees it, and its maps."""
        photo = decode_thumbnail(_reported(row, "thumbnail"))
        pictures = [] if photo is None else [("photo", data_url(photo / 255, small=True))]
        if row["state"] != "finished" or not self._settings["methods"]:
            return pictures
        try:
            maps = self._results.maps(row["id"])
            for method in self._settings["methods"]:
                for network in ("dense", "trace"):
                    drawn = _drawn(maps[f"{network}.{method}"], photo)
                    pictures.append((f"{METHODS[method].title}, {network}", data_url(drawn, small=True)))
        except (UserError, KeyError) as error:
            row["error"] = f"its maps cannot be shown: {error}"
        return pictures


def _reported(row: dict[str, Any], name: str) -> Any:
    """Return an entry of a sample's report, whatever it is; None if it has none."""
    report = row.get("report")
    return report.get(name) if isinstance(report, dict) else None


def _class_names(row: dict[str, Any]) -> dict[str, str]:
    """Return the names of the classes that the dense network and the trace of a finished sample predict."""
    names = _reported(row, "class_names")
    names = names if isinstance(names, dict) else {}
    moments = ("before", "after") if row["state"] == "finished" else ()
    return {f"name_{moment}": str(names.get(moment, f"class {row[f'class_{moment}']}")) for moment in moments}


def _kept(row: dict[str, Any]) -> str | None:
    """Return of what automatic sparsity kept a share: the name of a class, or of another target."""
    for moment in ("before", "after"):
        if row.get("target") == f"class {row.get(f'class_{moment}')}":
            return str(row[f"name_{moment}"])
    return row.get("target")


def _drawn(found: Tensor, photo: np.ndarray | None) -> np.ndarray:
    """Draw a map ``[H, W]`` over the picture of its sample, or over black."""
    if photo is None:
        scale = min(1.0, SIDE / max(found.shape))
        photo = np.zeros((*(max(1, round(side * scale)) for side in found.shape), 3), np.uint8)
    small = F.interpolate(found.float()[None, None], photo.shape[:2], mode="area")[0, 0]
    return overlay(photo, small.numpy())
