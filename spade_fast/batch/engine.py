"""Where workers run: what a run needs to know of it, and the one that is this machine."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Protocol

from spade_fast._util.checks import check_names
from spade_fast.batch import memory
from spade_fast.batch.engine_inline import run_here
from spade_fast.batch.engine_processes import run_processes
from spade_fast.batch.job import Job, bytes_per_sample, model_bytes
from spade_fast.batch.schedule import Schedule
from spade_fast.batch.worker import Outcome
from spade_fast.inputs.networks import LoadedModel

ENGINES = ("local", "ray")


class Engine(Protocol):
    """A machine or several."""

    def count_workers(self, job: Job, model: LoadedModel, asked: int | None) -> int:
        """Return how many workers to start, 0 for none but this process; without a wish as there is room for."""

    def free_bytes(self, job: Job) -> int:
        """Return the memory of all workers together."""

    def outcomes(
        self, job: Job, model: LoadedModel, schedule: Schedule, workers: int, samples_per_solve: int
    ) -> Generator[Outcome, None, None]:
        """Work through a schedule, and give the final outcomes."""


class Local:
    """Processes of this machine, or this one without workers."""

    def count_workers(self, job: Job, model: LoadedModel, asked: int | None) -> int:
        if asked is not None:
            return asked
        a_worker = bytes_per_sample(job, model) + model_bytes(model)
        return memory.count_workers(job.facts["threads"], job.facts["device"], a_worker, self.free_bytes(job))

    def free_bytes(self, job: Job) -> int:
        return memory.free_bytes(job.facts["device"])

    def outcomes(
        self, job: Job, model: LoadedModel, schedule: Schedule, workers: int, samples_per_solve: int
    ) -> Generator[Outcome, None, None]:
        if workers == 0:
            return run_here(job, model, schedule, samples_per_solve)
        return run_processes(job, schedule, workers, samples_per_solve)


@contextmanager
def open_engine(name: str, address: str | None) -> Iterator[Engine]:
    """Make an engine ready for the length of a ``with`` block.

    Raises
    ------
    ValueError
        No such engine, or an address for one that has none.
    ImportError, ConnectionError
        As in `spade_fast.batch.engine_ray.connected`.
    """
    check_names("engine", [name], ENGINES)
    if name == "local":
        if address is not None:
            raise ValueError("engine 'local' has no address: use engine 'ray'")
        yield Local()
    else:
        from spade_fast.batch.engine_ray import connected

        with connected(address) as cluster:
            yield cluster
