"""A worker whose network runs out of memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")

from batches import contents, make_photos, run_small, small_job

from spade_fast.batch.store import Store
from spade_fast.batch.worker import Worker
from spade_fast.pruning.session import Session


def test_samples_that_fit_alone_are_traced_alone(small, tmp_path, monkeypatch):
    """On a CPU torch says that memory has run out with a RuntimeError."""
    make_photos(tmp_path / "photos", 5)
    run_small(tmp_path / "photos", tmp_path / "undisturbed", small)
    together, right = [], Session.calibrated

    def calibrated(self, plan, samples, ids):
        together.append(len(samples))
        return right(self, plan, samples, ids)

    def greedy(module: torch.nn.Module, inputs: object) -> None:
        if together and together[-1] > 1:
            torch.empty(2**50)

    job, network = small_job(tmp_path / "photos", tmp_path / "out", small)
    Store(job).open()
    network.module.register_forward_pre_hook(greedy)
    monkeypatch.setattr(Session, "calibrated", calibrated)
    outcomes = list(Worker(job, 5, network).run(range(5)))
    assert [(outcome.state, outcome.error) for outcome in outcomes] == [("finished", "")] * 5
    assert together == [5, 2, 1, 1, 1, 1, 1]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
