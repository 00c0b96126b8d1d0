"""A worker: loads samples, traces and explains them with its network, writes the results, and handles failures."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError, UserError, WorkerError
from spade_fast._util.files import write_whole, writing
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.attribution.maps import mean_map
from spade_fast.attribution.methods import Question, attribution_map
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.batch.job import Job, make_augmenter
from spade_fast.batch.results import maps_file
from spade_fast.batch.samples import file_name
from spade_fast.batch.store import Store
from spade_fast.batch.thumbnails import thumbnail
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.pruning.calibration import draw_id
from spade_fast.pruning.config import AUTO
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.goals import Goal, output_score, sample_goal
from spade_fast.pruning.session import Session, compiled_network
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import traces_by_level
from spade_fast.targets.target import Target

State = Literal["finished", "failed", "killed", "busy"]
_Result = TypeVar("_Result")

_PAUSES = (0.5, 2.0)  # seconds before each retry
_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class DeviceError(WorkerError):
    """This process can no longer use its device; another process may."""


@dataclass(frozen=True)
class Outcome:
    """What became of a sample. A killed one has no error written yet; a busy one is claimed by another process."""

    index: int
    state: State
    error: str = ""


@dataclass
class _Sample:
    index: int
    id: str
    image: Tensor
    dense: Tensor  # probabilities that the dense network predicts
    size: int | None
    began: float
    seconds: dict[str, float]
    warnings: list[str]


class Worker:
    """Holds the network of a job, and works on its samples.

    Parameters
    ----------
    model
        The network, if it is already loaded.
    samples_per_solve
        The maximum; halved when memory runs out.

    Raises
    ------
    TypeError, ValueError, OSError, ImportError
        The network cannot be loaded or is not that of the run, or the folder belongs to another run.
    DeviceError
        The device fails whatever is asked of it.
    """

    def __init__(self, job: Job, samples_per_solve: int, model: LoadedModel | None = None) -> None:
        self.job, self.samples_per_solve = job, samples_per_solve
        self.store = Store(job)
        self.store.check()
        self._unpacked: list[str] = []
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        with _noticing_a_lost_device():
            if model is None:
                model = job.load_model()
            self.model, self.module = model, model.module.to(job.facts["device"])
        self._augmenter = make_augmenter(job, model)
        self._asked = job.target
        self._compiled = compiled_network(job.config)
        self._prepared = False

    def run(self, indices: Sequence[int]) -> Iterator[Outcome]:
        """Work on samples, and yield the outcome of each as soon as it is known.

        Raises
        ------
        OutputError
            A result cannot be written.
        ImportError
            A package is missing.
        DeviceError
            The device fails whatever is asked of it.
        ValueError, OSError
            Existing files of a sample belong to another run or sample, or cannot be read.
        """
        # Not after the work: the end of a run waits for that, and packs the rest itself.
        if self.job.pack and len(self._unpacked) >= self.job.pack:
            patiently(lambda: self.store.pack(self._unpacked))
            self._unpacked = []
        ids = [self.job.source.ids[index] for index in indices]
        with self.store.claimed(ids) as free:
            for outcome in self._outcomes(indices, ids, free):
                if outcome.state == "failed":
                    patiently(partial(self.store.record_error, self.job.source.ids[outcome.index], outcome.error))
                yield outcome

    def _outcomes(self, indices: Sequence[int], ids: Sequence[str], free: Sequence[bool]) -> Iterator[Outcome]:
        samples = []
        patiently(self.store.refresh)
        for index, name, mine in zip(indices, ids, free, strict=True):
            if not mine:
                yield Outcome(index, "busy")
            elif patiently(partial(self.store.finished, self.job.source, index)):
                yield Outcome(index, "finished")
            else:
                loaded = self._load(index, name)
                if isinstance(loaded, Outcome):
                    yield loaded
                else:
                    samples.append(loaded)
        yield from self._solve(samples)

    def _load(self, index: int, name: str) -> _Sample | Outcome:
        began, start = time.time(), time.perf_counter()
        source = self.job.source
        try:
            with _noted_warnings() as noted:
                image = _with_memory(lambda: patiently(lambda: source.load(index, self.model)))
            size = patiently(lambda: source.size(index))
            loaded = time.perf_counter()
            with _noticing_a_lost_device():
                dense = _with_memory(lambda: self._predict(image))
        except (ImportError, DeviceError):
            raise
        except Exception as error:
            return Outcome(index, "failed", error_line(error))
        seconds = {"load": loaded - start, "explain": time.perf_counter() - loaded}
        return _Sample(index, name, image, dense, size, began, seconds, noted)

    def _predict(self, image: Tensor) -> Tensor:
        """Return the probabilities that the dense network predicts; prepare it first if it is to be explained."""
        image = image.to(self.job.facts["device"])
        if self.job.facts["methods"] and not self._prepared:
            self.module, self._prepared = prepare_for_attribution(self.module, image), True
        return predict(self.module, image)

    def _solve(self, samples: Sequence[_Sample], last_try: bool = False) -> Iterator[Outcome]:
        """Trace samples together, in smaller groups where that fails."""
        if len(samples) > self.samples_per_solve:
            group = self.samples_per_solve  # which a group that does not fit makes smaller for all that follow
            for start in range(0, len(samples), group):
                yield from self._solve(samples[start : start + group])
            return
        if not samples:
            return
        try:
            with _noticing_a_lost_device():
                traces = self._trace(samples)
        except (ImportError, DeviceError):
            raise
        except Exception as error:
            # What the failed attempt holds is freed when this block ends, before the next attempt.
            memory, failure = is_out_of_memory(error), error_line(error)
        else:
            for sample, of_sample in zip(samples, traces, strict=True):
                yield self._finish(sample, of_sample, len(samples))
            return
        if memory:
            _free_memory()
        if memory and len(samples) > 1:
            self.samples_per_solve = len(samples) // 2
            yield from self._solve(samples)
        elif len(samples) > 1:
            for sample in samples:
                yield from self._solve([sample])
        elif memory and not last_try:
            time.sleep(_PAUSES[-1])  # another process may soon need less
            yield from self._solve(samples, last_try=True)
        else:
            yield Outcome(samples[0].index, "failed", failure)

    def _trace(self, samples: Sequence[_Sample]) -> list[list[Trace]]:
        """Return the traces of each sample, draw by draw and level by level."""
        config, traces = self.job.config, [list[Trace]() for _ in samples]
        goals = [self._goal(sample) if config.sparsity == AUTO else None for sample in samples]
        for draw in range(self.job.facts["draws"]):
            ids = [draw_id(sample.id, draw) for sample in samples]
            data = []
            for sample, name in zip(samples, ids, strict=True):
                with _noted_warnings() as noted:
                    data.append(self._augmenter(sample.image.to(self.job.facts["device"]), name))
                sample.warnings += [warning for warning in noted if warning not in sample.warnings]
            # Its fallbacks are in the reports of the layers and in `Trace.auto`.
            session = Session(self.module, config, None, self._compiled)
            for found, levels in zip(traces, traces_by_level(session, data, ids, goals), strict=True):
                found += levels
        return traces

    def _target(self, sample: _Sample) -> int | Target:
        """Return what is explained: the target of the job, or the class that the dense network predicts."""
        return int(sample.dense.argmax()) if self._asked is None else self._asked

    def _goal(self, sample: _Sample) -> Goal:
        """Return the goal of keeping the probability of the class that is explained, or what a function keeps."""
        image, target = sample.image.to(self.job.facts["device"]), self._target(sample)
        if not isinstance(target, int):
            return sample_goal(sample.id, output_score(self.module, image, target), image)
        if sample.dense[target] == 0:
            raise InvalidValueError(f"the dense network's probability of class {target} is 0: no share can be kept")
        return Goal(f"class {target}", lambda: (float(predict(self.module, image)[target]),))

    def _finish(self, sample: _Sample, traces: Sequence[Trace], together: int) -> Outcome:
        """Predict and explain with the traces of a sample, and write the files."""
        seconds = defaultdict(float, sample.seconds)
        for made in traces[:: len(traces) // self.job.facts["draws"]]:  # the levels of a draw share its seconds
            for stage, spent in made.header["seconds"].items():
                seconds[stage] += spent
        start = time.perf_counter()
        try:
            with _noticing_a_lost_device():
                decisions, maps = _with_memory(lambda: self._explain(sample, traces))
        except (ImportError, DeviceError):
            raise
        except Exception as error:
            return Outcome(sample.index, "failed", error_line(error))
        seconds["explain"] += time.perf_counter() - start
        made, decision = traces[0], decisions[0]
        searched = [_searched(*one) for one in zip(traces, decisions, strict=True)]
        missed = [f"{one.sample_id}: {one.auto}" for one in traces if one.auto is not None and not one.auto.kept]
        # What differs from run to run is not part of the result.
        kept = ("sample_id", "settings", "images", "library_version", "weights", "network_weights", "auto", "target")
        made.header = {
            **{name: made.header[name] for name in kept if name in made.header},
            "traces": len(traces),
            "traces_lost": sum(not one.kept for one in decisions),
            "run": self.store.hash,
            "input": _hash(sample.image),
            "file_bytes": sample.size,
            "sparsity": made.sparsity,
            "network_sparsity": made.network_sparsity,
        }
        made.decision = decision
        report = {
            "worker": self._name,
            "began": sample.began,
            "together": together,
            "seconds": dict(seconds),
            "warnings": [*sample.warnings, *missed],
            "traces": searched,
            "class_names": {
                "before": self.model.class_name(decision.class_before),
                "after": self.model.class_name(decision.class_after),
            },
            "thumbnail": thumbnail(sample.image, self.model),
        }
        made.reports = [replace(layer, seconds=0.0) for layer in made.reports]
        try:
            _with_memory(lambda: patiently(lambda: self._write(sample.id, made, maps, report)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Outcome(sample.index, "failed", error_line(error))
        self._unpacked.append(file_name(sample.id))
        return Outcome(sample.index, "finished")

    def _write(self, name: str, made: Trace, maps: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Write the files of a sample, that of the trace last."""
        if maps:
            with writing(self.store.maps_path(name)):
                write_whole(self.store.maps_path(name), maps_file(maps, name, self.store.hash), "the maps")
        self.store.record(name, report)
        with writing(self.store.trace_path(name)):
            made.save(self.store.trace_path(name))
        self.store.forget_error(name)

    def _explain(self, sample: _Sample, traces: Sequence[Trace]) -> tuple[list[Decision], dict[str, Tensor]]:
        """Return what each trace decides, and the maps of the dense network and of the traces, by name."""
        image, methods = sample.image.to(self.job.facts["device"]), self.job.facts["methods"]
        question = Question(self.module, image, self._target(sample), self.model.black.to(image))
        maps = {f"dense.{method}": attribution_map(method, question) for method in methods}
        decisions, found = [], {method: list[Tensor]() for method in methods}
        for made in traces:
            with made.applied(self.module):
                decisions.append(Decision.between(sample.dense, predict(self.module, image)))
                for method in methods:
                    found[method].append(attribution_map(method, question))
        for method, each in found.items():
            maps[f"trace.{method}"] = mean_map(each) if len(each) > 1 else each[0]
        return decisions, {name: one.contiguous() for name, one in maps.items()}


