"""Tables that compare rows: means of paired values with their intervals, and differences between rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

from spade_fast.attribution.metrics import bootstrap_interval
from studies.shared.report import markdown, with_interval

T = TypeVar("T")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # by group of columns and column: one number per question
LEAST_SOURCES = 8  # with fewer, a mean has no interval
_NORMAL = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Comparison:
    """What several rows scored on the same questions.

    Attributes
    ----------
    title
        What is compared.
    rows, values
        The title of each row; its values between 0 and 1. Each group of columns becomes a table.
    sources
        What is independent in each row, one per question: the traced images, or the questions.
    unpainted
        Of rows with pictures: whether nothing could be painted, one per question.
    unit
        The word for questions.
    pairs
        Names of rows whose difference is reported.
    """

    title: str
    rows: Mapping[str, str]
    values: Mapping[str, Values]
    sources: Mapping[str, Sequence[str]]
    unpainted: Mapping[str, Sequence[bool]]
    unit: str
    pairs: Sequence[tuple[str, str]]

    def only(self, title: str, chosen: Sequence[bool]) -> Comparison:
        """Return the comparison on some of the questions."""
        values = {
            row: {
                group: {name: _chosen(column, chosen) for name, column in columns.items()}
                for group, columns in groups.items()
            }
            for row, groups in self.values.items()
        }
        sources = {row: _chosen(of_row, chosen) for row, of_row in self.sources.items()}
        unpainted = {row: _chosen(of_row, chosen) for row, of_row in self.unpainted.items()}
        return replace(self, title=title, values=values, sources=sources, unpainted=unpainted)

    def summary(self) -> dict[str, Any]:
        """Average the values, and the differences of pairs."""
        return {
            "title": self.title,
            "unit": self.unit,
            "questions": len(next(iter(self.sources.values()))),
            "rows": [self._row(row) for row in self.rows],
            "differences": [self._difference(one, other) for one, other in self.pairs],
        }

    def _row(self, row: str) -> dict[str, Any]:
        sources, unpainted = self.sources[row], self.unpainted.get(row)
        return {
            "title": self.rows[row],
            "sources": len(set(sources)),
            "nothing painted": None if unpainted is None else 100 * float(np.mean(unpainted)),
            **{
                group: {name: mean_and_limits(column, sources) for name, column in columns.items()}
                for group, columns in self.values[row].items()
            },
        }

    def _difference(self, one: str, other: str) -> dict[str, Any]:
        """Compare two rows. What is independent in both is what is independent in the row with fewer sources."""
        sources = min(self.sources[one], self.sources[other], key=lambda of_row: len(set(of_row)))
        return {
            "title": f"{self.rows[one]}, over {self.rows[other]}",
            "sources": len(set(sources)),
            "nothing painted": None,
            **{
                group: {
                    name: mean_and_limits(column, sources, self.values[other][group][name])
                    for name, column in columns.items()
                }
                for group, columns in self.values[one].items()
            },
        }


def _chosen(column: Sequence[T], chosen: Sequence[bool]) -> list[T]:
    return [value for value, wanted in zip(column, chosen, strict=True) if wanted]


def mean_and_limits(
    values: Sequence[float], sources: Sequence[str], minus: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the mean of values, or of paired differences, in percent, and the limits of its 95 % interval.

    Shares, of values 0 and 1 (or 1/2, a guess), have the interval of Wilson (JASA 1927), their differences that of
    Agresti and Min (Statistics in Medicine 2005), which do not vanish when all questions have the same answer. Both
    count as many observations as there are sources, so that answers of the same source need not be independent. Other
    values have a bootstrap over the sources. With fewer than `LEAST_SOURCES` sources the limits are NaN. Values that
    are NaN do not count; where all are, so is the mean.
    """
    columns = np.array([values] if minus is None else [values, minus])
    found = columns[0] if minus is None else columns[0] - columns[1]
    known = ~np.isnan(found)
    number = len({source for source, counts in zip(sources, known, strict=True) if counts})
    mean = float(found[known].mean()) if number else math.nan
    if number < LEAST_SOURCES:
        low = high = math.nan
    elif not _are_shares(columns[:, known]):
        low, high = bootstrap_interval(found, sources)
    elif minus is None:
        low, high = _wilson(mean, number)
    else:
        low, high = _agresti_min(mean, float(np.square(found[known]).mean()), number)
    return {"mean": 100 * mean, "low": 100 * low, "high": 100 * high}


def _are_shares(columns: np.ndarray) -> bool:
    return bool(np.isin(columns, (0, 0.5, 1)).all() and np.isin(columns, (0, 1)).any())


def _wilson(share: float, number: int) -> tuple[float, float]:
    weight = _NORMAL**2 / number
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return max(centre - half, 0), min(centre + half, 1)


def _agresti_min(mean: float, square: float, number: int) -> tuple[float, float]:
    """Return the interval of a mean difference after half a pair is added to each of the four kinds of pairs."""
    centre = mean * number / (number + 2)
    variance = (square * number + 1) / (number + 2) - centre**2
    half = _NORMAL * math.sqrt(variance / (number + 2))
    return max(centre - half, -1), min(centre + half, 1)


def fact_columns(facts: Sequence[Mapping[str, Any] | None]) -> dict[str, list[float]]:
    """Return what is known of the networks that pictures show; NaN where nothing is."""
    names = {"weights removed": "sparsity", "probability in the photo": "probability"}
    return {title: [(one or {}).get(name, math.nan) for one in facts] for title, name in names.items()}


def comparison_tables(summary: Mapping[str, Any]) -> list[str]:
    """Return a heading and a table for each group of columns: the rows, then the differences."""
    about = f"## {summary['title']}\n\n{summary['questions']} {summary['unit']}. n: independent images or "
    about += f"{summary['unit']}; brackets: 95 % intervals, from n = {LEAST_SOURCES}.\n"
    first = summary["rows"][0]
    groups = [name for name, columns in first.items() if isinstance(columns, dict)]
    return [about, *(_table(summary, group, list(first[group])) for group in groups)]


def _table(summary: Mapping[str, Any], group: str, columns: Sequence[str]) -> str:
    lines = [[group, "n", *columns, "nothing painted"], ["---"] + ["---:"] * (len(columns) + 2)]
    for kind, sign in (("rows", ""), ("differences", "+")):
        for row in summary[kind]:
            unpainted = row["nothing painted"]
            cells = [_cell(row[group][column], sign) for column in columns]
            lines.append([row["title"], str(row["sources"]), *cells, "" if unpainted is None else f"{unpainted:.0f} %"])
    return markdown(lines)


def _cell(value: Mapping[str, float], sign: str) -> str:
    if math.isnan(value["mean"]):
        return ""
    return f"{value['mean']:{sign}.1f}" if math.isnan(value["low"]) else with_interval(value, sign)
