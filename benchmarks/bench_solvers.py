"""The drop-in classes against the textbook solvers, in one process on two threads.

Run with ``pytest benchmarks/bench_solvers.py``; the ratio of the times is in the ``extra_info`` of each benchmark, and
``pytest --benchmark-json=FILE`` writes it to a file. The textbook solvers run once, which takes about two minutes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import textbook
import torch
from torch import Tensor, nn

from spade_fast.compat import SparseGPT, TrueOBS

Result = TypeVar("Result")
Compare = Callable[[Callable[[], object], float], None]


@pytest.fixture
def compare(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Times ours, and stores and prints how many times faster it is than the textbook."""

    def run(ours: Callable[[], object], textbook_seconds: float) -> None:
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
        seconds = benchmark.stats.stats.min
        ratio = textbook_seconds / seconds
        benchmark.extra_info.update(textbook_seconds=round(textbook_seconds, 3), ratio=round(ratio, 1))
        with capsys.disabled():
            print(f"\n{benchmark.name}: {seconds:.3f} s, textbook {textbook_seconds:.2f} s, {ratio:.1f} times")

    return run


def problem(rows: int, columns: int) -> tuple[nn.Linear, Tensor]:
    """A layer and the float64 Hessian of correlated inputs, conditioned well enough to compare masks in float32."""
    x = torch.randn(4 * columns, columns) + 0.3 * torch.randn(4 * columns, 32) @ torch.randn(32, columns)
    return nn.Linear(columns, rows, bias=False), 2 / len(x) * (x.t() @ x).double()


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def error(weight: Tensor, solution: Tensor, hessian: Tensor) -> float:
    """``1/2 δᵀHδ`` of the whole layer."""
    delta = (solution - weight).double()
    return float((delta @ hessian * delta).sum() / 2)


@pytest.mark.parametrize(("rows", "columns", "block"), [(32, 1024, 1), (32, 1152, 9)])
def test_exact_obs(compare: Compare, rows: int, columns: int, block: int) -> None:
    layer, hessian = problem(rows, columns)
    weight = layer.weight.detach()

    def plain() -> Tensor:
        return textbook.pruned(*textbook.obs_paths(weight, hessian.float(), block), 0.9)

    def ours() -> Tensor:
        solver = TrueOBS(layer)
        solver.H = hessian
        if block == 1:
            solver.prepare_unstr()
        else:
            solver.prepare_blocked(block)
        return solver.prune_unstr([0.9])[0]

    expected, seconds = timed(plain)
    result = ours()
    assert ((result == 0) != (expected == 0)).float().mean() < 1e-3
    assert error(weight, result, hessian) == pytest.approx(error(weight, expected, hessian), rel=1e-3)
    compare(ours, seconds)


def test_conv_hessian(compare: Compare) -> None:
    layer, x = nn.Conv2d(512, 32, 3, padding=1), torch.randn(256, 512, 7, 7)

    def ours() -> Tensor:
        solver = TrueOBS(layer)
        solver.add_batch(x, None)
        assert solver.H is not None
        return solver.H

    textbook.conv_hessian(x[:8], 3, 1, 1)
    expected, seconds = timed(lambda: textbook.conv_hessian(x, 3, 1, 1))
    torch.testing.assert_close(ours(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    compare(ours, seconds)


def test_sparsegpt(compare: Compare) -> None:
    layer, hessian = problem(1000, 2048)
    weight, hessian = layer.weight.detach().clone(), hessian.float()

    def ours() -> Tensor:
        layer.weight.data = weight.clone()
        solver = SparseGPT(layer)
        solver.H = hessian
        solver.fasterprune(0.9, blocksize=1)
        return layer.weight.detach()

    expected, seconds = timed(lambda: textbook.sparsegpt(weight, hessian, 0.9, 1, 0.01))
    result = ours()
    # Some two scores next to a threshold are equal in float32, and every later column depends on which of them goes.
    assert ((result == 0) != (expected == 0)).float().mean() < 2e-2
    full = hessian.double()
    assert error(weight, result, full) == pytest.approx(error(weight, expected, full), rel=5e-3)
    compare(ours, seconds)


def test_peak_memory(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).with_name("peak_memory.py")
    line = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.strip()
    with capsys.disabled():
        print(f"\n{line}")
    more = re.search(r"(\d+) MB more", line)
    assert more is not None and int(more[1]) < 500
