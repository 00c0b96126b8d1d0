"""The benchmark of pictures: what Horama is asked for, and what is timed, with a stand-in for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spade_fast.inputs.networks import LoadedModel


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return import_module("visualization")


@pytest.fixture
def network() -> LoadedModel:
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    return LoadedModel("small", module.eval(), (0.5, 0.4, 0.5), (0.25, 0.25, 0.5), 24, 24)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for Horama is asked for, and the random number and table that it finds."""
    calls: list[dict[str, Any]] = []

    def maco(objective: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> tuple[torch.Tensor, None]:
        table = np.load("spectrum_decorrelated.npy")
        calls.append({**options, "random": float(torch.rand(())), "table": table.shape})
        return torch.zeros(3, options["image_size"], options["image_size"], requires_grad=True), None

    monkeypatch.setitem(sys.modules, "horama", SimpleNamespace(maco=maco))
    return calls


def test_horamas_sides_of_views_are_those_that_are_wanted(benchmark_module: ModuleType) -> None:
    """Horama draws them as ``u * (box[1] - box[0]) + box[1]``."""
    low, high = benchmark_module.box_of(0.6, 1.0)
    assert [u * (high - low) + high for u in (0, 1)] == pytest.approx([0.6, 1.0])


def test_horama_gets_the_range_of_the_networks_colours_and_a_seed_and_leaves_torchs_state(
    benchmark_module: ModuleType, network: LoadedModel, asked: list[dict[str, Any]]
) -> None:
    before = torch.get_rng_state()
    for _ in range(2):
        picture, _ = benchmark_module._horama(network, 1, 32, (0.2, 0.6))
    first, second = asked
    assert first == second and first["table"] == (3, 32, 17)
    assert first["values_range"] == pytest.approx((-2, 2.4)) and first["box_size"] == (0.2, 0.6)
    assert torch.equal(torch.get_rng_state(), before)
    assert [float(channel[0, 0]) for channel in picture] == pytest.approx([0.5, 0.4, 0.5])


def test_the_table_is_written_outside_the_time(
    benchmark_module: ModuleType,
    network: LoadedModel,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    real: Callable[..., torch.Tensor] = benchmark_module.magnitudes

    def slow(*arguments: Any) -> torch.Tensor:
        for _ in range(10):
            time.perf_counter()
        return real(*arguments)

    monkeypatch.setattr(benchmark_module, "magnitudes", slow)
    assert benchmark_module._horama(network, 1, 32, (0.2, 0.6))[1] == 1
