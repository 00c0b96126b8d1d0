"""Tables of the records, as Markdown and JSON in ``studies/results``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from measure import WITH_SLOW, Experiment
from records import Records
from rows import EQUAL
from scoring import FAST, SLOW
from study import Setting

from spade_fast.attribution.methods import METHODS
from spade_fast.attribution.metrics import bootstrap_interval

RESULTS = Path(__file__).parents[1] / "results"
Interval = Mapping[str, float]


def interval(values: Sequence[float], sources: Sequence[str]) -> dict[str, float]:
    """Mean in percent, and the limits of its 95 % interval by bootstrap over the sources.

    NaN values (the energy of a map that is zero everywhere) do not count; where all are NaN, so are the three results.
    """
    if np.isnan(values).all():
        return dict.fromkeys(("mean", "low", "high"), math.nan)
    low, high = bootstrap_interval(values, sources)
    return {"mean": 100 * float(np.nanmean(values)), "low": 100 * low, "high": 100 * high}


def _mean(scores: Mapping[str, float], methods: Iterable[str]) -> float:
    known = [scores[method] for method in methods if not math.isnan(scores[method])]
    return fmean(known) if known else math.nan


def summarise(experiment: Experiment, records: Records, metric: str) -> dict[str, Any]:
    """Average a metric over the cases, for each row."""
    names = [case.name for case in experiment.cases]
    return {row: _of_row(row, names, experiment, records, metric) for row in experiment.rows}


def _of_row(row: str, names: Sequence[str], experiment: Experiment, records: Records, metric: str) -> dict[str, Any]:
    found = [records[row, name] for name in names]
    sources = [one["source"] for one in found]
    values = {method: [one[metric][method] for one in found] for method in FAST}
    dense = [records["dense", name] for name in names]
    fast = [_mean(one[metric], FAST) for one in found]
    gain = [value - _mean(one[metric], FAST) for value, one in zip(fast, dense, strict=True)]
    summary: dict[str, Any] = {
        "title": experiment.rows[row].title,
        "cases": len(found),
        "methods": {method: interval(of_method, sources) for method, of_method in values.items()},
        "mean": interval(fast, sources),
        "gain over dense": interval(gain, sources),
        "probability": interval([one["probability"] for one in found], sources),
        "predicted": 100 * float(np.mean([one["predicted"] for one in found])),
        "seconds to solve": float(np.median([one["solve"] for one in found])),
    }
    gain_there = [value for value, one in zip(gain, found, strict=True) if one["predicted"]]
    if gain_there:
        kept = [source for source, one in zip(sources, found, strict=True) if one["predicted"]]
        summary["gain over dense where predicted"] = interval(gain_there, kept)
    if row in WITH_SLOW and experiment.slow:
        some = [records[row, name] for name in names if name in experiment.slow]
        sources = [one["source"] for one in some]
        for method in SLOW:
            summary["methods"][method] = interval([one[metric][method] for one in some], sources)
        everything = [_mean(one[metric], METHODS) for one in some]
        summary["mean of all methods"] = {**interval(everything, sources), "cases": len(some)}
    return summary


def differences(experiment: Experiment, records: Records, metric: str) -> list[dict[str, Any]]:
    """Compare pairs of rows case by case: each trace with the dense network, the other solver and its controls."""
    pairs = []
    for own, solver, label in (("fast", "exact", "tuned"), ("fast-equal", "exact-equal", f"{EQUAL:.0%}")):
        if own in experiment.rows:
            controls = [row for row in experiment.rows if row.startswith(f"{label}: ")]
            pairs += [(own, "dense"), (solver, "dense"), (solver, own), *((own, control) for control in controls)]
    lines = []
    for first, second in pairs:
        found = [[records[row, case.name] for case in experiment.cases] for row in (first, second)]
        values = [[_mean(one[metric], FAST) for one in of_row] for of_row in found]
        lines.append(
            {
                "of": experiment.rows[first].title,
                "and": experiment.rows[second].title,
                "difference": interval(np.subtract(*values), [one["source"] for one in found[0]]),
            }
        )
    return lines


def differences_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one line per pair."""
    rows = [["", "minus", "difference [95 %]"], ["---", "---", "---:"]]
    rows += [[line["of"], line["and"], _with_interval(line["difference"], sign="+")] for line in lines]
    return _markdown(rows)


def table(summary: Mapping[str, Any], unit: str) -> str:
    """Return a table with one line per network and one column per method."""
    slow = any(method in of_row["methods"] for of_row in summary.values() for method in SLOW)
    methods = [*FAST, *(SLOW if slow else ())]
    head = ["network", f"mean of {len(FAST)} [95 %]", "gain over dense", "P(target)", "target predicted", "seconds"]
    head += [METHODS[method].title for method in methods]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for of_row in summary.values():
        cells = [of_row["title"], _with_interval(of_row["mean"]), _with_interval(of_row["gain over dense"], sign="+")]
        cells += [f"{of_row['probability']['mean']:.0f} %", f"{of_row['predicted']:.0f} %"]
        cells.append(f"{of_row['seconds to solve']:.1f}")
        cells += [
            f"{of_row['methods'][method]['mean']:.1f}" if method in of_row["methods"] else "" for method in methods
        ]
        lines.append(cells)
    return f"{unit}\n\n{_markdown(lines)}"


def _with_interval(value: Interval, sign: str = "") -> str:
    return f"{value['mean']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def study_summary(settings: Sequence[Setting], cases: Sequence[str], records: Records) -> list[dict[str, Any]]:
    """Average the scores of each setting of the study over the named cases."""
    lines = []
    for setting in settings:
        found = [records[setting.key, name] for name in cases]
        sources = [one["source"] for one in found]
        auc = [np.mean(list(one["auc"].values())) for one in found]
        dense = [np.mean(list(records["dense", name]["auc"].values())) for name in cases]
        lines.append(
            {
                "question": setting.question,
                "answer": setting.answer,
                "cases": len(cases),
                "dense": 100 * float(np.mean(dense)),
                "auc": interval(auc, sources),
                "gain over dense": interval(np.subtract(auc, dense), sources),
                "probability": 100 * float(np.mean([one["probability"] for one in found])),
                "predicted": 100 * float(np.mean([one["predicted"] for one in found])),
                "layer error": 100 * float(np.mean([one["error"] for one in found])),
                "seconds to solve": float(np.median([one["solve"] for one in found])),
            }
        )
    return lines


def study_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one line per setting."""
    head = ["setting", "", "AUC [95 %]", "gain over dense", "P(target)", "target predicted", "layer error", "seconds"]
    rows = [head, ["---", "---"] + ["---:"] * 6]
    for number, line in enumerate(lines):
        new = number == 0 or lines[number - 1]["question"] != line["question"]
        rows.append(
            [
                line["question"] if new else "",
                line["answer"],
                _with_interval(line["auc"]),
                _with_interval(line["gain over dense"], sign="+"),
                f"{line['probability']:.0f} %",
                f"{line['predicted']:.0f} %",
                f"{line['layer error']:.0f} %",
                f"{line['seconds to solve']:.1f}",
            ]
        )
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rounded(text: str) -> float:
    return float(f"{float(text):.5g}")


def write(name: str, title: str, tables: Sequence[str], content: Mapping[str, Any]) -> None:
    """Write ``NAME.md`` and ``NAME.json`` into the results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n" + "\n".join(tables), encoding="utf-8")
    rounded = json.loads(json.dumps(content), parse_float=_rounded, parse_constant=lambda name: None)
    (RESULTS / f"{name}.json").write_text(json.dumps(rounded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
