"""Where the channels of a map are is followed through the operations of a network, and told apart from what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.attribution.layouts import FIRST, LAST, Layouts

WEIGHT = torch.randn(6, 6, 1, 1)


def conv(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT)


def linear(x: Tensor) -> Tensor:
    return F.linear(x, WEIGHT[:, :, 0, 0])


def unknown(x: Tensor) -> Tensor:
    """The image with an order of dimensions that nothing tells."""
    return x.reshape(x.shape)


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (conv, FIRST),
        (lambda x: conv(x).relu_() + x, FIRST),
        (lambda x: conv(x).permute(0, 2, 3, 1), LAST),
        (lambda x: linear(conv(x).permute((0, 2, 3, 1))).permute(0, 3, 1, 2), FIRST),
        (lambda x: x.permute(0, 2, -1, 1).contiguous().roll(1, 2), LAST),
        (lambda x: x.transpose(1, 3), LAST),
        (lambda x: x.transpose(1, -1).transpose(-2, 3), None),
        (lambda x: x.transpose(2, 3), FIRST),
        (lambda x: linear(unknown(x)), LAST),
        (lambda x: F.layer_norm(unknown(x), (6,)), LAST),
        (lambda x: F.layer_norm(unknown(x), (6, 6, 6)), None),
        (lambda x: F.max_pool2d(unknown(x), 2), FIRST),
        (lambda x: F.gelu(linear(unknown(x))) * torch.ones(6), LAST),
        (lambda x: torch.cat([conv(x), unknown(x)], 1), FIRST),
        (lambda x: conv(x).chunk(2, 1)[1], FIRST),
        (lambda x: conv(x) + linear(unknown(x)), None),
        (linear, None),
        (unknown, None),
        (lambda x: x @ x, None),
        (lambda x: x.mT, None),
        (lambda x: torch.einsum("nchw,dc->nhwd", x, WEIGHT[:, :, 0, 0]), None),
    ],
)
def test_what_the_operations_tell(function: Callable[[Tensor], Tensor], layout: int | None) -> None:
    image = torch.randn(1, 6, 6, 6)
    with Layouts(image) as layouts:
        result = function(image)
        kept = layouts.channels(result)
    assert kept == layout


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (lambda x: x.mean((2, 3)), FIRST),
        (lambda x: x.mean(dim=[-2, -1], keepdim=True), FIRST),
        (lambda x: torch.amax(x, (1, 2)), LAST),
        (lambda x: x.flatten(2), FIRST),
        (lambda x: x.flatten(1, 2), LAST),
        (lambda x: F.adaptive_avg_pool2d(x, 1), FIRST),
        (linear, LAST),
        (lambda x: x.mean(1), None),
        (lambda x: x.flatten(1), None),
        (lambda x: x.sum(), None),
    ],
)
def test_what_follows_tells_too(function: Callable[[Tensor], Tensor], layout: int | None) -> None:
    with Layouts(torch.randn(1, 6, 6, 6)) as layouts:
        given = unknown(torch.randn(1, 6, 6, 6))
        function(given)
    assert layouts.channels(given) == layout
