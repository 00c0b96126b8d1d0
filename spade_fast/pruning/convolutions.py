"""Gram matrices of the inputs of convolutions in one to three dimensions, transposed ones too, by one native op."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast import ops
from spade_fast.pruning.gram_sums import summable


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of a convolution: its input ``[N, C, ...]`` and geometry, with one number per spatial dimension."""

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


def add_convolution(gram: Tensor, call: ConvolutionCall) -> None:
    """Add the inputs of a convolution to the upper triangles of `gram` ``[G, K, K]``, in place.

    ``K`` is the number of taps times the channels of one group of `call.x`. Columns are in the order of the weight's
    taps, with the channels of one tap as neighbours.

    Notes
    -----
    One and two dimensions are what `ops.gram_conv2d_` sums. The last of three dimensions is taken out of the
    convolution: its shifted slices become channels. This copies the input ``kw / stride`` times, and pairs of taps that
    differ in this dimension share no products: ``kw²`` times the work of a two-dimensional layer.

    A transposed convolution of stride s never adds up taps that differ modulo s (with dilation 1). The taps of each
    such class are an ordinary convolution of stride 1 over the reversed input, and entries of the Gram matrix between
    two classes are zero. The work is that of an ordinary convolution over the input with the kernel divided among the
    classes; nothing is stuffed with zeros.
    """
    call = replace(call, x=summable(call.x, gram))
    if call.transposed:
        _add_transposed(gram, call)
        return
    x, geometry = call.x, [call.kernel, call.stride, call.padding, call.dilation]
    if len(call.kernel) == 1:
        x, geometry = x.unsqueeze(2), [(neutral, *given) for neutral, given in zip((1, 1, 0, 1), geometry, strict=True)]
    elif len(call.kernel) == 3:
        x, geometry = _slices_as_channels(gram, call), [given[:2] for given in geometry]
    kernel, stride, padding, dilation = ((given[0], given[1]) for given in geometry)
    if x.numel() > 0:
        ops.gram_conv2d_(gram[None], x, kernel, stride, padding, dilation)


def _slices_as_channels(gram: Tensor, call: ConvolutionCall) -> Tensor:
    """Return the input ``[N * positions, G * kw * C / G, D, H]`` with the taps of the last dimension as channels."""
    padding = call.padding[2]
    extent = call.dilation[2] * (call.kernel[2] - 1) + 1
    padded = F.pad(call.x, (padding, padding))
    windows = padded.unfold(4, extent, call.stride[2])[..., :: call.dilation[2]]  # [N, C, D, H, positions, kw]
    windows = windows.unflatten(1, (len(gram), -1))  # [N, G, C / G, D, H, positions, kw]
    return windows.permute(0, 5, 1, 6, 2, 3, 4).flatten(2, 4).flatten(0, 1)


def _add_transposed(gram: Tensor, call: ConvolutionCall) -> None:
    """Add each class of taps that contribute to the same outputs, as an ordinary convolution.

    In each dimension output q is the sum over taps t of ``w[t] x[(q + padding - dilation t) / stride]``, where the
    quotient is whole. With ``g = gcd(dilation, stride)`` the taps of a class are ``t = r + stride / g · j``, its
    outputs are those with ``q + padding = dilation r + stride m``, and they take ``x[m - dilation / g · j]``.
    """
    sizes = call.x.shape[2:]
    numbers = torch.arange(math.prod(call.kernel), device=gram.device).reshape(call.kernel)
    channels = gram.shape[1] // numbers.numel()
    reversed_x = call.x.flip(*range(2, call.x.dim()))
    for classes in itertools.product(*(_classes(call, size, d) for d, size in enumerate(sizes))):
        taps = numbers
        for d, one in enumerate(classes):
            taps = taps.index_select(d, torch.arange(one.first, call.kernel[d], one.step, device=gram.device))
        pads = [pad for one in reversed(classes) for pad in one.pads]
        part = ConvolutionCall(
            F.pad(reversed_x, pads),
            tuple(taps.shape),
            (1,) * len(sizes),
            (0,) * len(sizes),
            tuple(one.dilation for one in classes),
        )
        columns = (taps.reshape(-1, 1) * channels + torch.arange(channels, device=gram.device)).flatten()
        own = torch.zeros(len(gram), len(columns), len(columns), dtype=gram.dtype, device=gram.device)
        add_convolution(own, part)
        gram[:, columns[:, None], columns] += own


@dataclass(frozen=True)
class _Class:
    """In one dimension: the taps of a class, and the padding of the reversed input (negative where it is cropped)."""

    first: int
    step: int
    dilation: int
    pads: tuple[int, int]


def _classes(call: ConvolutionCall, size: int, d: int) -> list[_Class]:
    """Return the classes of taps in dimension d that take inputs and have outputs."""
    kernel, stride, padding, dilation = call.kernel[d], call.stride[d], call.padding[d], call.dilation[d]
    outputs = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + call.output_padding[d] + 1
    step, inner = stride // math.gcd(dilation, stride), dilation // math.gcd(dilation, stride)
    classes = []
    for first in range(min(kernel, step)):
        taps = len(range(first, kernel, step))
        lowest = -((dilation * first - padding) // stride)
        highest = (outputs - 1 + padding - dilation * first) // stride
        reach = inner * (taps - 1)
        if max(lowest, 0) <= highest and lowest - reach < size:
            classes.append(_Class(first, step, inner, (highest - (size - 1), reach - lowest)))
    return classes
