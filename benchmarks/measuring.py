"""What a benchmark measures: a case, the floor of the machine at that moment, memory, and facts about the machine."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from device import DEVICE, ON_CUDA, allocated_bytes, gpu, now, wait

import spade_fast
from spade_fast import ops

THREADS = 2
OURS, TEXTBOOK, PUBLISHED = "spade_fast", "textbook", "published"
_MATRIX = 8192 if ON_CUDA else 3000
_COPIED_VALUES = 1 << (28 if ON_CUDA else 26)  # 1 GiB or 256 MiB: far more than any cache holds


@dataclass(frozen=True)
class Case:
    """One op on one layer shape.

    Attributes
    ----------
    op, layer
        Together the group in which implementations are compared.
    shape
        From which the benchmark makes its inputs.
    work
        Floating-point operations that the op cannot do without; the floor is their time at a matrix product's rate.
    moved
        Bytes that the op has to read; if given, the floor is their time at copy bandwidth instead.
    stated
        Bytes in addition to the inputs, results included, that the op's docstring allows on the CPU.
    share_goal, ratio_goal
        Share of the floor, and speed-up over the published code, that the op should reach on the CPU.
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
    """Parametrize a benchmark with each case and each available implementation, case by case."""
    clock = pytest.mark.benchmark(timer=now)
    at_hand = [OURS, TEXTBOOK, *([PUBLISHED] if published.is_given() else [])]
    return pytest.mark.parametrize(
        ("case", "implementation"),
        [
            pytest.param(
                case,
                name,
                id=f"{case.layer}-{name}",
                marks=[clock, pytest.mark.slow] if name in case.slow else [clock],
            )
            for case in cases
            for name in at_hand
            if name in case.only
        ],
    )


def best(function: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    wait()
    for _ in range(rounds):
        start = now()
        function()
        seconds.append(now() - start)
    return min(seconds)


def matmul_rate(rounds: int = 2) -> float:
    """Floating-point operations per second of a float32 product of two 3000 x 3000 (on a GPU 8192 x 8192) matrices."""
    a, b = (torch.ones(_MATRIX, _MATRIX, device=DEVICE) for _ in range(2))
    return 2 * _MATRIX**3 / best(lambda: a @ b, rounds)


def copy_bandwidth(rounds: int = 3) -> float:
    """Bytes per second, read and written together, of copying a tensor."""
    source = torch.ones(_COPIED_VALUES, device=DEVICE)
    target = torch.empty_like(source).zero_()
    return 2 * source.nbytes / best(lambda: target.copy_(source), rounds)


def extra_bytes(function: Callable[[], object]) -> int | None:
    """Bytes of memory that a call adds at its peak.

    On the CPU, the resident memory of the process; None where the system does not report it (only Linux does).
    """
    if ON_CUDA:
        return allocated_bytes(function)
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
    """Facts about the machine without which a time means nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": gpu()["name"] if ON_CUDA else "cpu",
        **({"gpu": gpu()} if ON_CUDA else {}),
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
