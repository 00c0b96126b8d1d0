"""Confidence intervals of mean scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spade_fast._util.checks import array, integer, is_number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError


def bootstrap_interval(
    values: Tensor | np.ndarray | Sequence[float],
    groups: Tensor | np.ndarray | Sequence[str | int] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean (Efron, Tibshirani, An Introduction to the Bootstrap, 1993).

    Values that share a source, such as the scores of several patches on one photo, are not independent. Whole groups
    are therefore resampled with replacement, and each resample gives the mean of all its values.

    Parameters
    ----------
    values : Tensor, ndarray or sequence ``[N]``
        Finite or NaN; NaNs are ignored.
    groups : Tensor, ndarray or sequence ``[N]``, optional
        Name or number of each value's group; None if each value is its own group. With a single group the interval has
        zero width.
    level : float
        Share of the resampled means inside the interval, between 0 and 1.
    resamples : int
        Number of resamples.
    seed : int
        Seed of the resampling, at least 0.

    Returns
    -------
    tuple of float
        Lower and upper end of the interval.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape or is out of range; values are infinite, or all are NaN.

    Examples
    --------
    >>> from spade_fast.attribution import metrics
    >>> low, high = metrics.bootstrap_interval([0.7, 0.8, 0.9, 0.6], groups=["a", "a", "b", "c"])
    >>> low <= 0.75 <= high
    True
    """
    resamples, seed = integer("resamples", resamples, 1), integer("seed", seed, 0)
    if not is_number(level):
        raise InvalidTypeError(f"level must be a number between 0 and 1, got {level!r}")
    if not 0 < level < 1:
        raise InvalidValueError(f"level must lie between 0 and 1, got {level}")
    numbers = array(values)
    if numbers.dtype.kind not in "biuf":
        raise InvalidTypeError(f"values must be numbers, got {numbers.dtype}")
    names = np.arange(numbers.size) if groups is None else array(groups)
    if numbers.ndim != 1 or names.shape != numbers.shape:
        raise InvalidValueError(
            f"values and groups must have shape [n], got {list(numbers.shape)} and {list(names.shape)}"
        )
    if np.isinf(numbers).any():
        raise InvalidValueError("values has infinite values")
    known = ~np.isnan(numbers)
    if not known.any():
        raise InvalidValueError("values has nothing but NaN: their mean is undefined")
    _, group = np.unique(names[known], return_inverse=True)
    counts, sums = np.bincount(group), np.bincount(group, numbers[known])
    times = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    low, high = np.quantile((times @ sums) / (times @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
