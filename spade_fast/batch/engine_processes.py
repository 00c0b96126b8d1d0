"""Engine for one machine: processes with a network each. One that dies is replaced, its samples are tried again."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any

import torch

from spade_fast._util.malloc import keep_freed_memory
from spade_fast.batch.job import Job, not_sendable
from spade_fast.batch.schedule import POLL, Schedule, Starts
from spade_fast.batch.worker import DeviceError, Outcome, Worker, describe

_END = 5.0  # seconds that a process has to end
_JOB = "job"


def run_processes(job: Job, schedule: Schedule, workers: int, samples_per_solve: int) -> Generator[Outcome, None, None]:
    """Work through a schedule with several processes, and give the final outcomes.

    Raises
    ------
    TypeError
        The samples cannot be sent to a process.
    ChildProcessError
        No worker begins to work.

    Others are those of `Worker`.
    """
    context = multiprocessing.get_context("spawn")
    starts = Starts(workers)
    team: dict[int, _Process] = {}
    try:
        for number in range(workers):
            team[number] = _Process(context, number)
        while not schedule.done:
            for member in team.values():
                if member.idle:
                    member.give(schedule.task())
            ready = wait([member.connection for member in team.values()], POLL)
            for number, member in list(team.items()):
                if member.connection not in ready:
                    continue
                message = member.receive()
                if isinstance(message, ChildProcessError):
                    del team[number]
                    if member.began or not starts.failed(number, str(message)):
                        team[number] = _Process(context, number)
                    yield from schedule.died(member.task, str(message))
                    continue
                if message == _JOB:
                    member.send_job(job, samples_per_solve)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Outcome):
                    member.task.remove(message.index)
                    if schedule.take(message):
                        yield message
                else:
                    starts.began(number)
                    member.began = member.idle = True
    finally:
        for member in team.values():
            member.process.terminate()
        for member in team.values():
            member.end()


class _Process:
    """A worker's process as its parent sees it; `task` holds the samples whose outcome is not known yet."""

    def __init__(self, context: SpawnContext, number: int) -> None:
        self.task, self.idle, self.began = list[int](), False, False
        self.connection, theirs = context.Pipe()
        # The job is not among the arguments: these go through a pipe that keeps the parent waiting for the child.
        self.process = context.Process(target=_work, args=(number, theirs), daemon=True)
        try:
            self.process.start()
        finally:
            theirs.close()

    def send_job(self, job: Job, samples_per_solve: int) -> None:
        """Send what it asks for first; TypeError if that cannot be sent."""
        try:
            with suppress(OSError):  # it died, which is noticed where messages are received
                self.connection.send((job, samples_per_solve))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise not_sendable(error) from error

    def give(self, task: list[int]) -> None:
        """Send a task, if there is one."""
        if task:
            self.task, self.idle = task, False
            with suppress(OSError):  # as above
                self.connection.send(task)

    def receive(self) -> Any:
        """Return its next message; a ChildProcessError that says how it ended, if it has."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            hint = "" if self.began else " (does the script call it under __name__ == '__main__'?)"
            return ChildProcessError(f"exit code {self.end()}{hint}")
        if isinstance(message, DeviceError):
            self.end()
        return message

    def end(self) -> int | None:
        """Make sure that the process has ended, and return its exit code."""
        self.connection.close()
        self.process.join(_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _work(number: int, connection: Connection) -> None:
    """Ask for the job, then send None before and outcomes of each task that comes in; or what ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    try:
        connection.send(_JOB)
        job, samples_per_solve = connection.recv()
        if job.facts["device"] == "cuda":
            _use_gpu(number)
        torch.set_num_threads(job.facts["threads"])
        worker = Worker(job, samples_per_solve)
        while True:
            connection.send(None)
            for outcome in worker.run(connection.recv()):
                connection.send(outcome)
    except EOFError:
        pass  # the parent has ended
    except Exception as error:
        _send(connection, error)


def _use_gpu(number: int) -> None:
    try:
        torch.cuda.set_device(number % max(1, torch.cuda.device_count()))
    except (AssertionError, RuntimeError) as error:  # a build without CUDA raises the first
        raise DeviceError(describe(error)) from error


def _send(connection: Connection, error: Exception) -> None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error of the user's own network or dataset may not be picklable, and fail in any way
        error = RuntimeError(describe(error))
    with suppress(OSError):  # nobody listens any more
        connection.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
