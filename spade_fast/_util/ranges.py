"""Stages of the work, as named ranges that torch's profiler and NVIDIA's tools show.

The native ops have theirs in C++, with the same prefix: gram, factor, path, solution and sweep. The inverse that exact
OBS needs is a Gram matrix too, that of its factor. `torch.profiler` shows ranges as they are; ``SPADE_FAST_NVTX=1``
makes NVTX ranges of them.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch.profiler import record_function

PREFIX = "spade_fast."
STAGES = ("augment", "forward", "gram", "factor", "path", "solution", "sweep", "apply", "attribute")
NVTX_VARIABLE = "SPADE_FAST_NVTX"


def stage(name: str) -> record_function:
    """Return a ``with`` block's range for one of `STAGES`; a stage inside another interrupts it."""
    return record_function(PREFIX + name)


def nvtx_asked_for() -> bool:
    """Whether the environment asks for NVTX ranges."""
    return os.environ.get(NVTX_VARIABLE, "0") == "1"


def emit_nvtx_if_asked_for() -> None:
    """Make NVTX ranges of all ranges and ops of this thread, from now on, if the environment asks for it.

    Warns
    -----
    UserWarning
        torch finds no CUDA device, without which it has no NVTX.

    Notes
    -----
    By ``torch.autograd.profiler.emit_nvtx``, which works by thread. This was not run on a GPU.
    """
    if not nvtx_asked_for():
        return
    if torch.cuda.is_available():
        torch.autograd.profiler.emit_nvtx().__enter__()
    else:
        found = "is a CPU build" if torch.version.cuda is None else "finds none"
        warnings.warn(f"{NVTX_VARIABLE}=1 is ignored: NVTX ranges need a CUDA device, and torch {found}", stacklevel=2)
