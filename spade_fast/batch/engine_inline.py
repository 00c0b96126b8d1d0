"""Engine for one machine: the only worker is this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from spade_fast.batch.job import Job
from spade_fast.batch.schedule import POLL
from spade_fast.batch.worker import Outcome, Worker
from spade_fast.inputs.networks import LoadedModel


class Inline:
    """A team that is its only member, and works while a message is received."""

    def __init__(self, job: Job, model: LoadedModel, samples_per_solve: int) -> None:
        self._job, self._model, self._samples_per_solve = job, model, samples_per_solve
        self._threads = torch.get_num_threads()
        self._outcomes: Iterator[Outcome] | None = None

    def start(self, number: int) -> Inline:
        self._worker = Worker(self._job, self._samples_per_solve, self._model)
        torch.set_num_threads(self._job.facts["threads"])
        return self

    def ready(self, members: Mapping[int, Inline]) -> list[int]:
        if self.idle:
            time.sleep(POLL)
            return []
        return list(members)

    def end(self, members: Sequence[Inline]) -> None:
        if members:
            self._worker.store.close()
            torch.set_num_threads(self._threads)

    @property
    def idle(self) -> bool:
        return self._outcomes is None

    def give(self, task: Sequence[int]) -> None:
        self._outcomes = self._worker.run(task)

    def receive(self) -> Outcome | None:
        assert self._outcomes is not None
        outcome = next(self._outcomes, None)
        if outcome is None:
            self._outcomes = None
        return outcome
