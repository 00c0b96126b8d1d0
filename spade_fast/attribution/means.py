"""Means of attributions over several traces of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mean_attributions(results: Sequence[Any]) -> Any:
    """Return the mean of a method's results, each first divided, per sample, by the sum of its absolute values.

    A single result is returned as it is. The tensors of a tuple, attributions of several inputs, are divided by their
    common sum, so that they keep their relative size.

    Parameters
    ----------
    results
        Tensors of equal shape whose first dimension counts samples, tuples of such tensors, or lists of either. The
        tensors of a tuple that differ in this dimension are those of one sample. The mean is at least in float32:
        shares of a sum are too small for half precision.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution.means import mean_attributions
    >>> mean_attributions([torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, -2.0]])])
    tensor([[ 0.3750, -0.3750]])
    """
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, list):
        return [mean_attributions(parts) for parts in zip(*results, strict=True)]
    normalised = [_normalised(result if isinstance(result, tuple) else (result,)) for result in results]
    means = tuple(torch.stack(parts).mean(0) for parts in zip(*normalised, strict=True))
    return means if isinstance(first, tuple) else means[0]


def _normalised(attributions: Sequence[Tensor]) -> list[Tensor]:
    wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in attributions]
    by_sample = len({one.shape[:1] for one in wide}) == 1 and all(one.dim() > 1 for one in wide)
    total = sum((one.abs().flatten(1).sum(1) if by_sample else one.abs().sum() for one in wide), torch.zeros(()))
    totals = [total.view(-1, *(1 for _ in one.shape[1:])) if by_sample else total for one in wide]
    return [torch.where(of_all > 0, one / of_all, one) for one, of_all in zip(wide, totals, strict=True)]
