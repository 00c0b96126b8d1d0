"""Where the benchmarks run: the CPU, or a GPU with ``SPADE_BENCH_DEVICE=cuda``; clock, memory and facts of the GPU.

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
    """Check that the chosen device can be used; on a GPU, compute in float32 throughout (no TF32).

    Raises
    ------
    ValueError
        Unknown device, no GPU, or a build without CUDA kernels.
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
    """Move inputs to the device. They are made on the CPU, so that every device gets the same."""
    return [tensor.to(DEVICE) for tensor in tensors]


def to_cpu(result: Any) -> Any:
    """Move the tensors of a result, also those in tuples and dicts, to the CPU, where they are checked."""
    return pytree.tree_map_only(Tensor, Tensor.cpu, result)


def cuda_only(*cases: Item) -> tuple[Item, ...]:
    """Return the cases on a GPU; none on the CPU, for which they are too large."""
    return cases if ON_CUDA else ()


def wait() -> None:
    """Wait until the device has finished its work."""
    torch.get_device_module(DEVICE).synchronize()


class Moment:
    """A moment in a GPU's work. The difference of two, in seconds, is known once the device has reached the later."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Moment) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


now: Callable[[], Any] = Moment if ON_CUDA else time.perf_counter


def allocated_bytes(function: Callable[[], object]) -> int:
    """GPU memory, in bytes, that torch's allocator hands out during a call, at its peak."""
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
    """Folder for the results of the chosen device; each GPU model has its own."""
    return _RESULTS / _slug() if ON_CUDA else _RESULTS


def _slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(_NO_GPU)
    print(_RESULTS / f"{_slug()}.json")
