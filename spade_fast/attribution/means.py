"""Means of attributions over several traces of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mean_attributions(results: Sequence[Any]) -> Any:
    """Return the mean of a method's results, each first divided, per sample, by the sum of its absolute values.

    A single result is returned as it is.

    Parameters
    ----------
    results
        Tensors of equal shape whose first dimension counts samples, or tuples or lists of such tensors. The mean is at
        least in float32: shares of a sum are too small for half precision.

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
    if isinstance(first, (tuple, list)):
        return type(first)(mean_attributions(parts) for parts in zip(*results, strict=True))
    return torch.stack([_normalised(result) for result in results]).mean(0)


def _normalised(attributions: Tensor) -> Tensor:
    wide = attributions.to(torch.promote_types(attributions.dtype, torch.float32))
    dimensions = tuple(range(1, wide.dim()))
    total = wide.abs().sum(dimensions, keepdim=True) if dimensions else wide.abs().sum()
    return torch.where(total > 0, wide / total, wide)
