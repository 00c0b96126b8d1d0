"""Gram matrices of layer inputs against im2col and a matrix product, in one process on two threads.

Run with ``pytest benchmarks/bench_gram.py``. For each shape it prints the time of one call, how many times faster it is
than the textbook Hessian, and the rate as a share of a large float32 matrix product's. Only the work that a
convolution's Gram matrix cannot do without is counted: one product per position and difference between two kernel taps,
not one per pair of taps, and half of the symmetric ones. ``pytest --benchmark-json=FILE`` writes the figures to a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import textbook
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast import ops


@dataclass(frozen=True)
class Shape:
    """A layer and its input: square images, kernels and strides, "same" padding."""

    channels: int
    image: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    images: int = 64

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def outputs(self) -> int:
        return (self.image + 2 * self.padding - self.kernel) // self.stride + 1

    def operations(self) -> float:
        """Floating-point operations of the distinct products."""
        starts = [o * self.stride - self.padding for o in range(self.outputs)]
        inside = [[p + i for i in range(self.kernel) if 0 <= p + i < self.image] for p in starts]
        pairs = {(a, b) for field in inside for a in field for b in field if a <= b}  # along one axis
        level = len({a for a, _ in pairs})
        above = len(pairs) - level
        both = above * (2 * above + level) + level * (above + level / 2)
        return 2.0 * self.images * both * (self.channels // self.groups) ** 2 * self.groups


SHAPES = {
    "3x3x64": Shape(64, 56),
    "3x3x128": Shape(128, 28),
    "3x3x256": Shape(256, 14),
    "3x3x512": Shape(512, 7, images=256),
    "3x3x256_stride2": Shape(256, 28, stride=2),
    "1x1x256": Shape(256, 56, kernel=1),
    "1x1x2048": Shape(2048, 7, kernel=1, images=256),
    "first_7x7x3_stride2": Shape(3, 224, kernel=7, stride=2),
    "depthwise_3x3x32": Shape(32, 112, groups=32),
    "depthwise_3x3x144": Shape(144, 56, groups=144),
    "depthwise_5x5x672": Shape(672, 14, kernel=5, groups=672),
    "depthwise_5x5x1152": Shape(1152, 7, kernel=5, groups=1152),
    "groups_3x3x32x4": Shape(128, 56, groups=32),
}


def best(function: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.fixture(scope="module")
def matmul_rate() -> float:
    """Floating-point operations per second of a float32 matrix product."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    a = torch.randn(3000, 3000)
    seconds = best(lambda: a @ a, 10)
    torch.set_num_threads(before)
    return 2 * 3000**3 / seconds


def by_im2col(shape: Shape, x: Tensor) -> Tensor:
    if shape.groups == 1:
        return textbook.conv_hessian(x, shape.kernel, shape.stride, shape.padding)
    columns = F.unfold(x, shape.kernel, padding=shape.padding, stride=shape.stride)
    columns = columns.unflatten(1, (shape.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return (columns @ columns.mT).double()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", SHAPES)
def test_gram_conv2d(
    name: str, layout: str, benchmark: Any, matmul_rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = SHAPES[name]
    x = torch.randn(shape.images, shape.channels, shape.image, shape.image)
    textbook_seconds = best(lambda: by_im2col(shape, x), 1) if layout == "nchw" else None
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    size = shape.kernel**2 * (shape.channels // shape.groups)
    gram = torch.zeros(1, shape.groups, size, size)
    geometry = [(n, n) for n in (shape.kernel, shape.stride, shape.padding)]
    benchmark.pedantic(lambda: ops.gram_conv2d_(gram, x, *geometry), rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    share = shape.operations() / seconds / matmul_rate
    benchmark.extra_info.update(share_of_matmul=round(share, 2))
    line = f"\n{name} {layout}: {seconds * 1000:.1f} ms, {share:.0%} of the rate of matmul"
    if textbook_seconds is not None:
        ratio = textbook_seconds / seconds
        benchmark.extra_info.update(textbook_seconds=round(textbook_seconds, 3), ratio=round(ratio, 1))
        line += f", textbook {textbook_seconds:.2f} s, {ratio:.1f} times"
    with capsys.disabled():
        print(line)


def test_gram_linear(benchmark: Any, matmul_rate: float, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, 8192, 1024)
    gram = torch.zeros(1, 1024, 1024)
    benchmark.pedantic(lambda: ops.gram_linear_(gram, x), rounds=5, warmup_rounds=1)
    share = 8192 * 1024**2 / benchmark.stats.stats.min / matmul_rate
    benchmark.extra_info.update(share_of_matmul=round(share, 2))
    with capsys.disabled():
        print(f"\nlinear 8192 x 1024: {benchmark.stats.stats.min * 1000:.1f} ms, {share:.0%} of the rate of matmul")
