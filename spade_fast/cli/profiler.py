"""Where the time of a run goes: torch's profiler around it, summed up by the stages of `spade_fast._util.ranges`."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.files import check_file, whole_file
from spade_fast._util.ranges import NVTX_VARIABLE, PREFIX, STAGES, nvtx_asked_for
from spade_fast.ops import flops

OTHER = "other"
_RUN, _CLOCK = PREFIX + "run", PREFIX + "clock"
_CLOCK_READINGS = 10
_SAMPLING_SECONDS = 0.005


@dataclass(frozen=True)
class StageUse:
    """What one stage took.

    Attributes
    ----------
    stage
        One of `STAGES`, or ``"other"`` for all that lies in none of them.
    seconds
        Time on the thread of the run, without that of stages inside this one. For work on a GPU that is the time of
        launching it and of waiting for it.
    operations
        Floating-point operations that `spade_fast.ops.flops` counts; 0 where none are counted.
    peak_bytes
        Largest resident memory of the process seen in this stage, which includes all that is kept from before. It is
        read every 5 ms, so that shorter peaks can be missed, and a stage that was never met has None; so has every
        stage on a system without ``/proc/self/statm``.
    """

    stage: str
    seconds: float
    operations: float
    peak_bytes: int | None


def profile(run: Callable[[], object], chrome: Path) -> list[StageUse]:
    """Run a function under torch's profiler.

    Parameters
    ----------
    run
        What to profile. An exception it raises is passed on.
    chrome
        File for the Chrome trace (``chrome://tracing``, Perfetto). It appears once it is complete, and only if `run`
        did not fail.

    Returns
    -------
    list of StageUse
        The stages that occurred, and ``"other"``. Their seconds add up to those of the run.

    Raises
    ------
    ValueError
        The environment asks for NVTX ranges, which torch cannot make beside a profile.
    OSError
        The Chrome trace cannot be written.
    """
    if nvtx_asked_for():
        raise InvalidValueError(f"{NVTX_VARIABLE}=1 and a profile exclude each other: unset the variable")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints about itself
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    check_file(chrome, "the Chrome trace")
    with whole_file(chrome, "the Chrome trace") as file, tempfile.TemporaryDirectory() as scratch:
        profiler, memory, ops = torch.profiler.profile(activities=activities), _MemorySampler(), _Counter()
        with profiler, memory, ops:
            readings = [_read_clock() for _ in range(_CLOCK_READINGS)]
            with record_function(_RUN):
                run()
        exported = Path(scratch, chrome.name)  # torch compresses by the name's suffix
        profiler.export_chrome_trace(str(exported))
        with exported.open("rb") as finished:
            shutil.copyfileobj(finished, file)
    # All of `profiler.events()` would become Python objects, which takes ten times longer.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    named = [event for event in events if event.name().startswith(PREFIX) and event.device_type() == DeviceType.CPU]
    whole = next(event for event in named if event.name() == _RUN)
    clock = sorted(event.start_ns() for event in named if event.name() == _CLOCK)
    # The profiler's clock is another one. A reading is late where this thread lost the processor just before it.
    start = whole.start_ns() + min(reading - begin for reading, begin in zip(readings, clock, strict=True))
    ranges = []
    for event in named:
        if event.name() not in (_RUN, _CLOCK) and event.start_thread_id() == whole.start_thread_id():
            begin = event.start_ns() - whole.start_ns()
            ranges.append((begin, begin + event.duration_ns(), event.name().removeprefix(PREFIX)))
    timeline = Timeline(ranges, whole.duration_ns())
    operations: dict[str, float] = defaultdict(float)
    for moment, stage, counted in ops.counted:
        operations[stage or timeline.stage_at(moment - start)] += counted
    peaks: dict[str, int] = {}
    for moment, resident in memory.samples:
        stage = timeline.stage_at(moment - start)
        peaks[stage] = max(resident, peaks.get(stage, 0))
    seconds = timeline.seconds()
    return [
        StageUse(stage, seconds[stage], operations.get(stage, 0.0), peaks.get(stage))
        for stage in (*STAGES, OTHER)
        if stage in seconds
    ]


class Timeline:
    """Which stage a run was in at each moment; of stages inside each other, the innermost.

    Parameters
    ----------
    ranges
        Start, end and stage of each range, in nanoseconds from the start of the run.
    end
        Length of the run.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, str]], end: int) -> None:
        self._changes = [(0, OTHER)]
        self._end = end
        open_ranges = [(end, OTHER)]

        def close_until(moment: int) -> None:
            while len(open_ranges) > 1 and open_ranges[-1][0] <= moment:
                stop, _ = open_ranges.pop()
                self._changes.append((stop, open_ranges[-1][1]))

        for start, stop, stage in sorted(ranges, key=lambda one: (one[0], -one[1])):
            close_until(start)
            self._changes.append((start, stage))
            open_ranges.append((min(stop, open_ranges[-1][0]), stage))
        close_until(end)

    def stage_at(self, moment: int) -> str:
        """Return the stage at a moment; ``"other"`` before the start."""
        return self._changes[max(0, bisect(self._changes, moment, key=lambda change: change[0]) - 1)][1]

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage; they add up to the length of the run."""
        total: dict[str, float] = defaultdict(float)
        for (start, stage), (stop, _) in pairwise([*self._changes, (self._end, "")]):
            total[stage] += (stop - start) / 1e9
        return dict(total)


class _Counter(TorchDispatchMode):
    """Counts the operations of every op: when, in which stage if the op is one by itself, and how many."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Compiled code does not run under a mode anyway; marking this would import the compiler, which takes seconds.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[tuple[int, str | None, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operations = flops.count(func, args, kwargs, result)
        if operations:
            self.counted.append((time.perf_counter_ns(), flops.stage_of(func), operations))
        return result


class _MemorySampler:
    """Reads the resident memory of the process again and again, on a thread of its own."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while (resident := resident_bytes()) is not None:
            self.samples.append((time.perf_counter_ns(), resident))
            if self._stop.wait(_SAMPLING_SECONDS):
                return


def _read_clock() -> int:
    with record_function(_CLOCK):
        return time.perf_counter_ns()


def resident_bytes() -> int | None:
    """Return the resident memory of this process; None on systems without ``/proc``."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
