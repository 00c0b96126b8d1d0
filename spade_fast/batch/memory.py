"""How much memory there is, and how many samples and workers it allows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_SHARE = 0.5  # of the memory that is free now; the rest is for networks, their outputs and everyone else
_PROCESS = 500 * 10**6  # bytes of a process that has loaded torch
_MOST_SAMPLES = 8  # solved together
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str) -> int:
    """Return the memory of a device that is free (``"cuda"``: of all GPUs), within the limits of this process."""
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
    """What each control group that this process is in leaves of its memory; files that it caches count as free."""
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


def samples_together(threads: int, device: str, bytes_a_sample: int, free: int) -> int:
    """Return how many samples a worker with so much free memory is to solve together.

    On processors more than one a thread are no faster (`benchmarks/batch.py`), and more are lost if it is killed.
    """
    most = _MOST_SAMPLES if torch.device(device).type == "cuda" else min(_MOST_SAMPLES, threads)
    return max(1, min(most, int(_SHARE * free) // max(1, bytes_a_sample)))


def count_workers(threads: int, device: str, bytes_a_worker: int, free: int) -> int:
    """Return the number of workers for this machine: one a GPU, or one for each `threads` processors that fits."""
    if torch.device(device).type == "cuda":
        return torch.cuda.device_count() if torch.device(device).index is None else 1
    fitting = int(_SHARE * free) // (bytes_a_worker + _PROCESS)
    return max(1, min(len(os.sched_getaffinity(0)) // threads, fitting))
