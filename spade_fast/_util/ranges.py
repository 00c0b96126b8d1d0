"""Stages of the computation, as named ranges for torch's profiler and, through NVTX, for NVIDIA's tools.

The ranges of the native ops (gram, factor, path, solution and sweep) are opened in C++ with the same prefix. The
inverse that exact OBS needs is computed as the Gram matrix of its factor, so it counts as gram. `torch.profiler` shows
the ranges directly; ``SPADE_FAST_NVTX=1`` turns them into NVTX ranges.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch.profiler import record_function

PREFIX = "spade_fast."
STAGES = ("augment", "forward", "gram", "factor", "path", "solution", "sweep", "search", "apply", "attribute")
NVTX_VARIABLE = "SPADE_FAST_NVTX"


def stage(name: str) -> record_function:
    """Return a context manager that marks one of `STAGES`; a stage inside another one interrupts it."""
    return record_function(PREFIX + name)


def nvtx_asked_for() -> bool:
    """Whether the environment asks for NVTX ranges."""
    return os.environ.get(NVTX_VARIABLE, "0") == "1"


def emit_nvtx_if_asked_for() -> None:
    """Emit NVTX ranges for all ranges and ops of this thread from now on, if the environment asks for it.

    Warns
    -----
    UserWarning
        torch finds no CUDA device, without which NVTX is not available.

    Notes
    -----
    Uses ``torch.autograd.profiler.emit_nvtx``, which applies to the current thread. Not tested on a GPU.
    """
    if not nvtx_asked_for():
        return
    if torch.cuda.is_available():
        torch.autograd.profiler.emit_nvtx().__enter__()
    else:
        found = "was built without CUDA" if torch.version.cuda is None else "finds none"
        warnings.warn(f"{NVTX_VARIABLE}=1 is ignored: NVTX ranges need a CUDA device, and torch {found}", stacklevel=2)
