"""Fixtures shared by the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spade_fast import ops

SMALL_NETWORK = """
import torch
from spade_fast.models import LoadedModel

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(12, 12, 3, padding=1, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 4),
    )

def loaded():
    return LoadedModel("small", network(), (0.5,) * 3, (0.25,) * 3, 20, 16, class_names=("ant", "bee", "cat", "dog"))

def maps():
    return LoadedModel("maps", torch.nn.Conv2d(3, 4, 3), resize=20, crop=16)

number = 3
def text():
    return "network"
"""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ops.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per instruction set of this processor."""
    before = ops.simd_level()
    ops.set_simd_level(request.param)
    yield request.param
    ops.set_simd_level(before)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo of noise, 40 x 30."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a small network of two convolutions and a linear layer."""
    (tmp_path / "small_network.py").write_text(SMALL_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "small_network", raising=False)
    return "small_network:loaded"
