"""A layer of the published solver classes as a weight matrix, and the running Hessian of its inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from spade_fast import ops


class LayerMatrix:
    """Weight matrix and input geometry of a linear or convolutional layer.

    Rows are outputs. Columns are in *natural* order, which is that of the flattened weight: (in-channel, kh, kw). In
    shapes, G stands for `groups`, C for `columns`, and R for the rows of one group: ``rows = G * R``.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d, nn.Conv2d or transformers' Conv1D
        transformers' Conv1D is recognised by its class name and its two-dimensional ``[in, out]`` weight.

    Attributes
    ----------
    groups : int
        Groups of a convolution, otherwise 1. Each group has its own Hessian.
    rows, columns : int
        Number of outputs, and number of inputs per output: ``in-channels / groups * kh * kw``.
    channels, taps : int
        ``columns = channels * taps``.

    Raises
    ------
    TypeError
        The layer is of another kind.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight = getattr(layer, "weight", None)
        self.is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
        self.is_transposed = type(layer).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2
        if not (self.is_convolution or self.is_transposed or isinstance(layer, nn.Linear)):
            raise TypeError(f"layer must be Linear, Conv1d, Conv2d or transformers' Conv1D, got {type(layer).__name__}")
        self.layer = layer
        self.groups = layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1
        shape = self.weight.shape
        self.rows = shape[1] if self.is_transposed else shape[0]
        self.columns = math.prod(shape) // self.rows
        self.channels = shape[1] if self.is_convolution else self.columns
        self.taps = self.columns // self.channels

    def __str__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{type(self.layer).__name__} layer with weight {tuple(self.weight.shape)}{groups}"

    @property
    def weight(self) -> Tensor:
        """The layer's weight, detached."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight.detach()

    def read(self) -> Tensor:
        """Copy the weight to ``[G, R, C]``, in float32 or float64.

        Raises
        ------
        ValueError
            The weight has NaN or infinite values.
        """
        weight = self.weight
        if not bool(weight.isfinite().all()):
            raise ValueError(f"NaN or infinite weights in {self}")
        matrix = weight.t() if self.is_transposed else weight
        matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        return matrix.reshape(self.groups, self.rows // self.groups, self.columns)

    def write(self, matrix: Tensor, layer: nn.Module | None = None) -> None:
        """Write a matrix ``[G * R, C]`` to the layer's weight, or to that of another layer of the same shape.

        The weight gets new storage, as in the published code, so that references to the old weight keep their values.
        """
        target: Tensor = (layer or self.layer).weight  # type: ignore[assignment]
        if self.is_transposed:
            matrix = matrix.t()
        target.data = matrix.reshape(target.shape).to(target.device, target.dtype).contiguous()

    def tap_major(self, matrix: Tensor) -> Tensor:
        """Reorder the last dimension from natural to (kh, kw, in-channel) order."""
        return _swap(matrix, self.channels, self.taps)

    def natural(self, matrix: Tensor) -> Tensor:
        """Reorder the last dimension from (kh, kw, in-channel) to natural order."""
        return _swap(matrix, self.taps, self.channels)

    def accumulate(self, hessian: Tensor, inp: Tensor, seen: int, images: int, keep: Tensor | None = None) -> None:
        """Update the running mean ``H = 2/n Σ x xᵀ`` with one batch, in place.

        The products of the batch are summed in float32 (float64 for float64 inputs); the mean has the Hessian's dtype.

        Parameters
        ----------
        hessian : Tensor ``[C, C]`` or ``[G, C, C]``
            In natural order.
        inp : Tensor
            ``[..., in]`` for a linear layer, ``[N, C, L]`` or ``[N, C, H, W]`` for a convolution.
        seen, images : int
            ``n`` before this batch, and the number that the batch adds to it.
        keep : Tensor, optional
            Linear layers only: which input vectors to use, one element per vector.

        Raises
        ------
        TypeError, ValueError
            The dtype, shape or device is wrong, the batch is empty, or it has NaN or infinite values. The Hessian is
            then unchanged.
        """
        x = self._checked(inp)
        gram = torch.zeros(self.groups, self.columns, self.columns, dtype=x.dtype, device=x.device)
        if self.is_convolution:
            kernel, stride, dilation = self._geometry()
            x, padding = self._padded(x)
            ops.gram_conv2d_(gram[None], x, kernel, stride, padding, dilation)
        else:
            ops.gram_linear_(gram, self._vectors(x, keep)[None])
        if not bool(gram.diagonal(dim1=1, dim2=2).isfinite().all()):
            raise ValueError(f"NaN, infinite or overflowing values in the input of {self}")
        ops.mirror_upper_(gram)
        gram = gram.unflatten(2, (self.taps, self.channels)).unflatten(1, (self.taps, self.channels))
        target = hessian.reshape(self.groups, self.columns, self.columns)
        target = target.unflatten(2, (self.channels, self.taps)).unflatten(1, (self.channels, self.taps))
        target *= seen / (seen + images)
        for tap in range(self.taps):  # one strided copy of all taps at once is ten times slower
            target[:, :, tap].add_(gram[:, tap].transpose(2, 3), alpha=2 / (seen + images))

    def outer(self, inp: Tensor, out: Tensor, keep: Tensor | None = None) -> Tensor:
        """Sum the products of inputs and outputs, ``Σ x yᵀ``, to ``[G, C, R]`` in natural order.

        Raises
        ------
        TypeError, ValueError
            As for :meth:`accumulate`, or the shape of the outputs does not match that of the inputs.
        """
        x = self._checked(inp)
        y = out.detach().to(x)
        if not self.is_convolution:
            x, y = self._vectors(x, keep), self._vectors(y, keep)
            if y.shape != (x.shape[0], self.rows):
                raise ValueError(f"outputs {tuple(out.shape)} do not match inputs {tuple(inp.shape)} of {self}")
            return (x.t() @ y)[None]
        kernel, stride, dilation = self._geometry()
        y = y.unsqueeze(2) if y.dim() == 3 else y
        # Σ x yᵀ over positions is the sum that a convolution's weight gradient computes.
        shape = (self.rows, self.channels, *kernel)
        x, padding = self._padded(x)
        product = conv2d_weight(x, shape, y, stride, padding, dilation, self.groups)
        return product.reshape(self.groups, -1, self.columns).mT

    def _checked(self, inp: Tensor) -> Tensor:
        if not isinstance(inp, Tensor) or not inp.is_floating_point():
            raise TypeError(f"inputs must be a floating-point tensor, got {getattr(inp, 'dtype', type(inp).__name__)}")
        if inp.device != self.weight.device:
            raise ValueError(f"inputs are on {inp.device}, the weight on {self.weight.device}")
        wanted, fits = f"[..., {self.columns}]", inp.dim() >= 2 and inp.shape[-1] == self.columns
        if self.is_convolution:
            width = self.channels * self.groups
            wanted = f"[N, {width}, {'L' if self.weight.dim() == 3 else 'H, W'}]"
            fits = inp.dim() == self.weight.dim() and inp.shape[1] == width
        if not fits or inp.numel() == 0:
            raise ValueError(f"inputs of {self} must be a non-empty {wanted}, got {tuple(inp.shape)}")
        return inp.detach().to(torch.promote_types(inp.dtype, torch.float32))

    @staticmethod
    def _vectors(x: Tensor, keep: Tensor | None) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        if keep is not None:
            if keep.numel() != x.shape[0]:
                raise ValueError(f"the mask {tuple(keep.shape)} must have one element for each of {x.shape[0]} vectors")
            x = x[keep.reshape(-1).to(x.device).bool()]
        return x.contiguous()

    def _geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Return kernel size, stride and dilation in two dimensions; a Conv1d is a convolution of height 1."""
        layer: nn.Conv2d = self.layer  # type: ignore[assignment]
        kernel, stride, dilation = ((1,) * (2 - len(t)) + t for t in (layer.kernel_size, layer.stride, layer.dilation))
        return kernel, stride, dilation  # type: ignore[return-value]

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the input in four dimensions, padded as the layer pads it, and the zero padding left to the op."""
        layer: nn.Conv2d = self.layer  # type: ignore[assignment]
        if layer.padding == "same":
            totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            amounts = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
            sides = [(amount, amount) for amount in amounts]
        padding = (0, 0)
        if layer.padding_mode == "zeros" and all(before == after for before, after in sides):
            padding = (sides[0][0] if len(sides) == 2 else 0, sides[-1][0])
        else:
            flat = [amount for side in reversed(sides) for amount in side]
            x = F.pad(x, flat, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        return (x.unsqueeze(2) if x.dim() == 3 else x), padding


def _swap(matrix: Tensor, outer: int, inner: int) -> Tensor:
    if outer == 1 or inner == 1:
        return matrix
    return matrix.unflatten(-1, (outer, inner)).transpose(-1, -2).flatten(-2)
