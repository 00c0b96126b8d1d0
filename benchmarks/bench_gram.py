"""Gram matrices of layer inputs, against im2col and a matrix product."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import published
import textbook
import torch
from device import DEVICE, to_device
from measuring import OURS, PUBLISHED, TEXTBOOK, THREADS, Case, by_implementation
from shapes import Convolution
from torch import Tensor, nn

from spade_fast import ops
from spade_fast.ops import reference

_CHECKED_IMAGES = 4
_PLAIN_TOLERANCE = 1e-3  # plain torch sums millions of products one by one for depthwise layers: 4e-4 was seen


_STATED = 128e6 + THREADS * 2e6


def _convolution(
    channels: int,
    image: int,
    kernel: int = 3,
    *,
    share_goal: float | None = 0.65,
    ratio_goal: float | None = None,
    **geometry: Any,
) -> Case:
    shape = Convolution(channels, image, kernel, **geometry)
    dense = shape.groups == 1
    return Case(
        "gram_conv2d_",
        str(shape),
        shape,
        work=shape.gram_work(),
        moved=0.0 if dense else shape.read(),
        stated=_STATED,
        share_goal=share_goal,
        ratio_goal=ratio_goal,
        only=(OURS, TEXTBOOK, PUBLISHED) if dense else (OURS, TEXTBOOK),  # the published code fails on groups
    )


def _depthwise(channels: int, image: int, kernel: int, stride: int = 1) -> Case:
    return _convolution(channels, image, kernel, stride=stride, groups=channels, share_goal=0.5)


_GOALS: Any = {"share_goal": 0.6, "ratio_goal": 6}
CONVOLUTIONS = [
    # ResNet-50: the 3x3 of each stage, those that halve the image, 1x1, and the first layer
    _convolution(64, 56, **_GOALS),
    _convolution(128, 28, **_GOALS),
    _convolution(256, 14, **_GOALS),
    _convolution(512, 7, **_GOALS),
    _convolution(64, 56, channels_last=True, share_goal=0.6),
    _convolution(128, 56, stride=2, images=64, ratio_goal=1.7),
    _convolution(256, 28, stride=2, images=64, ratio_goal=1.7),
    _convolution(512, 14, stride=2, ratio_goal=1.7),
    _convolution(256, 56, 1, images=64, ratio_goal=1.7),
    _convolution(2048, 7, 1, ratio_goal=1.7),
    _convolution(3, 224, 7, stride=2, images=64, share_goal=None),
    # EfficientNet-Lite0: depthwise layers
    _depthwise(32, 112, 3),
    _depthwise(144, 56, 3),
    _depthwise(144, 56, 5, stride=2),
    _depthwise(480, 14, 3),
    _depthwise(672, 14, 5),
    _depthwise(1152, 7, 5),
    _depthwise(1152, 7, 3),
]
# ViT-B/16: 64 images of 197 tokens; the classifier of ResNet-50
LINEAR = [
    Case("gram_linear_", f"{n} x {c}", (n, c), work=n * c * (c + 1), stated=_STATED, share_goal=0.65, ratio_goal=1.7)
    for n, c in ((64 * 197, 768), (64 * 197, 3072), (1024, 2048))
]


def _add_batch(layer: nn.Module, x: Tensor) -> Tensor:
    """The published code's Hessian of one batch."""
    with published.running() as classes:
        solver = classes.TrueOBS(layer, os.devnull)
        solver.add_batch(x, None)
        return solver.H


def _natural(gram: Tensor, taps: int) -> Tensor:
    """From (kh, kw, in-channel) to (in-channel, kh, kw) order."""
    order = torch.arange(gram.shape[-1]).reshape(taps, -1).T.flatten()
    return gram[..., order[:, None], order]


def _assert_close(hessian: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    hessian, expected = hessian.cpu(), expected.cpu().to(hessian.dtype).reshape(hessian.shape)
    torch.testing.assert_close(hessian, expected, rtol=0, atol=tolerance * float(expected.max()))


@by_implementation(CONVOLUTIONS)
def test_gram_conv2d(case: Case, implementation: str, report: Callable[..., None]) -> None:
    shape: Convolution = case.shape
    (x,) = to_device(shape.random_input())
    geometry = [(n, n) for n in (shape.kernel, shape.stride, shape.padding)]
    gram = torch.zeros(1, shape.groups, shape.columns, shape.columns, device=DEVICE)

    def full(images: Tensor) -> Tensor:
        added = ops.gram_conv2d_(torch.zeros_like(gram), images, *geometry)
        return ops.mirror_upper_(added)

    def check_ours(_: object) -> None:
        few = x[:_CHECKED_IMAGES]
        _assert_close(full(few).double(), reference.gram_conv2d(few.cpu(), shape.groups, *geometry))

    def check_other(hessian: Tensor) -> None:
        _assert_close(2 / len(x) * _natural(full(x), shape.kernel**2), hessian, _PLAIN_TOLERANCE)

    if implementation == OURS:
        report(case, implementation, lambda: ops.gram_conv2d_(gram, x, *geometry), check_ours)
    elif implementation == TEXTBOOK:
        settings = (shape.kernel, shape.stride, shape.padding, shape.groups)
        report(case, implementation, lambda: textbook.conv_hessian(x, *settings), check_other)
    else:
        layer = nn.Conv2d(shape.channels, 1, shape.kernel, shape.stride, shape.padding, device=DEVICE)
        report(case, implementation, lambda: _add_batch(layer, x), check_other)


@by_implementation(LINEAR)
def test_gram_linear(case: Case, implementation: str, report: Callable[..., None]) -> None:
    positions, columns = case.shape
    (x,) = to_device(torch.randn(positions, columns))
    gram = torch.zeros(1, columns, columns, device=DEVICE)

    def check_ours(_: object) -> None:
        few = x[None, :512]
        added = ops.mirror_upper_(ops.gram_linear_(torch.zeros_like(gram), few))
        _assert_close(added.double(), reference.gram_linear(few.cpu()))

    def check_other(hessian: Tensor) -> None:
        added = ops.mirror_upper_(ops.gram_linear_(torch.zeros_like(gram), x[None]))
        _assert_close(2 / positions * added[0], hessian, _PLAIN_TOLERANCE)

    if implementation == OURS:
        report(case, implementation, lambda: ops.gram_linear_(gram, x[None]), check_ours)
    elif implementation == TEXTBOOK:
        report(case, implementation, lambda: textbook.linear_hessian(x), check_other)
    else:
        layer = nn.Linear(columns, 1, bias=False, device=DEVICE)
        report(case, implementation, lambda: _add_batch(layer, x), check_other)
