"""Where the channels of a map are is followed through the operations of a network, and told apart from what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.attribution.layouts import FIRST, LAST, Layouts, Tokens

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


# Tokens

TOKEN = torch.randn(1, 1, 6)


def embed(x: Tensor) -> Tensor:
    return F.conv2d(x, torch.randn(6, 6, 2, 3), stride=(2, 3)).flatten(2).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """Swin's merging of patches, two by two."""
    x = conv(x).flatten(2).transpose(1, 2).view(1, 6, 6, 6)
    parts = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return F.layer_norm(torch.cat(parts, -1).view(1, -1, 24), (24,))


@pytest.mark.parametrize(
    ("function", "tokens"),
    [
        (embed, (3, 2, 0, 1)),
        (lambda x: F.conv2d(x, torch.randn(6, 6, 2, 3), stride=(2, 3)).reshape(1, 6, 6), (3, 2, 0, 2)),
        (lambda x: conv(x).permute(0, 2, 3, 1).reshape(1, 36, 6), (6, 6, 0, 1)),
        (lambda x: torch.cat([TOKEN, TOKEN, embed(x)], 1) + torch.ones(8, 6), (3, 2, 2, 1)),
        (lambda x: torch.cat([torch.cat([TOKEN, embed(x), TOKEN], 1), TOKEN], dim=1), (3, 2, 1, 1)),
        (lambda x: torch.cat((TOKEN, embed(x)), dim=1)[:, 1:], (3, 2, 0, 1)),
        (lambda x: torch.cat((TOKEN, embed(x)), dim=1)[:, 2:], None),
        (lambda x: torch.cat((embed(x), embed(x)), dim=1), None),
        (lambda x: torch.cat((embed(x), embed(x)), dim=2), (3, 2, 0, 1)),
        (lambda x: torch.cat((TOKEN, embed(x)), dim=1)[:, :-1], None),
        (lambda x: torch.cat((TOKEN, embed(x)), dim=1).permute(1, 0, 2), (3, 2, 1, 0)),
        (lambda x: F.gelu(F.linear(F.layer_norm(embed(x), (6,)), torch.ones(9, 6))), (3, 2, 0, 1)),
        (lambda x: embed(x) + embed(x).softmax(-1) @ embed(x).mT @ embed(x), (3, 2, 0, 1)),
        (lambda x: embed(x).mT @ embed(x), None),
        (lambda x: embed(x).flip(1), None),
        (lambda x: embed(x).reshape(1, 3, 12), None),
        (lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 9, 24), None),
        (merged, (3, 3, 0, 1)),
    ],
)
def test_tokens_are_followed_from_the_map(
    function: Callable[[Tensor], Tensor], tokens: tuple[int, int, int, int] | None
) -> None:
    with Layouts(torch.randn(1, 6, 6, 6)) as layouts:
        result = function(torch.randn(1, 6, 6, 6))
    assert layouts.tokens(result) == (None if tokens is None else Tokens(*tokens))


def test_all_images_among_the_inputs_have_their_channels_first() -> None:
    table, image = torch.randn(1, 3), torch.randn(1, 6, 4, 4)
    with Layouts((table, image), {"second": image.clone()}, None) as layouts:
        result = image.permute(0, 2, 3, 1)
    assert layouts.channels(result) == LAST


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_map_of_tokens(axis: int) -> None:
    maps = torch.randn(2, 5, 3, 4)
    tokens = torch.cat([torch.zeros(2, 5, 1), maps.flatten(2), torch.zeros(2, 5, 2)], 2)
    given = {0: tokens.permute(2, 0, 1), 1: tokens.mT, 2: tokens}[axis]
    assert torch.equal(Tokens(3, 4, 1, axis).to_map(given), maps)
