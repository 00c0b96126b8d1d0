"""Batches: throughput against samples per solve and workers, what the engines add to the work, and memory over time.

``measure`` writes ``batch.json``, ``report`` makes the tables of ``batch.md`` from that alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import THREADS, best, machine

from spade_fast.batch import Results, Summary, run
from spade_fast.batch.index import TIMED_STAGES
from spade_fast.inputs.networks import LoadedModel, load_model
from spade_fast.ops.memory import keep_freed_memory
from spade_fast.pruning.layers import find_layers

RESULTS = Path(__file__).parent / "results"
_NAME = "batch"
_ROUNDS = 3
_SMALL_SAMPLES = 1000
_SMALL = "batch:small_network"
_SPARSITY = {"exact": 0.8, "sparsegpt": 0.6}
_LEAST_COLUMNS = 100


@dataclass(frozen=True)
class Setup:
    """How a batch of photos is processed."""

    solver: str = "sparsegpt"
    engine: str = "local"
    workers: int = 1
    threads: int = 1
    together: int = 1
    samples: int = 8


SOLVES = [Setup(together=together) for together in (1, 2, 4, 8)]
EXACT = [Setup("exact", together=together, samples=4) for together in (1, 4)]
WORKERS = [
    Setup(threads=2, samples=16),
    Setup(threads=2, together=2, samples=16),
    Setup(samples=16),
    Setup(workers=2, samples=16),
    Setup(engine="ray", workers=2, samples=16),
]


def photos(count: int) -> list[Path]:
    """ImageNet photos of the package foolbox."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        raise ImportError("package 'foolbox' is missing: pip install 'spade_fast[demo]'")
    return sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))[:count]


