"""A small network for workers in other processes, whose solver waits, tells and counts where a test asks for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from spade_fast.inputs.networks import LoadedModel
from spade_fast.ops._native import _C
from spade_fast.pruning import ladders

FOLDER = "SPADE_FAST_TEST_FOLDER"
_solve_sparsities = ladders.solve_sparsities
_broken: list[bool] = []


def loaded() -> LoadedModel:
    """A convolution and a linear layer.

    Solving waits while there is a file ``gate``, and notes who waits. The process that finds a file ``broken`` takes it
    away and fails from then on. There is a file ``kept`` if a process solved while it kept freed memory.
    """
    ladders.solve_sparsities = _watched
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(12, 12, 3, padding=1, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 4),
    )  # fmt: skip
    return LoadedModel("small", module, (0.5,) * 3, (0.25,) * 3, 20, 16)


def _watched(*arguments: Any, **options: Any) -> Any:
    folder = Path(os.environ[FOLDER])
    if (folder / "broken").exists() or _broken:
        (folder / "broken").unlink(missing_ok=True)
        _broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if options["layer"].name == "2":  # once for each sample
        with (folder / "solved").open("a") as file:
            file.write(f"{len(options['hessians'])}\n")
    if _C.kept_memory()[0]:
        (folder / "kept").touch()
    if (folder / "gate").exists():
        (folder / f"waiting-{os.getpid()}").touch()
        while (folder / "gate").exists():
            time.sleep(0.01)
    return _solve_sparsities(*arguments, **options)


class Deadly:
    """Images, one of which kills the process that loads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))


def loaded_onto_a_lost_device() -> LoadedModel:
    """The same network; but the first worker that finds a file ``broken`` takes it away and fails."""
    broken = Path(os.environ[FOLDER]) / "broken"
    if multiprocessing.parent_process() is not None:
        with suppress(FileNotFoundError):
            broken.unlink()
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
    return loaded()


def loaded_by_one_process() -> LoadedModel:
    """The same network; but all workers fail except the first, for whom the third that fails opens the gate."""
    folder = Path(os.environ[FOLDER])
    if multiprocessing.parent_process() is not None:
        try:
            (folder / "chosen").touch(exist_ok=False)
        except FileExistsError:
            with (folder / "failed").open("a") as file:
                file.write("x")
            if (folder / "failed").stat().st_size == 3:
                (folder / "gate").unlink()
            raise RuntimeError("CUDA error: no CUDA-capable device is detected") from None
    return loaded()


def ends() -> LoadedModel:
    """Ends the process, unless it is the one that began the run."""
    if os.environ.get(FOLDER) != str(os.getpid()):
        os._exit(7)
    return loaded()
