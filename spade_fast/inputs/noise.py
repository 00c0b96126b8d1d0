"""Calibration data of samples of any shape: noisy and partly masked copies, determined by ``(seed, sample id)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.checks import array, integer, kind, number
from spade_fast._util.draws import add_noise, generator_of
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.inputs.augmenters import (
    AUGMENTATIONS,
    Augmentations,
    Augmenter,
    check_single,
    entries_of,
    in_form_of,
    repeated,
)

# Mean or standard deviation of the data, or of each part of a sample of several tensors.
Statistic = float | Sequence[float] | Tensor | Mapping[Any, Any]


class NoiseAugmenter(Augmenter):
    """Makes noisy copies of one sample of any shape, on which its trace is calibrated: a row of a table, audio, video.

    Each copy is the sample with Gaussian noise on the data's own scale, in which each entry, or block of neighbours, is
    then replaced by the mean with some probability. Copies are drawn independently, and copy `i` depends only on
    ``(seed, sample id, i)``, not on `n`, the batch size, the device or torch's global random state. Noise and mask do
    not change each other's draws.

    Parameters
    ----------
    n : int
        Number of copies.
    mean, std : float, array or Tensor, optional
        Mean and standard deviation of the data. They broadcast to a sample ``[...]``: ``X.mean(0)`` and ``X.std(0)`` of
        the data ``X [N, ...]`` have a number for each of its entries. None for mean and standard deviation of the
        sample's own values, which is right if all of them measure the same thing, as in a recording, and wrong for the
        columns of a table. For a sample of several tensors, a mapping from their names, or positions, to such numbers.
    seed : int
        Any integer.
    batch_size : int, optional
        Copies per batch; None for 8 on a CPU and 64 elsewhere. It affects only memory and speed.
    noise : float
        Standard deviation of the noise, as a share of `std`.
    mask : float
        Probability with which an entry is replaced by `mean`.
    span : int or sequence of (int or None)
        Sizes of the blocks of neighbours that are masked together: a number for each dimension of ``[...]``, None for
        the whole dimension, or one number for all dimensions. ``(None, 1600)`` masks spans of 1600 values in all
        channels of a recording ``[channels, time]``.

    Raises
    ------
    TypeError, ValueError
        A parameter has the wrong type or is out of range.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import NoiseAugmenter
    >>> table = torch.randn(100, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0])
    >>> augmenter = NoiseAugmenter(n=6, mean=table.mean(0), std=table.std(0), batch_size=4)
    >>> [tuple(batch.shape) for batch in augmenter(table[:1], "row 0")]
    [(4, 5), (2, 5)]
    """

    def __init__(
        self,
        n: int = AUGMENTATIONS,
        mean: Statistic | None = None,
        std: Statistic | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        *,
        noise: float = 0.3,
        mask: float = 0.2,
        span: int | Sequence[int | None] = 1,
    ) -> None:
        super().__init__(n, seed, batch_size)
        if (mean is None) != (std is None):
            raise InvalidValueError("mean and std must be given together")
        self.mean, self.std = _statistics("mean", mean), _statistics("std", std)
        if self.std is not None and any(bool((one < 0).any()) for one in self.std.values()):
            raise InvalidValueError("std must be at least 0")
        self.noise = number("noise", noise, 0)
        self.mask = number("mask", mask, 0, 1)
        self.span = _checked_span(span)

    def __call__(self, sample: Any, sample_id: str | int = 0) -> Augmentations[Any]:
        """Return the copies of one sample, which can be iterated any number of times.

        Parameters
        ----------
        sample : Tensor ``[1, ...]``, sequence or mapping of such
            The sample as the network takes it. Floating-point tensors get noise and masks; integers and everything else
            are repeated as they are.
        sample_id : str or int
            Name of the sample. With the seed it determines all random numbers; ``0`` and ``"0"`` are the same sample.

        Returns
        -------
        iterable of Tensor ``[N, ...]``, tuple or dict
            Batches in the form of the sample, with its dtypes and devices; `len` is their number.

        Raises
        ------
        TypeError
            `sample` has no floating-point tensor.
        ValueError
            A tensor holds several samples, is empty, or has NaN or infinite values; `mean`, `std` or `span` do not fit
            it; without `std`, its values are all the same.
        """
        return _NoisyCopies(self, sample, str(sample_id))

    def __repr__(self) -> str:
        return f"NoiseAugmenter(n={self.n}, seed={self.seed}, noise={self.noise:g}, mask={self.mask:g})"


class _NoisyCopies(Augmentations[Any]):
    def __init__(self, augmenter: NoiseAugmenter, sample: Any, sample_id: str) -> None:
        self._entries = entries_of(sample)
        floats = {key: one for key, one in self._entries.items() if isinstance(one, Tensor) and one.is_floating_point()}
        if not floats:
            given = ", ".join(kind(one) for one in self._entries.values()) or "nothing"
            raise InvalidTypeError(
                f"NoiseAugmenter needs a sample with a floating-point tensor, got {given}; TokenAugmenter takes the "
                "token ids of text"
            )
        super().__init__(augmenter.divide(range(augmenter.n), next(iter(floats.values())).device))
        self._augmenter, self._sample, self._id = augmenter, sample, sample_id
        self._parts = {key: _Part(augmenter, key, tensor.detach()) for key, tensor in floats.items()}

    def _batch(self, indices: Sequence[int]) -> Any:
        made = {
            key: self._noisy(key, self._parts[key], indices)
            if key in self._parts
            else repeated(_name(key), value, len(indices))
            for key, value in self._entries.items()
        }
        return in_form_of(self._sample, made)

    def _noisy(self, key: Any, part: _Part, indices: Sequence[int]) -> Tensor:
        options = self._augmenter
        within = "" if key is None else f"{key}/"
        names = [f"{options.seed}/{index}/{within}{self._id}" for index in indices]
        copies = repeated(_name(key), part.tensor, len(indices))
        if options.noise:
            copies = add_noise(copies, options.noise * part.std, [f"noise/{name}" for name in names], copies.dtype)
        if options.mask:
            shape = part.tensor.shape[1:]
            masks = [_blocks(shape, part.span, options.mask, generator_of(f"mask/{name}")) for name in names]
            copies = torch.where(torch.stack(masks).to(copies.device), part.mean.to(copies.dtype), copies)
        return copies


class _Part:
    """A floating-point tensor ``[1, ...]`` of a sample, with the mean and standard deviation ``[...]`` of its data."""

    def __init__(self, augmenter: NoiseAugmenter, key: Any, tensor: Tensor) -> None:
        name = _name(key)
        check_single(name, tensor)
        values = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not bool(torch.isfinite(values).all()):
            raise InvalidValueError(f"{name} has NaN or infinite values")
        self.tensor = tensor
        if augmenter.mean is None or augmenter.std is None:
            self.mean, self.std = values.mean(), values.std(correction=0)
            if augmenter.noise and not float(self.std):
                raise InvalidValueError(
                    f"all values of {name} are the same, so that they do not tell the scale of the noise: give the "
                    "data's mean and std"
                )
        else:
            self.mean = _fitted("mean", augmenter.mean, key, values)
            self.std = _fitted("std", augmenter.std, key, values)
        dimensions = tensor.dim() - 1
        self.span = (augmenter.span,) * dimensions if isinstance(augmenter.span, int) else augmenter.span
        if len(self.span) != dimensions:
            raise InvalidValueError(
                f"span must be one number, or one for each dimension of a sample {list(tensor.shape[1:])}, got "
                f"{augmenter.span}"
            )


def _blocks(shape: Sequence[int], span: Sequence[int | None], share: float, generator: torch.Generator) -> Tensor:
    """Return which entries are masked: blocks of a grid that begins at a random place, each with a probability."""
    draws = torch.rand(len(shape), generator=generator, dtype=torch.float64).tolist()
    sizes = [size if one is None else one for size, one in zip(shape, span, strict=True)]
    shifts = [0 if one is None else int(draw * one) for draw, one in zip(draws, span, strict=True)]
    counts = [1 if one is None else (size + one - 2) // one + 1 for size, one in zip(shape, span, strict=True)]
    masked = torch.rand(counts, generator=generator, dtype=torch.float64) < share
    for dimension, (length, size, shift) in enumerate(zip(shape, sizes, shifts, strict=True)):
        masked = masked.index_select(dimension, (torch.arange(length) + shift) // size)
    return masked


def _checked_span(span: Any) -> int | tuple[int | None, ...]:
    if isinstance(span, (list, tuple)):
        return tuple(None if one is None else integer("span", one, 1) for one in span)
    return integer("span", span, 1)


def _statistics(name: str, given: Statistic | None) -> dict[Any, Tensor] | None:
    """Return numbers as tensors by part of the sample (None for a single tensor); TypeError or ValueError if unfit."""
    if given is None:
        return None
    found = {}
    for key, value in (given if isinstance(given, Mapping) else {None: given}).items():
        try:
            found[key] = torch.as_tensor(array(value), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InvalidTypeError(f"{name} must be numbers, got {value!r}") from error
        if not bool(torch.isfinite(found[key]).all()):
            raise InvalidValueError(f"{name} has NaN or infinite values")
    return found


def _fitted(name: str, statistics: Mapping[Any, Tensor], key: Any, values: Tensor) -> Tensor:
    """Return the statistic of one part of a sample, like its values; ValueError if it has none or does not fit."""
    if key not in statistics:
        raise InvalidValueError(
            f"{name} must be numbers for a sample of one tensor, and otherwise a mapping that has {_name(key)}"
        )
    try:
        return statistics[key].to(values).broadcast_to(values.shape[1:])
    except RuntimeError as error:
        given, shape = list(statistics[key].shape), list(values.shape[1:])
        raise InvalidValueError(f"{name} {given} does not broadcast to a sample {shape}") from error


def _name(key: Any) -> str:
    return "the sample" if key is None else f"{key!r} of the sample"
