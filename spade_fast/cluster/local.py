"""Engine for one machine: all in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from spade_fast.cluster.job import Job
from spade_fast.cluster.schedule import Schedule
from spade_fast.cluster.worker import Outcome, Worker
from spade_fast.models import LoadedModel

POLL = 0.2  # seconds between looks at samples of other runs


def run_here(job: Job, model: LoadedModel, schedule: Schedule, samples_per_solve: int) -> Iterator[Outcome]:
    """Work through a schedule with one worker, and give the final outcomes; errors are those of `Worker`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(job.facts["threads"])
    try:
        worker = Worker(job, samples_per_solve, model)
        while not schedule.done:
            task = schedule.task()
            for outcome in worker.run(task):
                if schedule.take(outcome):
                    yield outcome
            if not task:
                time.sleep(POLL)
        worker.store.close()
    finally:
        torch.set_num_threads(threads)
