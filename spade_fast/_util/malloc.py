"""The heap of a command or batch worker; the library does not change that of its users."""

from __future__ import annotations

import ctypes

# mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of returning it to the system; does nothing without glibc.

    glibc asks the system for each large block, and the system clears it page by page. Outputs of the first layers of a
    network are such blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
