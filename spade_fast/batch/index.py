"""The table of a batch, ``index.parquet``: one row per sample, made from the files of its folder alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from spade_fast._util.extras import extra_for, is_installed
from spade_fast._util.files import write_whole, writing
from spade_fast.batch.results import Results, read_report
from spade_fast.pruning.auto_sparsity import AutoSparsity
from spade_fast.pruning.decision import Decision

INDEX = "index.parquet"
TIMED_STAGES = ("load", "augment", "forward", "gram", "solve", "search", "explain")
COLUMNS = {
    "id": "string",
    "state": "string",  # finished, failed or damaged
    "file": "string",  # that contains the trace, relative to the folder: its own, or a zip file
    "error": "string",
    "sparsity": "double",  # of all pruned layers together
    "network_sparsity": "double",  # of the whole network
    "layers": "int32",  # that were pruned
    "error_limit": "double",  # of automatic sparsity, which is the largest relative output error of a layer
    "target": "string",  # what automatic sparsity keeps: the class or target that is explained
    "share_kept": "double",  # of the dense network's probability of it, or of another target's number
    "enough_kept": "bool",  # whether that is the share asked for
    "mean_error": "double",  # relative output errors of the pruned layers
    "largest_error": "double",
    "fallbacks": "int32",  # layers that were skipped, or damped more than requested
    "class_before": "int32",  # that the dense network predicts
    "probability_before": "double",
    "class_after": "int32",  # that the trace predicts
    "probability_after": "double",
    "probability_after_of_class_before": "double",
    "decision_kept": "bool",  # whether the trace predicts the class that the dense network predicts
    "traces": "int32",  # of which the maps are the mean
    "traces_lost": "int32",  # those that do not predict the class that the dense network predicts
    "warnings": "string",
    "worker": "string",  # machine and process
    "together": "int32",  # samples in its solve
    **{f"seconds_{stage}": "double" for stage in TIMED_STAGES},
}
_ROWS_PER_GROUP = 10_000


def can_index() -> bool:
    """Whether pyarrow is installed."""
    return is_installed("pyarrow")


def write_index(folder: str | Path) -> Counter[str]:
    """Write ``index.parquet`` into the folder of a batch, and count the samples by state.

    Raises
    ------
    ValueError
        `folder` is not that of a batch.
    OutputError
        The file cannot be written.
    ImportError
        pyarrow is missing.
    """
    folder = Path(folder)
    results = Results(folder)
    with extra_for("the index needs"):
        import pyarrow
        from pyarrow import parquet
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    states: Counter[str] = Counter()
    sink = pyarrow.BufferOutputStream()
    rows = index_rows(results, folder)
    with parquet.ParquetWriter(sink, schema) as writer:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            states.update(row["state"] for row in group)
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
    with writing(folder / INDEX):
        try:
            write_whole(folder / INDEX, sink.getvalue(), "the index")
        except FileNotFoundError:  # a run that began or ended removed the temporary file as a leftover
            write_whole(folder / INDEX, sink.getvalue(), "the index")
    return states


def index_rows(results: Results, folder: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of the index; those of finished samples also have the entry ``report``, of their report."""
    stems = set()
    for found in results.stored(whole=True):
        stems.add(found.stem)
        try:
            row = _checked({**_finished(found.header), **_report(found.report)})
            if found.report and found.report["id"] != row["id"]:
                raise ValueError("it has the report of another sample")
            row["report"] = found.report
        except (AttributeError, KeyError, TypeError, ValueError):  # not what was written
            row = {"state": "damaged"}
        yield {"file": found.file, **row}
    for path in sorted(folder.glob("errors/*.json")):
        if path.stem not in stems:
            error = read_report(path)
            if error:  # another run may be working on the sample at this moment
                yield {"state": "failed", "id": str(error.get("id")), "error": str(error.get("error"))}


def _finished(stored: Any) -> dict[str, Any]:
    header, reports = stored["header"], stored["reports"]
    errors = [report["measured_error"] for report in reports if report["removed"] > 0]
    decision = Decision.from_entries(header["decision"])
    return {
        "id": header["sample_id"],
        "state": "finished",
        "sparsity": header["sparsity"],
        "network_sparsity": header["network_sparsity"],
        "layers": len(stored["layers"]),
        "mean_error": sum(errors) / len(errors) if errors else None,
        "largest_error": max(errors, default=None),
        "fallbacks": sum(bool(report["note"]) or report["retries"] > 0 for report in reports),
        "target": header.get("target"),
        **_searched(header.get("auto")),
        **asdict(decision),
        "decision_kept": decision.kept,
        "traces": header.get("traces"),
        "traces_lost": header.get("traces_lost"),
    }


def _searched(entries: Any) -> dict[str, Any]:
    """Return what automatic sparsity found; nothing if the sparsity was given."""
    if entries is None:
        return {}
    auto = AutoSparsity.from_entries(entries)
    return {"error_limit": auto.error, "share_kept": auto.share, "enough_kept": auto.kept}


def _report(report: Any) -> dict[str, Any]:
    seconds, warnings = report.get("seconds", {}), report.get("warnings")
    return {
        **{f"seconds_{stage}": seconds.get(stage) for stage in TIMED_STAGES},
        **{name: report.get(name) for name in ("worker", "together")},
        "warnings": "; ".join(warnings) if warnings else None,
    }


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose values fit their columns, or raise ValueError."""
    for name, value in row.items():
        kind = COLUMNS[name]
        fits = {
            "string": isinstance(value, str),
            "bool": isinstance(value, bool),
            "int32": isinstance(value, int) and abs(value) < 2**31,
            "double": isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53),
        }
        if value is not None and not fits[kind]:
            raise ValueError(f"{name} cannot be {value!r}")
    return row
