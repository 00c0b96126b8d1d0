"""Profiles a run by the stages of `spade_fast._util.ranges`: seconds, floating-point operations and peak memory."""

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
from spade_fast._util.files import check_file, whole_file, writing
from spade_fast._util.ranges import NVTX_VARIABLE, PREFIX, STAGES, nvtx_asked_for
from spade_fast.ops import flops

OTHER = "other"
_RUN, _CLOCK = PREFIX + "run", PREFIX + "clock"
_CLOCK_READINGS = 10
_SAMPLING_SECONDS = 0.005


@dataclass(frozen=True)
class StageUse:
    """The resources that one stage used.

    Attributes
    ----------
    stage
        One of `STAGES`, or ``"other"`` for everything outside them.
    seconds
        Time on the run's thread, excluding nested stages. For GPU work it is the time spent launching it and waiting
        for it.
    operations
        Floating-point operations as `spade_fast.ops.flops` counts them; 0 if none are counted.
    peak_bytes
        Largest resident memory of the process sampled during this stage, including memory allocated earlier. It is
        sampled every 5 ms, so shorter peaks can be missed; it is None if no sample fell into the stage, or if the
        system has no ``/proc/self/statm``.
    """

    stage: str
    seconds: float
    operations: float
    peak_bytes: int | None


def run_profiled(run: Callable[[], object], chrome: Path) -> list[StageUse]:
    """Run a function under torch's profiler.

    Parameters
    ----------
    run
        Function to profile. Its exceptions are passed on.
    chrome
        File for the Chrome trace (``chrome://tracing``, Perfetto). It appears only when it is complete, and only if
        `run` succeeds.

    Returns
    -------
    list of StageUse
        The stages that occurred, and ``"other"``. Their seconds sum to the duration of the run.

    Raises
    ------
    ValueError
        The environment asks for NVTX ranges, which torch cannot emit while profiling.
    OSError
        The Chrome trace cannot be written.
    """
    if nvtx_asked_for():
        raise InvalidValueError(f"{NVTX_VARIABLE}=1 cannot be combined with a profile: unset the variable")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # suppresses the profiler's own messages
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    check_file(chrome, "the Chrome trace")
    with whole_file(chrome, "the Chrome trace") as file, tempfile.TemporaryDirectory() as scratch:
        profiler, memory, ops = torch.profiler.profile(activities=activities), _MemorySampler(), _Counter()
        with profiler, memory, ops:
            readings = [_read_clock() for _ in range(_CLOCK_READINGS)]
            with record_function(_RUN):
                run()
        exported = Path(scratch, chrome.name)  # torch chooses compression by the suffix
        profiler.export_chrome_trace(str(exported))
        with exported.open("rb") as finished, writing(chrome):
            shutil.copyfileobj(finished, file)
    # `profiler.events()` would convert all events to Python objects, which takes ten times longer.
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    named = [event for event in events if event.name().startswith(PREFIX) and event.device_type() == DeviceType.CPU]
    whole = next(event for event in named if event.name() == _RUN)
    clock = sorted(event.start_ns() for event in named if event.name() == _CLOCK)
    # The profiler has another clock. A reading is late if this thread lost the CPU just before it, so take the minimum.
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
    """The stage of a run at each moment; where stages are nested, the innermost.

    Parameters
    ----------
    ranges
        Start, end and stage of each range, in nanoseconds from the start of the run.
    end
        Duration of the run in nanoseconds.
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
        """Return the stage at a moment, in nanoseconds from the start; ``"other"`` before the start."""
        return self._changes[max(0, bisect(self._changes, moment, key=lambda change: change[0]) - 1)][1]

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage; they sum to the duration of the run."""
        total: dict[str, float] = defaultdict(float)
        for (start, stage), (stop, _) in pairwise([*self._changes, (self._end, "")]):
            total[stage] += (stop - start) / 1e9
        return dict(total)


class _Counter(TorchDispatchMode):
    """Records the time and number of operations of every op, and its stage if the op forms a stage by itself."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Compiled code never runs under a dispatch mode; marking this one would import the compiler, which is slow.
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
    """Samples the resident memory of the process at regular intervals on a separate thread."""

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
    """Return the resident memory of this process in bytes, or None on systems without ``/proc``."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
