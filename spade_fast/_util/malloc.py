"""Heap settings for the commands and batch workers; the library never changes the heap of a user's process."""

from __future__ import annotations

import ctypes

# mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Make this process reuse freed memory instead of returning it to the system; without glibc, do nothing.

    By default glibc requests each large block from the system, which zeroes it page by page. The outputs of a network's
    first layers are such blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
