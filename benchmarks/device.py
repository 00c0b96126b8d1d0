"""Where the benchmarks run: the CPU, or a GPU with ``SPADE_BENCH_DEVICE=cuda``; and what only a GPU can tell.

``python benchmarks/device.py`` prints the file in which the results of this machine's GPU are kept.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import collect_env

from spade_fast.ops._native import _C

Item = TypeVar("Item")

_VARIABLE = "SPADE_BENCH_DEVICE"
_RESULTS = Path(__file__).with_name("results")
_CHOSEN = os.environ.get(_VARIABLE, "cpu")
_NO_GPU = "torch finds no CUDA device on this machine"
ON_CUDA = _CHOSEN == "cuda"
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")


def prepare() -> None:
    """Check that the chosen device is there; on a GPU, compute in float32 throughout (no TF32).

    Raises
    ------
    ValueError
        Another name, no GPU, or a build of which every op would compute on the CPU.
    """
    if _CHOSEN not in ("cpu", "cuda"):
        raise ValueError(f"{_VARIABLE} must be cpu or cuda, got {_CHOSEN!r}")
    if ON_CUDA:
        if not torch.cuda.is_available():
            raise ValueError(f"{_VARIABLE}=cuda, but {_NO_GPU}")
        if not _C.build_info()["cuda"]:
            raise ValueError(f"{_VARIABLE}=cuda, but spade_fast was built without CUDA kernels")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def to_device(*tensors: Tensor) -> list[Tensor]:
    """Inputs are made on the CPU, the same ones for every device."""
    return [tensor.to(DEVICE) for tensor in tensors]


def to_cpu(result: Any) -> Any:
    """Results are checked on the CPU: tensors, also those of tuples and dicts, are moved there."""
    return pytree.tree_map_only(Tensor, Tensor.cpu, result)


def cuda_only(*cases: Item) -> tuple[Item, ...]:
    """Those cases on a GPU; none on the CPU, for which they are too large."""
    return cases if ON_CUDA else ()


def wait() -> None:
    """Until the device has done what it was given."""
    torch.get_device_module(DEVICE).synchronize()


class Moment:
    """A moment of a GPU's work. The difference of two is in seconds; it is known once the device got to the later."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Moment) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


now: Callable[[], Any] = Moment if ON_CUDA else time.perf_counter


def allocated_bytes(function: Callable[[], object]) -> int:
    """Bytes of the GPU that torch's allocator hands out during a call, at their peak."""
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    wait()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def gpu() -> dict[str, Any]:
    """Facts about the GPU."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
    }


def results_folder() -> Path:
    """Where results of the chosen device are kept: a folder of its own for each kind of GPU."""
    return _RESULTS / _slug() if ON_CUDA else _RESULTS


def _slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(_NO_GPU)
    print(_RESULTS / f"{_slug()}.json")
