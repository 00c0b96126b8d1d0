"""Engine for one machine: processes with a network each. One that dies is replaced, its samples are tried again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pickle import PicklingError
from typing import Any

import torch

from spade_fast.cluster.job import Job
from spade_fast.cluster.schedule import POLL, Schedule, Starts
from spade_fast.cluster.worker import Outcome, Worker, describe
from spade_fast.heap import keep_freed_memory

_END = 5.0  # seconds that a process has to end


def run_processes(job: Job, schedule: Schedule, workers: int, samples_per_solve: int) -> Generator[Outcome, None, None]:
    """Work through a schedule with several processes, and give the final outcomes.

    Raises
    ------
    TypeError
        The samples cannot be sent to a process.
    ChildProcessError
        Process after process ends before it begins to work.

    Others are those of `Worker`.
    """
    context = multiprocessing.get_context("spawn")
    starts = Starts()
    team: list[_Process] = []
    try:
        team += [_Process(context, job, samples_per_solve, number) for number in range(workers)]
        while not schedule.done:
            for member in team:
                if member.idle:
                    member.give(schedule.task())
            ready = wait([member.connection for member in team], POLL)
            for place, member in enumerate(team):
                if member.connection not in ready:
                    continue
                try:
                    message = member.connection.recv()
                except (EOFError, OSError):
                    starts.note(member.began, f"exit code {member.end()}")
                    yield from schedule.died(member.task)
                    team[place] = _Process(context, job, samples_per_solve, member.number)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Outcome):
                    member.task.remove(message.index)
                    if schedule.take(message):
                        yield message
                else:
                    starts.note(True)
                    member.began = member.idle = True
    finally:
        for member in team:
            member.process.terminate()
        for member in team:
            member.end()


class _Process:
    """A worker's process as its parent sees it; `task` holds the samples whose outcome is not known yet."""

    def __init__(self, context: SpawnContext, job: Job, samples_per_solve: int, number: int) -> None:
        self.number, self.task, self.idle, self.began = number, list[int](), False, False
        self.connection, theirs = context.Pipe()
        arguments = (job, samples_per_solve, number, theirs)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        try:
            self.process.start()
        except (PicklingError, TypeError, AttributeError) as error:
            message = f"the samples cannot be sent to other processes ({error}): make them picklable, or use one worker"
            raise TypeError(message) from error
        finally:
            theirs.close()

    def give(self, task: list[int]) -> None:
        """Send a task, if there is one."""
        if task:
            self.task, self.idle = task, False
            with suppress(OSError):  # it died, which is noticed where messages are received
                self.connection.send(task)

    def end(self) -> int | None:
        """Make sure that the process has ended, and return its exit code."""
        self.connection.close()
        self.process.join(_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _work(job: Job, samples_per_solve: int, number: int, connection: Connection) -> None:
    """Send outcomes of each task that comes in, and None before each; or an error, if the run cannot go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    if job.facts["device"] == "cuda":
        _see_one_gpu(number)
    torch.set_num_threads(job.facts["threads"])
    try:
        worker = Worker(job, samples_per_solve)
        while True:
            connection.send(None)
            for outcome in worker.run(connection.recv()):
                connection.send(outcome)
    except EOFError:
        pass
    except Exception as error:
        _send(connection, error)


def _send(connection: Connection, error: Exception) -> None:
    try:
        connection.send(error)
    except OSError:
        pass  # nobody listens any more
    except Exception:  # an error of the user's own network or dataset may not be picklable, and fail in any way
        connection.send(RuntimeError(describe(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _see_one_gpu(number: int) -> None:
    visible: list[Any] = list(range(torch.cuda.device_count()))
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(visible[number % len(visible)])
