"""Divides samples and layers into parts whose Gram matrices, held at the same time, stay within a memory limit."""

from __future__ import annotations

from collections.abc import Mapping

from spade_fast._util.errors import MemoryLimitError


def samples_per_solve(sizes: Mapping[str, int], limit: int | None, samples: int) -> int:
    """Return how many samples can be solved together, so that the largest layer's Gram matrices fit into `limit` bytes.

    Parameters
    ----------
    sizes
        Size of each layer's Gram matrices for one sample, in bytes.

    Raises
    ------
    MemoryLimitError
        A single layer of a single sample does not fit.
    """
    if limit is None or not sizes:
        return samples
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] > limit:
        raise MemoryLimitError(
            f"layer {largest!r} needs {sizes[largest]} bytes for its Gram matrices, "
            f"more than the memory_limit of {limit} bytes"
        )
    return min(samples, limit // sizes[largest])


def group_by_memory(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Divide layers into few groups of at most `limit` bytes each, by first fit in order of decreasing size."""
    if limit is None:
        return [list(sizes)] if sizes else []
    groups: list[list[str]] = []
    room: list[int] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        index = next((i for i, free in enumerate(room) if free >= sizes[name]), None)
        if index is None:
            index = len(groups)
            groups.append([])
            room.append(limit)
        groups[index].append(name)
        room[index] -= sizes[name]
    return groups
