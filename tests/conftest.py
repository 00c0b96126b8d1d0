"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BACKENDS, DEVICES, running_on

from spade_fast.ops import _native

SMALL_NETWORK = """
import torch
from spade_fast.inputs.networks import LoadedModel
from spade_fast.targets import class_against

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(12, 12, 3, padding=1, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 4),
    )

def loaded():
    return LoadedModel("small", network(), (0.5,) * 3, (0.25,) * 3, 20, 16, class_names=("ant", "bee", "cat", "dog"))

def sure():
    without = loaded()
    without.module[6].bias.data[0] = -1e3
    return without

def maps():
    return LoadedModel("maps", torch.nn.Conv2d(3, 4, 3), resize=20, crop=16)

def norm():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16), torch.nn.GroupNorm(2, 4), torch.nn.Flatten())
    return LoadedModel("norm", module, resize=20, crop=16)

def margin(logits):
    return logits[:, 3] - logits[:, 0]

rather = class_against(3, 0)

number = 3
def text():
    return "network"
"""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of a file to one worker, and those of the emulator, which has to be compiled, to one."""
    for item in items:
        group = "emulated" if item.get_closest_marker("emulated") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none, or fail them if SPADE_FAST_REQUIRE_CUDA=1."""
    if item.get_closest_marker("cuda") is None:
        return
    missing = None
    if not torch.cuda.is_available():
        missing = "torch finds no GPU"
    elif _native._C.build_info()["cuda"] is None:
        missing = "spade_fast was built without CUDA kernels"
    if missing and os.environ.get("SPADE_FAST_REQUIRE_CUDA") == "1":
        pytest.fail(f"SPADE_FAST_REQUIRE_CUDA=1, but {missing}", pytrace=False)
    elif missing:
        pytest.skip(missing)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of ops on each instruction set of this processor, on emulated CUDA kernels and on a GPU."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of what no instruction set changes on this processor, on emulated CUDA kernels and on a GPU."""
    with running_on(request.param):
        yield request.param


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    deadline = time.monotonic() + 10  # processes that were told to end may still be at it
    while subprocess.run(["umount", disk], capture_output=True).returncode:
        assert time.monotonic() < deadline, "files of the file system are still open"
        time.sleep(0.1)
