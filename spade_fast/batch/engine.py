"""The machines a batch runs on: what an engine provides, and the loop that drives its workers."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from spade_fast._util.checks import check_names
from spade_fast._util.errors import InvalidValueError
from spade_fast.batch import memory
from spade_fast.batch.engine_inline import Inline
from spade_fast.batch.engine_processes import Processes
from spade_fast.batch.engine_ray import connected
from spade_fast.batch.job import Job, bytes_per_sample, model_bytes
from spade_fast.batch.schedule import Schedule, Starts, WorkerDied
from spade_fast.batch.worker import Outcome
from spade_fast.inputs.networks import LoadedModel

ENGINES = ("local", "ray")


class Member(Protocol):
    """A worker, as the process that drives it sees it."""

    @property
    def idle(self) -> bool:
        """Whether it waits for a task; it does so for the first time when it has loaded its network."""

    def give(self, task: Sequence[int]) -> None:
        """Send samples to an idle worker, which is idle again after it has sent the outcome of each."""

    def receive(self) -> Outcome | None:
        """Receive a message; return the outcome in it, or None.

        Raises
        ------
        WorkerDied
            The worker ended, or lost its device and has been ended.

        Other errors are those of `spade_fast.batch.worker.Worker`, and end the run.
        """


_Member = TypeVar("_Member", bound=Member)


class Team(Protocol[_Member]):
    """The workers of a run: how to start them, listen to them and end them."""

    def start(self, number: int) -> _Member:
        """Start a worker without waiting for it to load its network."""

    def ready(self, members: Mapping[int, _Member]) -> Iterable[int]:
        """Wait for messages, at most `spade_fast.batch.schedule.POLL` seconds; return the numbers of their senders."""

    def end(self, members: Sequence[_Member]) -> None:
        """End workers, whatever they are doing."""


class Engine(Protocol):
    """One machine or several."""

    def count_workers(self, job: Job, model: LoadedModel, requested: int | None) -> int:
        """Return how many workers to start, 0 for this process alone; None requests as many as fit."""

    def free_bytes(self, job: Job) -> int:
        """Return the memory of all workers together."""

    def team(self, job: Job, model: LoadedModel, workers: int, samples_per_solve: int) -> Team[Any]:
        """Return what starts the workers of a run."""


class Local:
    """Processes of this machine, or this process alone."""

    def count_workers(self, job: Job, model: LoadedModel, requested: int | None) -> int:
        if requested is not None:
            return requested
        bytes_per_worker = bytes_per_sample(job, model) + model_bytes(model)
        return memory.count_workers(job.facts["threads"], job.facts["device"], bytes_per_worker, self.free_bytes(job))

    def free_bytes(self, job: Job) -> int:
        return memory.free_bytes(job.facts["device"])

    def team(self, job: Job, model: LoadedModel, workers: int, samples_per_solve: int) -> Team[Any]:
        return Processes(job, samples_per_solve) if workers else Inline(job, model, samples_per_solve)


@contextmanager
def open_engine(name: str, address: str | None) -> Iterator[Engine]:
    """Provide an engine during a ``with`` block.

    Raises
    ------
    ValueError
        The engine does not exist, or has no address.
    ImportError, ConnectionError
        As in `spade_fast.batch.engine_ray.connected`.
    """
    check_names("engine", [name], ENGINES)
    if name == "local":
        if address is not None:
            raise InvalidValueError("engine 'local' has no address: use engine 'ray'")
        yield Local()
    else:
        with connected(address) as cluster:
            yield cluster


def drive(team: Team[_Member], schedule: Schedule, workers: int) -> Generator[Outcome, None, None]:
    """Work through a schedule with a team, and yield the final outcomes; a worker that dies is replaced.

    Raises
    ------
    TypeError
        The samples cannot be sent to the workers.
    ChildProcessError
        No worker begins to work.

    Other errors are those of `spade_fast.batch.worker.Worker`.
    """
    starts = Starts(workers)
    members: dict[int, _Member] = {}
    # Of members that have begun to work: the samples whose outcomes have not been received.
    tasks: dict[int, list[int]] = {}
    try:
        for number in range(workers):
            members[number] = team.start(number)
        # After its last outcome a member gives up its claims, and then is idle.
        while not schedule.done or not all(members[number].idle for number in tasks):
            for number, member in members.items():
                if member.idle:
                    starts.began(number)
                    tasks[number] = schedule.task()
                    if tasks[number]:
                        member.give(tuple(tasks[number]))
            for number in team.ready(members):
                try:
                    outcome = members[number].receive()
                except WorkerDied as death:
                    how, begun, left = str(death), number in tasks, tasks.pop(number, [])
                    del members[number]
                    if begun or not starts.failed(number, how):
                        members[number] = team.start(number)
                    yield from schedule.died(left, how.partition(". ")[0])
                    continue
                if outcome is not None:
                    tasks[number].remove(outcome.index)
                    if schedule.take(outcome):
                        yield outcome
    finally:
        team.end(list(members.values()))
