"""Memory of CPU tensors that is kept while a network runs again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spade_fast.ops._native import _C


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Reuse the memory of large CPU tensors during a ``with`` block, instead of returning it to the system.

    The system clears every page that it gives out, which takes longer than many layers need for their outputs. Tensors
    of 128 KiB or more that are made in the block, by any thread, are therefore placed in memory that is kept: in use or
    not, no more than a sixteenth above the most that was in use at a time. What is free is returned at the end; until
    then only tensors can use it.

    Blocks may overlap, in one thread or several, and tensors may outlive them: torch's own allocator, which is replaced
    meanwhile, is put back when neither a block nor such a tensor is left. Another one than torch's own is not replaced.
    """
    _C.begin_keeping_memory()
    try:
        yield
    finally:
        _C.end_keeping_memory()
