"""Figures of attribution maps over a photo, with the dense network and its traces side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import extra_for

_CELL, _GAP, _MARGIN, _ROW_LABEL, _HEAD, _LINE, _FOOT = 2.5, 0.12, 0.25, 0.42, 1.02, 0.17, 0.62  # inches
_LEAST_WIDTH = 6.0  # of a figure, for its title
_DPI = 160
_INK, _SOFT_INK, _ERROR_INK = "#1a1a1a", "#5c5c5c", "#b34a00"
# Perceptually uniform; readable with colour blindness and in greyscale print.
COLOURS = "inferno"
_PHOTO_LIGHT = 0.5
_TITLE_SIZE = 14.0  # points
_LETTERS_PER_INCH = 106.0  # of bold text of one point, on average
_AS_WRITTEN = {"parse_math": False, "usetex": False}  # names of classes and files may contain dollars


@dataclass(frozen=True)
class Column:
    """One column of a figure: attribution maps of a network, or means of those of several.

    Attributes
    ----------
    heading, captions
        Name of the network or networks, and short lines of text below it.
    maps
        One non-negative attribution map ``[H, W]`` per row of the figure; larger values are more important.
    warnings
        More lines of text, which the figure shows in another colour: that a trace lost the decision, for example.
    """

    heading: str
    captions: Sequence[str]
    maps: Sequence[np.ndarray]
    warnings: Sequence[str] = ()


def draw(
    path: Path, photo: np.ndarray, columns: Sequence[Column], rows: Sequence[str], title: str, subtitle: str = ""
) -> None:
    """Save a figure with the photo on the left and one row of overlays per method.

    Parameters
    ----------
    path
        PNG file to write.
    photo : ndarray ``[H, W, 3]``, uint8
    columns
        Networks from left to right, each with ``len(rows)`` maps of any size in the photo's aspect ratio.
    rows
        Names of the methods.
    title, subtitle
        First lines of the figure.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        A map is not finite or not two-dimensional.
    """
    heads = [Column("Photo", [], []), *columns]
    sheet = _Sheet(heads, len(rows), photo.shape[0] / photo.shape[1], _MARGIN + _ROW_LABEL, _FOOT, title, subtitle)
    for row, name in enumerate(rows):
        sheet.row_label(row, name)
        sheet.place(0, row).imshow(photo, interpolation="lanczos")
        for number, column in enumerate(columns):
            sheet.place(number + 1, row).imshow(overlay(photo, column.maps[row]), interpolation="bilinear")
    _legend(sheet.figure, sheet.left(1), sheet.width, sheet.height)
    sheet.figure.savefig(path, format="png")


def draw_pictures(
    path: Path,
    columns: Sequence[Column],
    rows: Mapping[str, Sequence[np.ndarray | None]],
    title: str,
    subtitle: str = "",
) -> None:
    """Save a figure with pictures ``[H, W, 3]``, uint8 and of one size, side by side.

    Parameters
    ----------
    path
        PNG file to write.
    columns
        Heads of the columns; their maps are unused.
    rows
        Name of each row, shown if there are several, and its pictures, one per column; None where there is none.
    title, subtitle
        First lines of the figure.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    several = len(rows) > 1
    height, width = next(one.shape[:2] for row in rows.values() for one in row if one is not None)
    margin = _MARGIN + several * _ROW_LABEL
    sheet = _Sheet(columns, len(rows), height / width, margin, _MARGIN, title, subtitle)
    for number, (name, pictures) in enumerate(rows.items()):
        if several:
            sheet.row_label(number, name)
        for column, picture in enumerate(pictures):
            axes = sheet.place(column, number)
            if picture is None:
                axes.text(0.5, 0.5, "no picture", color=_SOFT_INK, ha="center", va="center", **_AS_WRITTEN)
            else:
                axes.imshow(picture, interpolation="lanczos")
    sheet.figure.savefig(path, format="png")


