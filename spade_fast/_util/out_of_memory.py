"""Recognises the errors with which torch, Python and the system say that memory has run out."""

from __future__ import annotations

import errno

import torch

_MESSAGES = (
    "alloc_failed",
    "bad_alloc",
    "can't allocate memory",
    "defaultcpuallocator",
    "not enough memory",
    "out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so for a CPU only in the message of a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MESSAGES)
