"""What a benchmark measures: a case, the floor of the machine at that moment, memory, and facts about the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import torch

import spade_fast
from spade_fast import ops

THREADS = 2
OURS, TEXTBOOK, PUBLISHED = "spade_fast", "textbook", "published"
_MATRIX = 3000
_COPIED_VALUES = 1 << 26  # 256 MB: far more than any cache holds


@dataclass(frozen=True)
class Case:
    """One op on one layer shape.

    Attributes
    ----------
    op, layer
        Together the group in which the implementations stand side by side.
    shape
        What the benchmark makes its inputs from.
    work
        Floating-point operations that the op cannot do without; the floor is their time at a matrix product's rate.
    moved
        Bytes it cannot do without reading; where given, their time at copy bandwidth is the floor instead.
    stated
        Bytes besides the inputs, results included, that the op's docstring allows.
    share_goal, ratio_goal
        Share of the floor, and times faster than the published code, that the op should reach.
    only
        Implementations that can do this case.
    slow
        Those of them that take minutes.
    """

    op: str
    layer: str
    shape: Any
    work: float = 0.0
    moved: float = 0.0
    stated: float | None = None
    share_goal: float | None = None
    ratio_goal: float | None = None
    only: Sequence[str] = (OURS, TEXTBOOK, PUBLISHED)
    slow: Sequence[str] = ()


def by_implementation(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a benchmark with each case and each implementation at hand, those of a case next to each other."""
    at_hand = [OURS, TEXTBOOK, *([PUBLISHED] if published.is_given() else [])]
    return pytest.mark.parametrize(
        ("case", "implementation"),
        [
            pytest.param(case, name, id=f"{case.layer}-{name}", marks=[pytest.mark.slow] if name in case.slow else [])
            for case in cases
            for name in at_hand
            if name in case.only
        ],
    )


def best(function: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate(rounds: int = 2) -> float:
    """Floating-point operations per second of a float32 product of two 3000 x 3000 matrices."""
    a, b = torch.ones(_MATRIX, _MATRIX), torch.ones(_MATRIX, _MATRIX)
    return 2 * _MATRIX**3 / best(lambda: a @ b, rounds)


def copy_bandwidth(rounds: int = 3) -> float:
    """Bytes per second, read and written together, of copying a tensor."""
    source = torch.ones(_COPIED_VALUES)
    target = torch.empty_like(source).zero_()
    return 2 * source.nbytes / best(lambda: target.copy_(source), rounds)


def extra_bytes(function: Callable[[], object]) -> int | None:
    """Bytes by which a call raises the resident memory at its peak; None where the system does not tell (not Linux)."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory that was freed but kept would hide what the call takes
    reset.write_text("5")
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine() -> dict[str, Any]:
    """Facts without which a time means nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": ops.simd_level(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "spade_fast": spade_fast.__version__,
        },
    }
