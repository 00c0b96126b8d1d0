"""Tables of the records, as Markdown and JSON in ``studies/results``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from spade_fast.attribution.methods import METHODS
from spade_fast.attribution.metrics import bootstrap_interval
from studies.shared.measure import Study
from studies.shared.records import Records

RESULTS = Path(__file__).parents[1] / "results"
_FACTS = {
    "P(target)": "probability",
    "target predicted": "predicted",
    "goal kept": "kept",
    "weights removed": "sparsity",
    "layer error": "layer error",
}
_SECONDS = ("seconds of the ladder", "seconds of the search", "seconds of maps")


def interval(values: Sequence[float], sources: Sequence[str]) -> dict[str, float]:
    """Mean in percent, and the limits of its 95 % interval by bootstrap over the sources.

    NaN values (the energy of a map that is zero everywhere) do not count; where all are NaN, so are the three results.
    """
    if np.isnan(values).all():
        return dict.fromkeys(("mean", "low", "high"), math.nan)
    low, high = bootstrap_interval(values, sources)
    return {"mean": 100 * float(np.nanmean(values)), "low": 100 * low, "high": 100 * high}


def common_methods(study: Study) -> list[str]:
    """Return the methods that all rows have: those of the main column."""
    of_rows = [row.methods for row in study.rows.values()]
    return [method for method in of_rows[0] if all(method in methods for methods in of_rows)]


def summarise(study: Study, records: Records) -> dict[str, Any]:
    """Average the scores of each row over the cases."""
    rows = {name: _of_row(study, records, name) for name in study.rows}
    lines = [_difference(study, records, first, second) for first, second in study.pairs]
    return {
        "title": study.title,
        "network": study.network.name,
        "metric": study.metric,
        "images": len({case.sample for case in study.cases}),
        "questions": len(study.cases),
        "sources": len({case.source for case in study.cases}),
        "methods": common_methods(study),
        "rows": rows,
        "differences": lines,
    }


def _of_row(study: Study, records: Records, name: str) -> dict[str, Any]:
    found, sources = _found(study, records, name)
    row = study.rows[name]
    first = found[0]
    metrics = [key for key, value in first.items() if isinstance(value, dict)]
    mine = _means(found, study.metric, common_methods(study))
    dense, _ = _found(study, records, "dense")
    gain = np.subtract(mine, _means(dense, study.metric, common_methods(study)))
    summary: dict[str, Any] = {
        "title": row.title,
        "mean": interval(mine, sources),
        "gain over dense": interval(gain.tolist(), sources),
        "methods": {m: interval([one[study.metric][m] for one in found], sources) for m in row.methods},
        "other scores": {
            metric: interval(_means(found, metric, common_methods(study)), sources)
            for metric in metrics
            if metric != study.metric
        },
    }
    if len(row.methods) > len(common_methods(study)) and not row.plain:
        every = _means(found, study.metric, row.methods)
        gain = np.subtract(every, _means(dense, study.metric, row.methods))
        summary["mean of all methods"] = interval(every, sources)
        summary["gain over dense of all methods"] = interval(gain.tolist(), sources)
    for title, fact in _FACTS.items():
        if fact in first:
            summary[title] = 100 * fmean(one[fact] for one in found)
    for fact in ("limit", *_SECONDS):
        if fact in first:
            summary[fact] = float(np.median([one[fact] for one in found]))
    return summary


def _found(study: Study, records: Records, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    found = [records[study.key(name, case)] for case in study.cases]
    return found, [case.source for case in study.cases]


def _means(found: Sequence[Mapping[str, Any]], metric: str, methods: Iterable[str]) -> list[float]:
    """Average a score over methods, in each record; NaN does not count."""
    methods = list(methods)
    means = []
    for one in found:
        known = [one[metric][method] for method in methods if not math.isnan(one[metric][method])]
        means.append(fmean(known) if known else math.nan)
    return means


def _difference(study: Study, records: Records, first: str, second: str) -> dict[str, Any]:
    methods = common_methods(study)
    values = [_means(_found(study, records, name)[0], study.metric, methods) for name in (first, second)]
    _, sources = _found(study, records, first)
    return {
        "of": study.rows[first].title,
        "and": study.rows[second].title,
        "difference": interval(np.subtract(*values).tolist(), sources),
    }


def share_of_tuning(summary: Mapping[str, Any], automatic: str, tuned: str) -> float:
    """Return the gain of a row without labels as a share of the gain of a row tuned with masks, in percent."""
    gains = [summary["rows"][name]["gain over dense"]["mean"] for name in (automatic, tuned)]
    return 100 * gains[0] / gains[1]


def tables(summary: Mapping[str, Any]) -> list[str]:
    """Return the tables of a study: one line per row, then differences."""
    methods = [METHODS[method].title for method in summary["methods"]]
    sources = "mosaics" if summary["metric"] == "energy" else "photos"
    about = f"{summary['title']}. {summary['questions']} questions, {summary['images']} images, {summary['sources']} "
    about += f"{sources}; methods: {', '.join(methods)}; brackets: 95 % by bootstrap over {sources}."
    return [f"{about}\n\n{_row_table(summary)}", *([_difference_table(summary)] if summary["differences"] else [])]


def _row_table(summary: Mapping[str, Any]) -> str:
    rows = summary["rows"].values()
    others = list(next(iter(rows))["other scores"])
    every = list(dict.fromkeys(method for row in rows for method in row["methods"]))
    wide = any("mean of all methods" in row for row in rows)
    facts = [title for title in _FACTS if any(title in row for row in rows)]
    head = ["", f"mean of {len(summary['methods'])} [95 %]", "over dense"]
    head += [f"mean of {len(every)}", "over dense"] if wide else []
    head += [*others, *facts, "error limit", "seconds to make", "seconds a map", *(METHODS[m].title for m in every)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        cells = [row["title"], with_interval(row["mean"]), with_interval(row["gain over dense"], "+")]
        if wide:
            cells.append(with_interval(row["mean of all methods"]) if "mean of all methods" in row else "")
            cells.append(
                with_interval(row["gain over dense of all methods"], "+") if "mean of all methods" in row else ""
            )
        cells += [f"{row['other scores'][other]['mean']:.1f}" for other in others]
        cells += [f"{row[fact]:.0f} %" if fact in row else "" for fact in facts]
        cells.append(f"{row['limit']:.3f}" if "limit" in row else "")
        made = [row[name] for name in _SECONDS[:2] if name in row]
        cells.append(f"{sum(made):.1f}" if made else "")
        cells.append(f"{row[_SECONDS[2]]:.2f}" if _SECONDS[2] in row else "")
        cells += [f"{row['methods'][method]['mean']:.1f}" if method in row["methods"] else "" for method in every]
        lines.append(cells)
    return markdown(lines)


def _difference_table(summary: Mapping[str, Any]) -> str:
    lines = [["", "minus", "difference [95 %]"], ["---", "---", "---:"]]
    lines += [[one["of"], one["and"], with_interval(one["difference"], "+")] for one in summary["differences"]]
    return markdown(lines)


def with_interval(value: Mapping[str, float], sign: str = "") -> str:
    """Write a mean with its interval."""
    return f"{value['mean']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(name: str, title: str, parts: Sequence[str], content: Mapping[str, Any]) -> Path:
    """Write ``NAME.md`` and ``NAME.json`` into the results; return the path of the first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(f"# {title}\n\n" + "\n".join(parts), encoding="utf-8")
    rounded = json.loads(json.dumps(content), parse_float=_rounded, parse_constant=lambda name: None)
    (RESULTS / f"{name}.json").write_text(json.dumps(rounded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _rounded(text: str) -> float:
    return float(f"{float(text):.5g}")