class _Sheet:
    """A figure with a title and headed columns of cells; places are in inches from its upper left corner."""

    def __init__(
        self,
        columns: Sequence[Column],
        rows: int,
        cell_shape: float,
        margin: float,
        foot: float,
        title: str,
        subtitle: str,
    ) -> None:
        with extra_for("figures need"):
            from matplotlib.figure import Figure

        self._margin = margin
        self.cell_height = _CELL * cell_shape
        self.width = max(margin + _MARGIN + len(columns) * (_CELL + _GAP) - _GAP, _LEAST_WIDTH)
        self._head = _HEAD + _LINE * max(len(one.captions) + len(one.warnings) for one in columns)
        self.height = self.top(rows) - _GAP + foot
        self.figure = Figure(figsize=(self.width, self.height), dpi=_DPI, facecolor="white")
        size = _size(title, _TITLE_SIZE, self.width - margin - _MARGIN)
        self.text(margin, 0.38, title, fontsize=size, fontweight="bold")
        self.text(margin, 0.6, subtitle, fontsize=9, color=_SOFT_INK)
        for number, column in enumerate(columns):
            left = self.left(number)
            self.text(left, _HEAD - 0.1, column.heading, fontsize=_size(column.heading, 10.0, _CELL), fontweight="bold")
            lines = [(caption, _SOFT_INK) for caption in column.captions]
            lines += [(warning, _ERROR_INK) for warning in column.warnings]
            for line, (caption, colour) in enumerate(lines, 1):
                self.text(left, _HEAD - 0.1 + _LINE * line, caption, fontsize=8.5, color=colour)

    def text(self, x: float, y: float, content: str, **style: Any) -> None:
        content = content.encode("utf-8", "backslashreplace").decode()  # file names may have other bytes
        style = {"color": _INK, "va": "baseline", **_AS_WRITTEN, **style}
        self.figure.text(x / self.width, 1 - y / self.height, content, **style)

    def row_label(self, row: int, name: str) -> None:
        middle = self.top(row) + self.cell_height / 2
        style = {"rotation": 90, "ha": "center", "va": "center", "fontweight": "bold"}
        self.text(_MARGIN + 0.14, middle, name, fontsize=_size(name, 10.0, self.cell_height), **style)

    def left(self, column: int) -> float:
        return self._margin + column * (_CELL + _GAP)

    def top(self, row: int) -> float:
        return self._head + row * (self.cell_height + _GAP)

    def place(self, column: int, row: int) -> Any:
        bottom = self.height - self.top(row) - self.cell_height
        size = (_CELL / self.width, self.cell_height / self.height)
        axes = self.figure.add_axes((self.left(column) / self.width, bottom / self.height, *size))
        axes.set_axis_off()
        return axes


def _size(title: str, points: float, inches: float) -> float:
    """Return the font size of a bold title that has to fit a width: `points`, or less if it is long."""
    return min(points, inches * _LETTERS_PER_INCH / max(len(title), 1))


def overlay(photo: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """Draw an attribution map in colour over the photo in dark grey.

    Parameters
    ----------
    photo : ndarray ``[H, W, 3]``, uint8
    attribution : ndarray ``[h, w]``
        Resized to the photo. The colour scale ranges from 0 to the map's 99.5th percentile; negative values count as 0.

    Returns
    -------
    ndarray ``[H, W, 3]``
        Colours between 0 and 1.

    Raises
    ------
    ValueError
        The map is not finite or not two-dimensional.
    """
    with extra_for("pictures need"):
        from matplotlib import colormaps

    heat = normalise(attribution)
    if heat.shape != photo.shape[:2]:
        heat = _stretch(heat, photo.shape[:2])
    grey = photo.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    strength = np.clip(heat * 2.0, 0, 1)[..., None]
    return (1 - strength) * _PHOTO_LIGHT * grey[..., None] + strength * colormaps[COLOURS](heat)[..., :3]


def normalise(attribution: np.ndarray) -> np.ndarray:
    """Scale a map to 0-1 such that a few extreme pixels do not hide the rest.

    Raises
    ------
    ValueError
        The map is not finite or not two-dimensional.
    """
    if attribution.ndim != 2 or not np.isfinite(attribution).all():
        raise InvalidValueError(f"an attribution map must be finite and two-dimensional, got shape {attribution.shape}")
    top = np.percentile(attribution, 99.5)
    if top <= 0:
        top = attribution.max()
    return np.clip(attribution / top, 0, 1) if top > 0 else np.zeros_like(attribution, dtype=np.float64)


def _stretch(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    return F.interpolate(tensor[None, None], size, mode="bilinear", align_corners=False)[0, 0].numpy()


def _legend(figure: Any, left: float, width: float, height: float) -> None:
    axes = figure.add_axes((left / width, 0.34 / height, _CELL / width, 0.1 / height))
    axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=COLOURS)
    axes.set_yticks([])
    axes.set_xticks([0, 255], ["no evidence", "strongest evidence"], **_AS_WRITTEN)
    axes.tick_params(length=0, pad=2, labelsize=7.5, labelcolor=_SOFT_INK)
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[1].set_horizontalalignment("right")
    for spine in axes.spines.values():
        spine.set_visible(False)
