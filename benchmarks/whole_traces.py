"""Whole traces: time and memory.

FastSPADE beside the published pipeline and beside the network's fastest forward pass, and ``exact`` SPADE of ResNet-50,
which takes minutes. ``measure`` writes ``whole_traces.json``, ``report`` makes the tables of ``whole_traces.md`` from
that alone. Every round of FastSPADE runs each of them once, so that a busy machine slows all of them alike; tables have
medians.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import published
import textbook
import torch
from measuring import THREADS, extra_bytes, machine
from torch import Tensor, nn

import spade_fast
from spade_fast.inputs.networks import load_model

RESULTS = Path(__file__).parent / "results"
NETWORKS = {
    "ResNet-50": "torchvision:resnet50:none",
    "EfficientNet-Lite0": "demo",
    "ViT-B/16": "torchvision:vit_b_16:none",
}
# What the whole trace should be faster by than the published pipeline, in float32 and in bfloat16.
GOALS: dict[str, dict[str, float]] = {
    "ResNet-50": {"float32": 7, "bf16": 12},
    "EfficientNet-Lite0": {"float32": 4},
    "ViT-B/16": {"float32": 3, "bf16": 6},
}
_CALIBRATION_GOAL = 1.5
_EXACT, _EXACT_NETWORK = "exact", "ResNet-50"
_EXACT_GOAL = 210  # seconds
_IMAGES, _BATCH, _PUBLISHED_BATCH = 64, 8, 64
_SPARSITY, _DAMPING = 0.9, 0.01
_ROUNDS = 3
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)
_PRECISIONS = ("float32", "bf16")


def layers_of(model: nn.Module) -> list[str]:
    """All layers but the first that the published hooks see: ungrouped convolutions, and linear modules."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ][1:]
    return [name for name in names if getattr(model.get_submodule(name), "groups", 1) == 1]


def ours(
    model: nn.Module, images: Tensor, layers: list[str], precision: str = "float32", solver: str = "sparsegpt"
) -> dict[str, float]:
    """Trace the network; return the seconds of each stage."""
    options: Any = {"sparsity": _SPARSITY, "solver": solver, "layers": layers, "precision": precision}
    return dict(spade_fast.trace(model, images.split(_BATCH), **options).header["seconds"])


def theirs(model: nn.Module, images: Tensor, layers: list[str]) -> dict[str, float]:
    """Prune the network by the published pipeline, and put its weights back."""
    before = {name: model.get_submodule(name).weight.data for name in layers}
    kind = published.classes().SparseGPTSuperFast if published.is_given() else None

    def prune(solver: Any, sparsity: float, block: int) -> None:
        solver.fasterprune(sparsity, [solver.layer], blocksize=block, percdamp=_DAMPING)

    try:
        if kind is None:
            solver = textbook.SparseGPT, lambda one, sparsity, block: one.fasterprune(sparsity, block)
            _, inner = textbook.prune_by_hooks(model, images, _PUBLISHED_BATCH, layers, _SPARSITY, *solver)
        else:
            with published.running():
                solvers = (lambda layer: kind(layer, 1)), prune
                _, inner = textbook.prune_by_hooks(model, images, _PUBLISHED_BATCH, layers, _SPARSITY, *solvers)
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data = weight
    return {"gram and solve": inner}


def fastest_forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Return the forward pass over all images as a frozen graph with packed weights, in channels-last memory."""
    given = images.contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, given[:_BATCH])))

    def run() -> None:
        with torch.no_grad():
            for part in given.split(_BATCH):
                graph(part)

    return run


def timed(function: Callable[[], Any]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    stages = function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "idle": 1 - cpu / (wall * THREADS), "stages": stages or {}}


def prepared(name: str) -> tuple[nn.Module, list[str], Tensor]:
    """Return a network, its layers and calibration images."""
    model = load_model(NETWORKS[name]).module
    return model, layers_of(model), torch.randn(_IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def measure_network(name: str) -> dict[str, Any]:
    model, layers, images = prepared(name)
    forward = fastest_forward(model, images)
    forward()
    runs: dict[str, Callable[[], Any]] = {"forward": forward}
    for precision in _PRECISIONS:
        runs[precision] = functools.partial(ours, model, images, layers, precision)
    runs["published" if published.is_given() else "textbook"] = functools.partial(theirs, model, images, layers)
    rounds = [{label: timed(run) for label, run in runs.items()} for _ in range(_ROUNDS)]
    weights = sum(one.nbytes for one in model.parameters())
    return {"layers": len(layers), "weights": weights, "rounds": rounds, "peak": extra_bytes(runs["float32"])}


def measure_exact() -> dict[str, Any]:
    """Trace once by exact OBS, and measure time and memory of that run."""
    model, layers, images = prepared(_EXACT_NETWORK)
    runs = []
    peak = extra_bytes(lambda: runs.append(timed(lambda: ours(model, images, layers, solver="exact"))))
    return {"layers": len(layers), "peak": peak, **runs[0]}


def keep_heap() -> None:
    """Let glibc keep freed memory, so that the published pipeline, too, does not wait for pages to be cleared."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def measure(names: list[str]) -> None:
    torch.set_num_threads(THREADS)
    keep_heap()
    file = RESULTS / "whole_traces.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"networks": {}}
    for name in names:
        if name == _EXACT:
            found["exact"] = {"date": str(date.today()), **measure_exact()}
            print(name, json.dumps(found["exact"]), flush=True)
        else:
            found["networks"][name] = {"date": str(date.today()), **measure_network(name)}
            print(name, json.dumps(found["networks"][name]["rounds"][-1]), flush=True)
        file.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")
    report()


