"""The plot of an automatic sparsity: the probability that traces keep against the error limit of their layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 400, 240  # the viewBox in templates/error_limits.html
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 332, 14, 196  # of the plot's area; labels of the lines stand right of it
_LABEL_STEP = 13


@dataclass(frozen=True)
class Mark:
    """A place on an axis or in the plot, in the units of the picture, and what is written there."""

    at: float
    text: str
    label: float = 0.0


@dataclass(frozen=True)
class Point:
    """A trial in the plot, in the units of the picture."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class ErrorLimits:
    """What is drawn: the area, the ticks, a line per share to be kept and for the dense network, and the trials.

    Attributes
    ----------
    area
        Left, right, top and bottom.
    columns, rows
        Ticks of the error limit and of the probability.
    lines
        The dense network's probability, and the shares of it that were to be kept, from the top.
    trials, chosen
        All trials by ascending limit, and that of each trace.
    """

    area: tuple[int, int, int, int]
    columns: Sequence[Mark]
    rows: Sequence[Mark]
    lines: Sequence[Mark]
    trials: Sequence[Point]
    chosen: Sequence[Point]


def plot_limits(found: Sequence[Mapping[str, Any]]) -> ErrorLimits:
    """Lay out the plot for the traces of one calibration, given by the ``auto`` entries of the report."""
    trials = sorted({(error, score, share) for one in found for error, score, share in one["curve"]})
    low, high = map(math.log10, _ends([error for error, *_ in trials]))
    dense = found[0]["dense"]
    top = 1.05 * max([dense, *(score for _, score, _ in trials)])

    def across(error: float) -> float:
        return round(_LEFT + (math.log10(error) - low) / (high - low) * (_RIGHT - _LEFT), 1)

    def down(score: float) -> float:
        return round(_BOTTOM - score / top * (_BOTTOM - _TOP), 1)

    def point(error: float, score: float, share: float) -> Point:
        return Point(across(error), down(score), f"λ {error:.3g}: {score:.1%}, {share:.0%} removed")

    asked = {f"{100 * one['keep']:g}% of it": one["keep"] * dense for one in found}
    lines = sorted({"dense": dense, **asked}.items(), key=lambda line: -line[1])
    chosen = {one["error"]: one for one in found}
    shares = {error: share for error, _, share in trials}
    return ErrorLimits(
        (_LEFT, _RIGHT, _TOP, _BOTTOM),
        [Mark(across(error), f"{error:g}") for error in _decades(low, high)],
        [Mark(down(score), f"{score:.{digits}%}") for score, digits in _steps(top)],
        _spread([Mark(down(score), text) for text, score in lines]),
        [point(*trial) for trial in trials],
        [point(error, one["score"], shares[error]) for error, one in sorted(chosen.items())],
    )


def _ends(errors: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: those of the trials, or a decade around a single one."""
    low, high = min(errors), max(errors)
    return (low, high) if high > 1.5 * low else (low / 3, high * 3)


def _decades(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis, more of each decade the fewer there are."""
    width = high - low
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if width < 1 else (1.0, 2.0, 5.0) if width < 2.5 else (1.0,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = [float(f"{step}e{power}") for power in powers for step in steps]
    return [error for error in every if low - 1e-9 <= math.log10(error) <= high + 1e-9]


def _steps(top: float) -> list[tuple[float, int]]:
    """Return four to eight ticks from 0 to `top`, and the decimals of their percentages."""
    power = math.floor(math.log10(top / 4))
    step = next(size for size in (5, 2, 1) if top / (size * 10.0**power) >= 4) * 10.0**power
    digits = max(0, -math.floor(math.log10(step) + 1e-9) - 2)
    return [(count * step, digits) for count in range(math.floor(top / step) + 1)]


def _spread(lines: Sequence[Mark]) -> list[Mark]:
    """Place the labels of lines, given from the top, at least a line of text apart."""
    placed: list[Mark] = []
    for line in lines:
        lowest = placed[-1].label + _LABEL_STEP if placed else -math.inf
        placed.append(Mark(line.at, line.text, max(line.at, lowest)))
    return placed
