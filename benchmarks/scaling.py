"""Scaling curves: time of the ops against columns, rows, samples, images and threads, each beside its floor.

``measure`` writes ``scaling.json``; ``plot`` draws the curves from that file alone, one PNG per axis.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from device import DEVICE, ON_CUDA, prepare, results_folder, to_device
from measuring import THREADS, best, machine, matmul_rate
from shapes import Convolution, Weights, inverse

from spade_fast import ops

_FILE = "scaling.json"
_ROUNDS = 5
Call = tuple[Callable[[], object], float]


@dataclass(frozen=True)
class Curve:
    """Time of an op over the values of one axis."""

    op: str
    axis: str
    values: list[int]
    seconds: list[float]
    floor: list[float]


def _path(shape: Weights) -> Call:
    weight, hessian = shape.random_problem()
    weight, hinv = to_device(weight, inverse(hessian))
    return lambda: ops.obs_path(weight, hinv, shape.block), shape.path_work()


def _factor(columns: int) -> Call:
    _, hessian = to_device(*Weights(1, columns).random_problem())
    return lambda: ops.inverse_cholesky(hessian), 2 * columns**3 / 3


def _sweep(shape: Weights) -> Call:
    weight, hessian = to_device(*shape.random_problem())
    factor, _ = ops.inverse_cholesky(hessian)
    counts = torch.full((shape.problems, shape.columns), shape.rows // 2, device=DEVICE)
    work = shape.problems * shape.rows * shape.columns**2
    return lambda: ops.sparsegpt(weight, factor, counts, 1), work


def _gram(shape: Convolution) -> Call:
    (x,) = to_device(shape.random_input())
    gram = torch.zeros(1, 1, shape.columns, shape.columns, device=DEVICE)
    geometry = [(n, n) for n in (shape.kernel, shape.stride, shape.padding)]
    return lambda: ops.gram_conv2d_(gram, x, *geometry), shape.gram_work()


def _curve(op: str, axis: str, values: Sequence[int], make: Callable[[int], Call]) -> Curve:
    curve = Curve(op, axis, list(values), [], [])
    for value in values:
        if axis == "threads":
            torch.set_num_threads(value)
        call, work = make(value)
        call()
        rates, seconds = [], []
        for _ in range(_ROUNDS):
            rates.append(matmul_rate(1))
            seconds.append(best(call, 3))  # the first after a product finds cold caches
        curve.seconds.append(statistics.median(seconds))
        curve.floor.append(work / statistics.median(rates))
        print(f"{op}, {axis} {value}: {curve.seconds[-1]:.4g} s, floor {curve.floor[-1]:.4g} s")
    torch.set_num_threads(THREADS)
    return curve


def _curves(largest: int) -> Iterator[Curve]:
    columns = [c for c in (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4608) if c <= largest]
    rows = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    typical = min(1024, largest)
    yield _curve("obs_path, 32 rows", "columns", [c for c in columns if c <= 2304], lambda c: _path(Weights(32, c)))
    yield _curve("inverse_cholesky", "columns", columns, _factor)
    yield _curve("sparsegpt, 512 rows", "columns", columns, lambda c: _sweep(Weights(512, c)))
    yield _curve(f"obs_path, {typical} columns", "rows", rows[:8], lambda r: _path(Weights(r, typical)))
    yield _curve(f"sparsegpt, {typical} columns", "rows", rows, lambda r: _sweep(Weights(r, typical)))
    samples = (1, 2, 4, 8, 16)
    yield _curve(
        f"sparsegpt, 512x{typical // 2}", "samples", samples, lambda s: _sweep(Weights(512, typical // 2, problems=s))
    )
    images = (1, 4, 16, 64, 256)
    yield _curve("gram_conv2d_, 3x3, 128 at 28x28", "images", images, lambda n: _gram(Convolution(128, 28, images=n)))
    if ON_CUDA:
        return
    threads = tuple(range(1, THREADS + 1))
    yield _curve(f"obs_path, 32x{typical}", "threads", threads, lambda _: _path(Weights(32, typical)))
    yield _curve(f"inverse_cholesky, {typical}", "threads", threads, lambda _: _factor(typical))
    yield _curve(f"sparsegpt, 512x{typical}", "threads", threads, lambda _: _sweep(Weights(512, typical)))
    yield _curve("gram_conv2d_, 3x3, 128 at 28x28", "threads", threads, lambda _: _gram(Convolution(128, 28)))


def measure(folder: Path, largest: int) -> None:
    """Measure all curves, up to some number of columns."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    curves = [asdict(curve) for curve in _curves(largest)]
    saved = {"date": date.today().isoformat(), "machine": machine(), "curves": curves}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(saved, indent=1) + "\n")


def plot(folder: Path) -> None:
    """Draw one PNG per axis: time as solid lines, floor as dashed ones."""
    from matplotlib.figure import Figure

    saved: dict[str, Any] = json.loads((folder / _FILE).read_text())
    curves = [Curve(**curve) for curve in saved["curves"]]
    facts = saved["machine"]
    for axis in dict.fromkeys(curve.axis for curve in curves):
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        for index, curve in enumerate(curve for curve in curves if curve.axis == axis):
            axes.plot(curve.values, curve.seconds, "o-", color=f"C{index}", label=curve.op)
            axes.plot(curve.values, curve.floor, "--", color=f"C{index}", linewidth=1)
        axes.plot([], [], "k--", linewidth=1, label="floor: counted work at matmul rate")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        values = sorted({value for curve in curves if curve.axis == axis for value in curve.values})
        axes.set_xticks(values, map(str, values), rotation=45 if len(values) > 6 else 0)
        axes.minorticks_off()
        axes.set(xlabel=axis, ylabel="seconds", title=f"Time against {axis}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        where = f"{facts['cpu']}, {facts['threads']} threads unless said, {facts['instruction_set']}"
        where = facts["gpu"]["name"] if "gpu" in facts else where
        figure.supxlabel(f"{where}, {saved['date']}", fontsize="x-small")
        figure.savefig(folder / f"scaling_{axis}.png", dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    try:
        prepare()
    except ValueError as error:
        parser.error(str(error))
    parser.add_argument("step", choices=["measure", "plot"])
    parser.add_argument("--folder", type=Path, default=results_folder())
    parser.add_argument("--largest", type=int, default=4608, help="columns at which the curves end")
    args = parser.parse_args()
    if args.step == "measure":
        measure(args.folder, args.largest)
    else:
        plot(args.folder)


if __name__ == "__main__":
    main()
