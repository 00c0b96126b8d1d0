"""Tables that compare rows: means of paired values with their intervals, and differences between rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from studies.shared.report import interval, markdown, with_interval

T = TypeVar("T")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # by group of columns and column: one number per question


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
        What is resampled for intervals, one per question.
    unit
        The word for that.
    pairs
        Names of rows whose difference is reported.
    """

    title: str
    rows: Mapping[str, str]
    values: Mapping[str, Values]
    sources: Sequence[str]
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
        return replace(self, title=title, values=values, sources=_chosen(self.sources, chosen))

    def summary(self) -> dict[str, Any]:
        """Average the values, and the differences of pairs."""
        return {
            "title": self.title,
            "unit": self.unit,
            "units": len(set(self.sources)),
            "rows": [{"title": self.rows[row], **self._means(self.values[row])} for row in self.rows],
            "differences": [
                {"title": f"{self.rows[one]}, over {self.rows[other]}", **self._means(self._difference(one, other))}
                for one, other in self.pairs
            ],
        }

    def _means(self, values: Values) -> dict[str, Any]:
        return {
            group: {column: interval(of_column, self.sources) for column, of_column in columns.items()}
            for group, columns in values.items()
        }

    def _difference(self, one: str, other: str) -> Values:
        first, second = self.values[one], self.values[other]
        return {
            group: {column: np.subtract(values, second[group][column]).tolist() for column, values in columns.items()}
            for group, columns in first.items()
        }


def _chosen(column: Sequence[T], chosen: Sequence[bool]) -> list[T]:
    return [value for value, wanted in zip(column, chosen, strict=True) if wanted]


def comparison_tables(summary: Mapping[str, Any]) -> list[str]:
    """Return a heading and a table for each group of columns: the rows, then the differences."""
    about = f"## {summary['title']}\n\n{summary['units']} {summary['unit']}; "
    about += f"brackets: 95 % by bootstrap over {summary['unit']}.\n"
    first = summary["rows"][0]
    groups = [name for name, columns in first.items() if isinstance(columns, dict)]
    return [about, *(_table(summary, group, list(first[group])) for group in groups)]


def _table(summary: Mapping[str, Any], group: str, columns: Sequence[str]) -> str:
    lines = [[group, *columns], ["---"] + ["---:"] * len(columns)]
    for kind, sign in (("rows", ""), ("differences", "+")):
        for row in summary[kind]:
            lines.append([row["title"], *(_cell(row[group][column], sign) for column in columns)])
    return markdown(lines)


def _cell(value: Mapping[str, float], sign: str) -> str:
    return "" if math.isnan(value["mean"]) else with_interval(value, sign)
