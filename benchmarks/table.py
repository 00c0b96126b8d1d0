"""The table of a run: one line per case, ours beside the textbook and the published code.

``python benchmarks/table.py out/benchmarks.json`` prints the table of a saved run (Markdown).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Case = tuple[str, str]

_OURS, _OTHERS = "spade_fast", ("textbook", "published")
_TITLES = (
    "op, layer",
    "time",
    "GFLOP/s",
    "of floor (goal)",
    "textbook",
    "ratio",
    "published",
    "ratio (goal)",
    "peak MB",
    "/ stated",
    "note",
)


def load(path: str | Path) -> dict[str, Any]:
    """Read the JSON of pytest-benchmark."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def rows_of(saved: dict[str, Any]) -> list[Row]:
    """Return what the benchmarks of a saved run reported."""
    return [{**b["extra_info"], "seconds": b["stats"]["median"]} for b in saved["benchmarks"]]


def by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """Return the rows of each case by implementation, in the order in which they ran."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["layer"]), {})[row["implementation"]] = row
    return cases


def ratios(rows: Sequence[Row]) -> dict[Case, dict[str, float]]:
    """Return, for each case, how many times faster ours is than each other implementation that ran.

    Where the implementations report the seconds of their Hessians and solver alone, the ratio of those is under the
    name with ``inner_`` in front.
    """
    result = {}
    for case, found in by_case(rows).items():
        result[case] = values = {}
        ours = found.get(_OURS)
        for name in _OTHERS if ours else ():
            if name in found:
                values[name] = found[name]["seconds"] / ours["seconds"]
                if "inner_seconds" in found[name]:
                    values[f"inner_{name}"] = found[name]["inner_seconds"] / ours["inner_seconds"]
    return result


def format_table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown, with aligned columns."""
    times = ratios(rows)
    lines: list[Sequence[str]] = [_TITLES]
    for case, found in by_case(rows).items():
        lines.append(_line(case, found, times[case]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:-1]), "-" * widths[-1]]
    lines.insert(1, rule)
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def _line(case: Case, found: dict[str, Row], times: dict[str, float]) -> Sequence[str]:
    ours = found.get(_OURS, {})
    textbook, published = (found.get(name, {}) for name in _OTHERS)
    goal = ours.get("note_goal")
    note = _with_goal(ours.get("note", ""), f"goal {goal}" if goal else "")
    notes = [note] if note else []
    for name in _OTHERS:
        if f"inner_{name}" in times:
            goal = ours.get("inner_goal") if name == "published" else None
            wanted = f" (goal {goal:g})" if goal else ""
            notes.append(f"Hessians and solver {times[f'inner_{name}']:.1f} times {name}{wanted}")
    peak, stated = ours.get("peak_mb"), ours.get("stated_mb")
    return (
        " ".join(case),
        _seconds(ours),
        _number(ours.get("gflops"), ".0f"),
        _with_goal(_number(ours.get("share"), ".0%"), _number(ours.get("share_goal"), ".0%")),
        _seconds(textbook),
        _number(times.get("textbook"), ".1f"),
        _seconds(published),
        _with_goal(_number(times.get("published"), ".1f"), _number(ours.get("ratio_goal"), "g")),
        _number(peak, ".1f"),
        _number(peak / stated if peak is not None and stated else None, ".2f"),
        "; ".join(notes),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_goal(value: str, goal: str) -> str:
    return f"{value} ({goal})".strip() if goal else value


def _seconds(row: Row) -> str:
    if not row:
        return ""
    value = row["seconds"]
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


if __name__ == "__main__":
    print(format_table(rows_of(load(sys.argv[1]))))
