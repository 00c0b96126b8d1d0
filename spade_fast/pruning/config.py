"""Checks and meanings of the settings of a trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from spade_fast.pruning.layers import match_names

Sparsity = float | Mapping[str, float] | Callable[[str], float]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def images_a_batch(device: torch.device) -> int:
    """Return how many images to run at once where nothing is said.

    On a CPU few: caches then hold what lies between two layers, and its memory is used again instead of returned.
    """
    return 8 if device.type == "cpu" else 64


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes given as such or as a string such as ``"2GB"``, ``"1.5 GiB"`` or ``"500M"``.

    Raises
    ------
    TypeError, ValueError
        Something else, or not above 0.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", size.lower())
        if match is None:
            raise ValueError(f"memory_limit must be a number of bytes or a string such as '2GB', got {size!r}")
        size = int(float(match[1]) * _UNITS[match[2] or ""])
    elif isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"memory_limit must be a number of bytes or a string such as '2GB', got {size!r}")
    if size <= 0:
        raise ValueError(f"memory_limit must be above 0 bytes, got {size}")
    return size


def sparsity_by_layer(sparsity: Sparsity, names: Sequence[str], every: Sequence[str]) -> dict[str, float]:
    """Return the share of weights to remove from each of the layers `names`.

    Parameters
    ----------
    sparsity
        A number, a mapping of layer names or patterns (the first that matches counts, no match means 0), or a function
        of the layer name.
    names
        Layers to be pruned.
    every
        All layers of the model. A pattern must match one of them.

    Raises
    ------
    TypeError, ValueError
        A share that is not a number, or not between 0 and 1.
    UnknownLayerError
        A name or pattern that matches no layer.
    """
    if isinstance(sparsity, Mapping):
        shares = list(sparsity.values())
        first = match_names(list(sparsity), every)
        given = {name: shares[first[name]] if name in first else 0.0 for name in names}
        check_shares({f"sparsity[{pattern!r}]": share for pattern, share in sparsity.items()})
    elif callable(sparsity):
        given = {name: sparsity(name) for name in names}
        check_shares({f"sparsity({name!r})": share for name, share in given.items()})
    else:
        check_shares({"sparsity": sparsity})
        given = dict.fromkeys(names, sparsity)
    return {name: float(share) for name, share in given.items()}


def check_shares(shares: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for a share that is no number between 0 and 1; the key says what it is."""
    for what, share in shares.items():
        if not is_number(share):
            raise TypeError(f"{what} must be a number between 0 and 1, got {share!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"{what} must lie between 0 and 1, got {share!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a real number (and no bool)."""
    return not isinstance(value, bool) and isinstance(value, Real)


def samples_together(sizes: Mapping[str, int], limit: int | None, samples: int) -> int:
    """Return how many samples can be treated together: the largest layer's Gram matrices must fit into `limit` bytes.

    Parameters
    ----------
    sizes
        Bytes of each layer's Gram matrices for one sample.

    Raises
    ------
    MemoryError
        One layer of one sample does not fit.
    """
    if limit is None or not sizes:
        return samples
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] > limit:
        raise MemoryError(
            f"layer {largest!r} needs {sizes[largest]} bytes for its Gram matrices, "
            f"more than the memory_limit of {limit} bytes"
        )
    return min(samples, limit // sizes[largest])


def group_by_memory(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Divide layers into few groups of at most `limit` bytes each: first fit, largest layers first."""
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