def report() -> None:
    stored = json.loads((RESULTS / "whole_traces.json").read_text())
    facts = stored["machine"]
    head = ["network", "measured", "layers", "published", "float32", "ratio (goal)", "bf16", "ratio (goal)"]
    head += ["forward", "Gram", "solve", "calibration / fastest forward (goal)", "idle", "peak MB", "weights MB"]
    lines = [
        "# Whole traces",
        "",
        f"Made by `make bench-traces` with {THREADS} threads of {facts['cpu']}, "
        f"torch {facts['versions']['torch']}: FastSPADE",
        f"of {_IMAGES} images of 224 by 224 pixels at {_SPARSITY:.0%} sparsity, all layers but the first that the "
        "published hooks see. Seconds of the processor,",
        f"by stage those of the clock; medians of {_ROUNDS} interleaved rounds. Without the published code, the "
        "textbook's takes its place.",
        "",
        f"| {' | '.join(head)} |",
        f"| --- |{' ---: |' * (len(head) - 1)}",
    ]
    lines += [f"| {' | '.join([name, *_row(found, GOALS[name])])} |" for name, found in stored["networks"].items()]
    exact = stored.get("exact")
    if exact is not None:
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in exact["stages"].items() if seconds >= 1)
        lines += [
            "",
            f"Exact SPADE of {_EXACT_NETWORK}, one run on {exact['date']}, the same images, sparsity and "
            f"{exact['layers']} layers:",
            f"{exact['wall']:.0f} seconds of the clock (goal: {_EXACT_GOAL}), {exact['cpu']:.0f} of the processor "
            f"({stages}), {(exact['peak'] or 0) / 2**20:.0f} MB at the peak.",
        ]
    (RESULTS / "whole_traces.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


def _row(found: dict[str, Any], goals: dict[str, float]) -> list[str]:
    rounds = found["rounds"]
    median = statistics.median
    other = "published" if "published" in rounds[0] else "textbook"
    cells = [found["date"], str(found["layers"]), f"{median(one[other]['cpu'] for one in rounds):.1f}"]
    for precision in _PRECISIONS:
        ratio = median(one[other]["cpu"] / one[precision]["cpu"] for one in rounds)
        cells += [f"{median(one[precision]['cpu'] for one in rounds):.1f}", _with_goal(ratio, goals.get(precision))]
    stages = [one["float32"]["stages"] for one in rounds]
    cells += [f"{median(one[stage] for one in stages):.1f}" for stage in ("forward", "gram", "solve")]
    calibration = median(
        (stage["forward"] + stage["gram"]) / one["forward"]["wall"] for stage, one in zip(stages, rounds, strict=True)
    )
    idle = median(one["float32"]["idle"] for one in rounds)
    sizes = [f"{(size or 0) / 2**20:.0f}" for size in (found["peak"], found["weights"])]
    return [*cells, _with_goal(calibration, _CALIBRATION_GOAL), f"{idle:.0%}", *sizes]


def _with_goal(value: float, goal: float | None) -> str:
    return f"{value:.1f}" if goal is None else f"{value:.1f} ({goal:g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["measure", "report"])
    names = [*NETWORKS, _EXACT]
    parser.add_argument("networks", nargs="*", default=names, help=f"from {', '.join(names)}; default: all")
    given = parser.parse_args()
    if given.action == "measure":
        measure(given.networks)
    else:
        report()


if __name__ == "__main__":
    main()