def small_network() -> LoadedModel:
    """A network whose traces take milliseconds."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 4),
    )
    return LoadedModel("small", module, (0.5,) * 3, (0.25,) * 3, 20, 16)


class Noise:
    """Small images, each made when it is read."""

    def __len__(self) -> int:
        return _SMALL_SAMPLES

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (24, 30, 3), dtype=np.uint8))


def _measured(setup: Setup) -> dict[str, Any]:
    """Work through photos with the packaged network."""
    ended: list[float] = []
    layers = [layer.name for layer in find_layers(load_model("demo").module)[0] if layer.columns >= _LEAST_COLUMNS]
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "photos.csv"
        names = photos(setup.samples)
        listed.write_text("\n".join(["id,path", *(f"{path.name},{path}" for path in names)]))
        begin = time.time()
        summary = run(
            listed,
            Path(folder) / "out",
            sparsity=_SPARSITY[setup.solver],
            layers=layers,
            solver=setup.solver,
            threads=setup.threads,
            engine=setup.engine,
            workers=setup.workers,
            samples_per_solve=setup.together,
            progress=lambda _: ended.append(time.time()),
        )
        results = Results(Path(folder) / "out")
        reports = [found.report for found in results.stored()]
        made = results[names[0].name]
        write = best(lambda: made.save(Path(folder) / "again"), 5)
        files = [path for path in (Path(folder) / "out").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    assert summary.finished == setup.samples, summary.failed
    first = min(report["began"] for report in reports)
    stages = {name: statistics.mean(report["seconds"][name] for report in reports) for name in reports[0]["seconds"]}
    return {
        **asdict(setup),
        "start": first - begin,
        "seconds": ended[-1] - first,
        "stages": stages,
        "overhead": list(_overhead(reports)),
        "write": write,
        "bytes": size,
        "files": len(files),
    }


def _overhead(reports: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """From the start of one solve of a worker to its next: seconds outside all stages, and seconds in them."""
    for worker in {report["worker"] for report in reports}:
        own = sorted((report for report in reports if report["worker"] == worker), key=lambda report: report["began"])
        groups = []
        while own:
            count = own[0]["together"]
            groups.append(own[:count])
            own = own[count:]
        for group, following in pairwise(groups):
            work = sum(sum(report["seconds"].values()) for report in group)
            yield following[0]["began"] - group[0]["began"] - work, work


def _memory(engine: str) -> dict[str, Any]:
    """Resident memory of the driver and its two workers over many small samples."""
    seen: list[tuple[int, int, int]] = []
    workers: set[int] = set()

    def note(summary: Summary) -> None:
        done = summary.finished
        if done and done % 50 == 0:
            workers.update(_worker_processes(engine))
            seen.append((done, _resident("self"), sum(map(_resident, workers))))

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"model": _SMALL, "augmentations": 6, "sparsity": 0.5, "progress": note}
        run("batch:Noise", folder, **options, engine=engine, workers=2, samples_per_solve=1, pack=100)
        reports = [found.report for found in Results(folder).stored()]
    idle, work = zip(*_overhead(reports), strict=True)
    return {"engine": engine, "seen": seen, "overhead": statistics.median(idle), "work": statistics.median(work)}


def _worker_processes(engine: str) -> Iterator[int]:
    mark = b"ray::_Actor" if engine == "ray" else b"spawn_main"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes():
                yield int(path.parent.name)
        except OSError:  # it has ended
            pass


def _resident(process: int | str) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def measure() -> None:
    """Measure everything, in rounds, so that set-ups are compared at nearly the same time."""
    memory = [_memory(engine) for engine in ("local", "ray")]
    rows = []
    for _ in range(_ROUNDS):
        for setup in [*SOLVES, *WORKERS]:
            rows.append(_measured(setup))
            print(f"{setup}: {rows[-1]['seconds'] / setup.samples:.2f} s per sample")
    for setup in EXACT:
        rows.append(_measured(setup))
        print(f"{setup}: {rows[-1]['seconds'] / setup.samples:.2f} s per sample")
    saved = {"date": date.today().isoformat(), "machine": machine(), "rows": rows, "memory": memory}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{_NAME}.json").write_text(json.dumps(saved, indent=1) + "\n")


def report() -> None:
    """Write the tables."""
    saved = json.loads((RESULTS / f"{_NAME}.json").read_text())
    rows, facts = saved["rows"], saved["machine"]
    lines = [
        "# Batches",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['versions']['torch']}, {saved['date']}. Packaged "
        f"EfficientNet-Lite0, layers of at least {_LEAST_COLUMNS} weights per output, sparsity "
        f"{' and '.join(f'{share:g} ({solver})' for solver, share in _SPARSITY.items())}, 64 augmentations, ImageNet "
        "photos of foolbox; medians over rounds.",
        "",
        "## Throughput",
        "",
        "Start-up, until the first worker begins, is not counted. Ratios are taken within a round.",
        "",
        "| solver | engine | workers | threads each | samples per solve | s per sample | ratio to first | start, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in (SOLVES, WORKERS, EXACT):
        first = _runs(rows, group[0])
        for setup in group:
            found = _runs(rows, setup)
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(first, found, strict=True)]
            lines.append(
                f"| {setup.solver} | {setup.engine} | {setup.workers} | {setup.threads} | {setup.together} "
                f"| {statistics.median(row['seconds'] for row in found) / setup.samples:.2f} "
                f"| {statistics.median(ratios):.2f} | {statistics.median(row['start'] for row in found):.1f} |"
            )
    timed = [stage for stage in TIMED_STAGES if stage in rows[0]["stages"]]
    lines += [
        "",
        "## Seconds per sample by stage, on one thread",
        "",
        "| solver | " + " | ".join(timed) + " | sum |",
        "| --- |" + " --- |" * (len(timed) + 1),
    ]
    for setup in (SOLVES[0], EXACT[0]):
        found = [row["stages"] for row in _runs(rows, setup)]
        stages = [statistics.median(row[stage] for row in found) for stage in timed]
        lines.append(f"| {setup.solver} | " + " | ".join(f"{stage:.2f}" for stage in [*stages, sum(stages)]) + " |")
    lines += [
        "",
        "## What the engine adds",
        "",
        "Time from one sample of a worker to its next that no stage takes: claims, hashes, messages, and writing and "
        f"syncing {rows[0]['bytes'] / rows[0]['samples'] / 1e6:.1f} MB. Medians and quartiles.",
        "",
        "| engine, 2 workers | ms per sample | share of the work | writing alone, ms |",
        "| --- | --- | --- | --- |",
    ]
    for setup in [setup for setup in WORKERS if setup.workers == 2]:
        pairs = [pair for row in _runs(rows, setup) for pair in row["overhead"]]
        idle = statistics.quantiles([1e3 * idle for idle, _ in pairs])
        share = statistics.quantiles([100 * idle / work for idle, work in pairs])
        lines.append(
            f"| {setup.engine} | {idle[1]:.0f} ({idle[0]:.0f} to {idle[2]:.0f}) "
            f"| {share[1]:.1f} % ({share[0]:.1f} to {share[2]:.1f}) "
            f"| {1e3 * statistics.median(row['write'] for row in _runs(rows, setup)):.0f} |"
        )
    lines += [
        "",
        f"## {_SMALL_SAMPLES} small samples",
        "",
        "Two workers, a network of two layers, 100 samples per pack. Resident memory, MB.",
        "",
        "| engine | driver at 100 | at 1000 | workers at 100 | at 1000 | work, ms | engine adds, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in saved["memory"]:
        seen = {done: sizes for done, *sizes in found["seen"]}
        sizes = [seen[done][who] / 2**20 for who in (0, 1) for done in (100, _SMALL_SAMPLES)]
        lines.append(
            f"| {found['engine']} | "
            + " | ".join(f"{size:.0f}" for size in sizes)
            + f" | {1e3 * found['work']:.1f} | {1e3 * found['overhead']:.1f} |"
        )
    (RESULTS / f"{_NAME}.md").write_text("\n".join(lines) + "\n")


def _runs(rows: list[dict[str, Any]], setup: Setup) -> list[dict[str, Any]]:
    wanted = asdict(setup)
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["measure", "report"])
    torch.set_num_threads(THREADS)
    with keep_freed_memory():
        {"measure": measure, "report": report}[parser.parse_args().step]()


if __name__ == "__main__":
    main()
