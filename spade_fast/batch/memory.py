"""Free memory, and how many samples and workers fit into it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_SHARE = 0.5  # of the free memory; the rest is for networks, their outputs and other processes
_PROCESS = 500 * 10**6  # bytes of a process that has imported torch
_MOST_SAMPLES = 8  # solved together
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str) -> int:
    """Return the free memory of a device (``"cuda"``: of all GPUs), within the limits of this process."""
    if torch.device(device).type == "cuda":
        count = torch.cuda.device_count() if torch.device(device).index is None else 1
        return count * torch.cuda.mem_get_info(torch.device(device))[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return max(0, min([free, *_left_by_limits()]))


def _left_by_limits() -> Iterator[int]:
    """Yield the memory that each control group of this process leaves free; cached files count as free."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return
    for group in (_CGROUP / own, *(_CGROUP / own).parents):
        try:
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such group here, or it has no limit
            continue
        yield limit - used + (int(cached[1]) if cached else 0)


def samples_together(threads: int, device: str, bytes_per_sample: int, free: int) -> int:
    """Return the samples per solve of a worker with this much free memory.

    On a CPU, more than one per thread is not faster (`benchmarks/batch.py`), and more are lost if the worker is killed.
    """
    most = _MOST_SAMPLES if torch.device(device).type == "cuda" else min(_MOST_SAMPLES, threads)
    return max(1, min(most, int(_SHARE * free) // max(1, bytes_per_sample)))


def count_workers(threads: int, device: str, bytes_per_worker: int, free: int) -> int:
    """Return the number of workers for this machine: one per GPU; or one per `threads` processors, as memory allows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.device_count() if torch.device(device).index is None else 1
    fitting = int(_SHARE * free) // (bytes_per_worker + _PROCESS)
    return max(1, min(len(os.sched_getaffinity(0)) // threads, fitting))