def _searched(made: Trace, decision: Decision) -> dict[str, Any]:
    """Return what a sample's report tells of one of its traces."""
    auto = made.auto
    return {
        "id": made.sample_id,
        "sparsity": made.sparsity,
        "decision_kept": decision.kept,
        **({} if auto is None else {"keep": auto.keep, "error_limit": auto.error, "share_kept": auto.share}),
    }


def patiently(action: Callable[[], _Result]) -> _Result:
    """Return what `action` returns; retry a few times if it raises an OSError that may be temporary."""
    for pause in _PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
        time.sleep(pause)
    return action()


def _with_memory(action: Callable[[], _Result]) -> _Result:
    """Return what `action` returns; retry once if memory runs out, since another process may soon need less."""
    try:
        return action()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    _free_memory()
    time.sleep(_PAUSES[-1])
    return action()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """Collect the warnings of a ``with`` block."""
    noted: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield noted
    noted += [str(warning.message) for warning in caught]


@contextmanager
def _noticing_a_lost_device() -> Iterator[None]:
    """Raise DeviceError for a CUDA error other than out of memory, since every later call would repeat it."""
    accelerator = getattr(torch, "AcceleratorError", ())
    try:
        yield
    except Exception as error:
        if (isinstance(error, accelerator) or "CUDA error" in str(error)) and not is_out_of_memory(error):
            raise DeviceError(error_line(error)) from error
        raise


def error_line(error: BaseException) -> str:
    """Return an error as one line, with its type unless the message alone is meant for users."""
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError) else f"{type(error).__name__.lstrip('_')}: {message}"


def _hash(image: Tensor) -> str:
    contents = image.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{image.dtype} {list(image.shape)}".encode() + contents.tobytes()).hexdigest()
