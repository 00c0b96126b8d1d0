"""Where a test of the ops runs: an instruction set of the CPU, CUDA kernels emulated, or CUDA kernels on a GPU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from simt import emulator
from torch import Tensor
from torch.utils import _pytree

from spade_fast import ops
from spade_fast.ops import functions

LEVELS = [pytest.param(level) for level in ops.simd_levels()]
CUDA = [pytest.param("emulated", marks=pytest.mark.emulated)]
if torch.cuda.is_available() or os.environ.get("SPADE_FAST_REQUIRE_CUDA") == "1":
    CUDA.append(pytest.param("cuda", marks=pytest.mark.cuda))
BACKENDS = [*LEVELS, *CUDA]
DEVICES = [LEVELS[-1], *CUDA]


def in_turns(**axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrise a test with all combinations of the values, each on one backend: along every axis they take turns.

    What falls to the emulated kernels also runs on a GPU.
    """
    turns = [*([level] for level in LEVELS), CUDA]
    cases = []
    for places in itertools.product(*(range(len(values)) for values in axes.values())):
        values = [list(values)[place] for values, place in zip(axes.values(), places, strict=True)]
        for backend in turns[sum(places) % len(turns)]:
            cases.append(pytest.param(*values, *backend.values, marks=backend.marks))
    return pytest.mark.parametrize((*axes, "backend"), cases, indirect=["backend"])


def examples(count: int, backend: str) -> settings:
    """Hypothesis settings for so many examples, or a quarter of them on the emulator, which takes its time."""
    return settings(max_examples=count // 4 if backend == "emulated" else count, deadline=None)


class _OnGpu:
    """The attributes of torch.ops.spade_fast for tensors on the CPU, computed on a GPU."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.spade_fast, name)

        def call(*arguments: Any) -> Any:
            moved = _pytree.tree_map_only(Tensor, lambda tensor: tensor.cuda(), arguments)
            results = op(*moved)
            if name.endswith("_"):
                arguments[0].copy_(moved[0])
            return _pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), results)

        return call


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Let `spade_fast.ops` compute there, also for tensors on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "emulated":
            patch.setattr(functions, "_ops", emulator.ops)
            yield
        elif backend == "cuda":
            patch.setattr(functions, "_ops", _OnGpu())
            yield
        else:
            patch.setattr(functions, "_ops", torch.ops.spade_fast)
            before = ops.simd_level()
            ops.set_simd_level(backend)
            try:
                yield
            finally:
                ops.set_simd_level(before)
