"""`PrunedLayer`, the surviving weights of one layer of a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError
from spade_fast.pruning.layers import Layer


@dataclass(frozen=True)
class PrunedLayer:
    """The surviving weights of one layer.

    Attributes
    ----------
    name, parameter
        Names of the layer and of its parameter in the model.
    shape, dtype
        Shape and dtype of the parameter.
    mask : Tensor ``[ceil(numel / 8)]``, uint8
        One bit per weight, 1 where it survives; the first weight is in the highest bit.
    values : Tensor ``[survivors]``
        Surviving weights in row-major order.

    Raises
    ------
    ValueError
        Mask or values do not match the shape and dtype.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mask: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise InvalidValueError(f"layer {self.name!r} has no weights in shape {list(self.shape)}")
        if self.mask.dtype != torch.uint8 or self.mask.shape != (-(-self.numel // 8),):
            raise InvalidValueError(f"the mask of layer {self.name!r} does not match its shape {list(self.shape)}")
        bits = np.unpackbits(self.mask.numpy())
        count = int(bits.sum())
        if bits[self.numel :].any() or self.values.dtype != self.dtype or self.values.shape != (count,):
            raise InvalidValueError(f"the values of layer {self.name!r} do not match its mask")

    @classmethod
    def from_dense(cls, layer: Layer, weight: Tensor) -> PrunedLayer:
        """Pack a weight of the parameter's shape; its zeros are the removed weights."""
        weight = weight.detach().flatten()
        survives = weight != 0
        mask = torch.from_numpy(np.packbits(survives.cpu().numpy()))
        return cls(layer.name, layer.parameter, layer.shape, weight.dtype, mask, weight[survives].cpu())

    @classmethod
    def from_solution(cls, layer: Layer, solution: Tensor, dtype: torch.dtype) -> PrunedLayer:
        """Pack a weight ``[G, R, C]`` in solver order."""
        return cls.from_dense(layer, layer.restore(solution).to(dtype))

    @property
    def numel(self) -> int:
        """Number of weights, including removed ones."""
        return math.prod(self.shape)

    def survivors(self) -> Tensor:
        """Return a boolean tensor of the parameter's shape, True where the weight survives."""
        bits = np.unpackbits(self.mask.numpy(), count=self.numel)
        return torch.from_numpy(bits).view(torch.bool).reshape(self.shape)

    def dense(self) -> Tensor:
        """Return the pruned weight in the parameter's shape."""
        return torch.zeros(self.shape, dtype=self.dtype).masked_scatter_(self.survivors(), self.values)
