"""A worker: loads samples, traces and explains them with its network, writes the results, and handles failures."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from spade_fast._util.errors import FallbackWarning, UserError, WorkerError
from spade_fast._util.files import write_whole, writing
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.attribution.methods import Question, attribution_map
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.batch.job import Job, make_augmenter
from spade_fast.batch.results import maps_file
from spade_fast.batch.samples import file_name
from spade_fast.batch.store import Store
from spade_fast.batch.thumbnails import thumbnail
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace_batch

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
        except ImportError:
            raise
        except Exception as error:
            return Outcome(index, "failed", error_line(error))
        return _Sample(index, name, image, size, began, {"load": time.perf_counter() - start}, noted)

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
            for sample, made in zip(samples, traces, strict=True):
                yield self._finish(sample, made, len(samples))
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

    def _trace(self, samples: Sequence[_Sample]) -> list[Trace]:
        data = []
        for sample in samples:
            with _noted_warnings() as noted:
                data.append(self._augmenter(sample.image.to(self.job.facts["device"]), sample.id))
            sample.warnings += [warning for warning in noted if warning not in sample.warnings]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # the reports of the layers contain it
            return trace_batch(self.module, data, sample_ids=[sample.id for sample in samples], **self.job.options)

    def _finish(self, sample: _Sample, made: Trace, together: int) -> Outcome:
        """Predict and explain with a trace, and write the files."""
        seconds = {**sample.seconds, **made.header["seconds"]}
        start = time.perf_counter()
        try:
            with _noticing_a_lost_device():
                decision, maps = _with_memory(lambda: self._explain(sample, made))
        except (ImportError, DeviceError):
            raise
        except Exception as error:
            return Outcome(sample.index, "failed", error_line(error))
        seconds["explain"] = time.perf_counter() - start
        # What differs from run to run is not part of the result.
        kept = ("sample_id", "settings", "images", "library_version", "weights", "network_weights")
        made.header = {
            **{name: made.header[name] for name in kept},
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
            "seconds": seconds,
            "warnings": sample.warnings,
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

    def _explain(self, sample: _Sample, made: Trace) -> tuple[Decision, dict[str, Tensor]]:
        image, methods = sample.image.to(self.job.facts["device"]), self.job.facts["methods"]
        if methods and not self._prepared:
            self.module, self._prepared = prepare_for_attribution(self.module, image), True
        dense = predict(self.module, image)
        question = Question(self.module, image, int(dense.argmax()), self.model.black.to(image))
        maps = {f"dense.{method}": attribution_map(method, question) for method in methods}
        with made.applied(self.module):
            pruned = predict(self.module, image)
            maps.update({f"trace.{method}": attribution_map(method, question) for method in methods})
        return Decision.between(dense, pruned), {name: found.contiguous() for name, found in maps.items()}


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
