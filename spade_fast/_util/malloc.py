"""How the heap of a process of ours behaves; the library leaves that of its users alone."""

from __future__ import annotations

import ctypes

# mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of returning it to the system; does nothing without glibc.

    glibc asks the system anew for each large block, and the system clears it page by page. Outputs of the first layers
    of a network are such blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
