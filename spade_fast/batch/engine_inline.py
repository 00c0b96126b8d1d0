"""Engine for one machine: all in this process."""

from __future__ import annotations

import time
from collections.abc import Generator

import torch

from spade_fast.batch.job import Job
from spade_fast.batch.schedule import POLL, Schedule
from spade_fast.batch.worker import Outcome, Worker
from spade_fast.inputs.networks import LoadedModel


def run_here(
    job: Job, model: LoadedModel, schedule: Schedule, samples_per_solve: int
) -> Generator[Outcome, None, None]:
    """Work through a schedule with one worker, and give the final outcomes; errors are those of `Worker`."""
    threads = torch.get_num_threads()
    worker = Worker(job, samples_per_solve, model)
    torch.set_num_threads(job.facts["threads"])
    try:
        while not schedule.done:
            task = schedule.task()
            for outcome in worker.run(task):
                if schedule.take(outcome):
                    yield outcome
            if not task:
                time.sleep(POLL)
    finally:
        worker.store.close()
        torch.set_num_threads(threads)
