"""The table of whole traces, from made-up measurements."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def whole_traces(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delenv("SPADE_REFERENCE", raising=False)
    return import_module("whole_traces")


def one(cpu, wall, **stages):
    return {"cpu": cpu, "wall": wall, "idle": 0.25, "stages": stages}


def test_a_row(whole_traces):
    rounds = [
        {
            "forward": one(1.0, 2.0),
            "float32": one(4.0 * slower, 3.0, forward=3.0, gram=1.0, solve=0.5),
            "bf16": one(2.0 * slower, 2.0),
            "published": one(20.0, 12.0),
        }
        for slower in (1, 1, 5)
    ]
    found = {"date": "2026-11-30", "layers": 7, "weights": 3 << 20, "peak": 9 << 20, "rounds": rounds}
    row = whole_traces._row(found, {"float32": 7})
    expected = ["7", "20.0", "4.0", "5.0 (7)", "2.0", "10.0", "3.0", "1.0", "0.5", "2.0 (1.5)", "25%", "9", "3"]
    assert row == ["2026-11-30", *expected]


def test_the_exact_run_has_a_line(whole_traces, monkeypatch, tmp_path):
    monkeypatch.setattr(whole_traces, "RESULTS", tmp_path)
    stages = {"forward": 4.0, "gram": 0.4, "solve": 150.0}
    exact = {"date": "2026-11-30", "layers": 53, "peak": 3 << 20, **one(300.0, 155.0, **stages)}
    stored = {"networks": {}, "exact": exact, "machine": {"cpu": "A", "versions": {"torch": "2"}}}
    (tmp_path / "whole_traces.json").write_text(json.dumps(stored))
    whole_traces.report()
    text = (tmp_path / "whole_traces.md").read_text()
    assert "155 seconds of the clock (goal: 210), 300 of the processor (forward 4 s, solve 150 s), 3 MB" in text


def test_layers_are_those_that_the_published_hooks_see(whole_traces):
    attention = nn.MultiheadAttention(4, 2)  # whose output projection is not called
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    model = nn.Sequential(nn.Linear(4, 4), attention, depthwise, nn.Conv2d(4, 2, 1), nn.Linear(2, 2))
    assert whole_traces.layers_of(model) == ["3", "4"]


def test_the_published_pipeline_leaves_the_weights(whole_traces):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = model[2].weight.clone()
    found = whole_traces.theirs(model, torch.randn(20, 4), ["2"])
    assert found["gram and solve"] > 0 and torch.equal(model[2].weight, before)
