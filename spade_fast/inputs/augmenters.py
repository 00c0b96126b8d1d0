"""What all augmenters share: number, seed and batch size, the batches that they stream, and the forms of a sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidValueError
from spade_fast.pruning.calibration import Batch, images_per_batch

# Of augmentations of images 8, 16 and 64 localise equally well within the noise (docs/evidence.md).
AUGMENTATIONS = 64

B = TypeVar("B", bound=Batch, covariant=True)


class Augmenter:
    """Number of augmentations of a sample, seed and batch size.

    Augmentation `i` of a sample depends only on ``(seed, sample id, i)``, not on `n`, the batch size, the device or
    torch's global random state.
    """

    def __init__(self, n: int, seed: int, batch_size: int | None) -> None:
        self.n = integer("n", n, 1)
        self.seed = integer("seed", seed)
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)

    def divide(self, indices: Sequence[int], device: torch.device) -> list[Sequence[int]]:
        """Divide augmentations among batches."""
        step = self.batch_size or images_per_batch(device)
        return [indices[start : start + step] for start in range(0, len(indices), step)]


class Augmentations(ABC, Generic[B]):
    """The augmentations of one sample in batches: every iteration makes the same ones again."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[B]:
        return (self._batch(indices) for indices in self._batches)

    @abstractmethod
    def _batch(self, indices: Sequence[int]) -> B:
        """Make the augmentations of these indices."""


def entries_of(sample: Any) -> dict[Any, Any]:
    """Return the parts of a sample by name, by position in a sequence, or a single part under None."""
    if isinstance(sample, Mapping):
        return dict(sample)
    return dict(enumerate(sample)) if isinstance(sample, (list, tuple)) else {None: sample}


def in_form_of(sample: Any, entries: Mapping[Any, Any]) -> Any:
    """Return parts in the form of the sample from which `entries_of` took them."""
    if isinstance(sample, Mapping):
        return dict(entries)
    return tuple(entries.values()) if isinstance(sample, (list, tuple)) else entries[None]


def repeated(name: str, value: Any, count: int) -> Any:
    """Return a part of a sample with each tensor ``[1, ...]`` in it `count` times ``[N, ...]``, otherwise unchanged."""

    def copies(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        check_single(name, one)
        return one.expand(count, *one.shape[1:]).contiguous()

    return tree_map(copies, value)


def check_single(name: str, value: Tensor) -> None:
    """Raise ValueError unless a tensor holds one sample, ``[1, ...]``, and is not empty."""
    if value.dim() == 0 or len(value) != 1 or value.numel() == 0:
        raise InvalidValueError(f"{name} must be one sample [1, ...] and not be empty, got {list(value.shape)}")
