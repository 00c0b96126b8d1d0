"""Engine for one machine: each worker is a process with a network of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any

import torch

from spade_fast.batch.job import Job, not_sendable
from spade_fast.batch.schedule import POLL, WorkerDied
from spade_fast.batch.worker import DeviceError, Outcome, Worker, error_line
from spade_fast.ops.memory import keep_freed_memory

_END = 5.0  # seconds that a process is given to end
_JOB, _IDLE = "job", "idle"  # what a worker asks for: its job; a task


class Processes:
    """A team of processes of this machine."""

    def __init__(self, job: Job, samples_per_solve: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._job = job, samples_per_solve

    def start(self, number: int) -> _Process:
        return _Process(self._context, number, self._job)

    def ready(self, members: Mapping[int, _Process]) -> list[int]:
        found = wait([member.connection for member in members.values()], POLL)
        return [number for number, member in members.items() if member.connection in found]

    def end(self, members: Sequence[_Process]) -> None:
        for member in members:
            member.process.terminate()
        for member in members:
            member.join()


class _Process:
    """A worker's process, as its parent sees it."""

    def __init__(self, context: SpawnContext, number: int, job: tuple[Job, int]) -> None:
        self.idle = False
        self._job = job
        self._hint = " (does the script call it under __name__ == '__main__'?)"
        self.connection, theirs = context.Pipe()
        # The job is not among the arguments: these go through a pipe that keeps the parent waiting for the child.
        self.process = context.Process(target=_work, args=(number, theirs), daemon=True)
        try:
            self.process.start()
        finally:
            theirs.close()

    def give(self, task: Sequence[int]) -> None:
        self.idle = False
        self._send(task)

    def receive(self) -> Outcome | None:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerDied(f"exit code {self.join()}{self._hint}") from None
        if isinstance(message, DeviceError):
            self.join()
            raise WorkerDied(str(message))
        if isinstance(message, BaseException):
            raise message
        if message == _JOB:
            self._send_job()
        elif message == _IDLE:
            self.idle, self._hint = True, ""
        else:
            return message
        return None

    def _send_job(self) -> None:
        try:
            self._send(self._job)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise not_sendable(error) from error

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it died, which the next `receive` finds
            self.connection.send(message)

    def join(self) -> int | None:
        """Wait until the process has ended, or kill it if that takes long; return its exit code."""
        self.connection.close()
        self.process.join(_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _work(number: int, connection: Connection) -> None:
    """Ask for the job, then for one task after another, and send their outcomes; or an error that ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send(_JOB)
        job, samples_per_solve = connection.recv()
        if job.facts["device"] == "cuda":
            _use_gpu(number)
        torch.set_num_threads(job.facts["threads"])
        worker = Worker(job, samples_per_solve)
        with keep_freed_memory():
            while True:
                connection.send(_IDLE)
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
        raise DeviceError(error_line(error)) from error


def _send(connection: Connection, error: Exception) -> None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the error of a user's network or dataset may not be picklable, and may fail in any way
        error = RuntimeError(error_line(error))
    with suppress(OSError):  # the parent has ended
        connection.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
