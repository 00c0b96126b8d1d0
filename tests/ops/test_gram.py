"""Gram matrices of linear and convolutional layers against the oracle, on every backend and memory layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from backends import examples, in_turns
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from spade_fast import ops
from spade_fast.ops import reference

CHANNELS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65]
LAYOUTS = ["nchw", "channels_last", "every_second_channel", "transposed"]
EPSILON = {torch.float32: 2e-6, torch.float64: 1e-14}


@dataclass(frozen=True)
class Conv:
    """A convolution's geometry and the batch it sees."""

    groups: int
    channels: int  # per group
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    samples: int = 1
    images: int = 2  # per sample

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def gram_shape(self) -> tuple[int, int, int, int]:
        size = self.kernel[0] * self.kernel[1] * self.channels
        return self.samples, self.groups, size, size

    def input(self, dtype: torch.dtype = torch.float32, layout: str = "nchw") -> Tensor:
        n, c = self.samples * self.images, self.groups * self.channels
        h, w = self.image
        if layout == "every_second_channel":
            return torch.randn(n, 2 * c, h, w + 3, dtype=dtype)[:, ::2, :, 1 : w + 1]
        if layout == "transposed":
            return torch.randn(n, w, h, c, dtype=dtype).permute(0, 3, 2, 1)
        x = torch.randn(n, c, h, w, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x

    def truth(self, x: Tensor) -> Tensor:
        return reference.gram_conv2d(x, self.groups, *self.geometry, samples=self.samples)

    def plain_float32(self, x: Tensor) -> Tensor:
        kernel, stride, padding, dilation = self.geometry
        columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
        columns = columns.reshape(self.samples, self.images, self.groups, self.channels, kernel[0] * kernel[1], -1)
        columns = columns.permute(0, 2, 4, 3, 1, 5).flatten(4).flatten(2, 3)
        return columns @ columns.mT


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    groups = draw(st.sampled_from([1, 1, 2, 5, 17, 33]))
    conv = Conv(
        groups=groups,
        channels=draw(st.sampled_from([c for c in CHANNELS if groups < 3 or c < 10])),
        image=draw(st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 3, 5, 8, 13, 40]))),
        kernel=draw(pairs(1, 5)),
        stride=draw(pairs(1, 3)),
        padding=draw(pairs(0, 4)),
        dilation=draw(pairs(1, 3)),
        samples=draw(st.integers(1, 3)),
        images=draw(st.integers(1, 3)),
    )
    span = [d * (k - 1) + 1 for k, d in zip(conv.kernel, conv.dilation, strict=True)]
    assume(all(s + 2 * p >= n for s, p, n in zip(conv.image, conv.padding, span, strict=True)))
    assume(conv.gram_shape[-1] <= 400)
    return conv


def assert_upper_close(gram: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (gram.double() - truth).triu().abs().max().item()
    assert error <= tolerance * (1 + truth.abs().max().item())


def test_conv2d(backend: str) -> None:
    @examples(60, backend)
    @given(conv=convolutions(), dtype=st.sampled_from(list(EPSILON)), layout=st.sampled_from(LAYOUTS))
    def agrees(conv: Conv, dtype: torch.dtype, layout: str) -> None:
        x = conv.input(dtype, layout)
        start = torch.randn(conv.gram_shape, dtype=dtype)
        gram = ops.gram_conv2d_(start.clone(), x, *conv.geometry)
        assert_upper_close(gram - start, conv.truth(x), 2 * EPSILON[dtype])

    agrees()


def test_linear(backend: str) -> None:
    @examples(30, backend)
    @given(
        samples=st.integers(1, 3),
        positions=st.sampled_from([1, 2, 3, 100, 1000]),
        channels=st.sampled_from([*CHANNELS, 400]),
        dtype=st.sampled_from(list(EPSILON)),
        layout=st.sampled_from(["rows", "columns", "positions_first"]),
    )
    def agrees(samples: int, positions: int, channels: int, dtype: torch.dtype, layout: str) -> None:
        x = torch.randn(samples, positions, channels, dtype=dtype)
        if layout == "columns":
            x = x.mT.contiguous().mT
        elif layout == "positions_first":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        gram = torch.zeros(samples, channels, channels, dtype=dtype)
        assert ops.gram_linear_(gram, x) is gram
        assert_upper_close(gram, reference.gram_linear(x), EPSILON[dtype])

    agrees()


def test_bfloat16_inputs(backend: str) -> None:
    """Products of bfloat16 are exact in float32, so the sums are as good as those of float32 inputs."""

    @examples(30, backend)
    @given(conv=convolutions(), layout=st.sampled_from(LAYOUTS), images=st.integers(1, 5))
    def agrees(conv: Conv, layout: str, images: int) -> None:
        conv = replace(conv, images=images)
        x = conv.input(layout=layout).to(torch.bfloat16)
        gram = ops.gram_conv2d_(torch.zeros(conv.gram_shape), x, *conv.geometry)
        assert_upper_close(gram, conv.truth(x.float()), 4 * EPSILON[torch.float32])

    agrees()


@in_turns(positions=[1, 2, 3, 101, 1000], channels=[1, 17, 48, 400], transposed=[False, True])
def test_bfloat16_linear(backend: str, positions: int, channels: int, transposed: bool) -> None:
    x = torch.randn(2, positions, channels).to(torch.bfloat16)
    if transposed:
        x = x.mT.contiguous().mT
    gram = torch.zeros(2, channels, channels)
    ops.gram_linear_(gram, x)
    assert_upper_close(gram, reference.gram_linear(x), 4 * EPSILON[torch.float32])


CASES = {
    "blocks": Conv(1, 40, (9, 11), (3, 3), (1, 1), (1, 1), samples=2),
    "blocks_of_channels": Conv(1, 200, (5, 5), (3, 3), (1, 1), (1, 1)),
    "strided": Conv(1, 33, (14, 13), (3, 3), (2, 2), (1, 1)),
    "dilated": Conv(1, 31, (15, 15), (3, 3), (1, 1), (4, 4), (4, 4)),
    "pointwise": Conv(1, 400, (7, 7), (1, 1), (2, 2)),
    "only_padding": Conv(1, 60, (1, 2), (1, 1), (3, 4), (1, 1)),
    "wide_rows": Conv(1, 24, (2, 1200), (1, 5), padding=(0, 2)),
    "wide_strided_rows": Conv(1, 33, (2, 900), (1, 3), (1, 2), (0, 1)),
    "first_layer": Conv(1, 3, (30, 30), (7, 7), (2, 2), (3, 3), images=4),
    "wide_first_layer": Conv(1, 3, (3, 2000), (5, 5), (2, 2), (2, 2)),
    "many_im2col_columns": Conv(1, 3, (32, 32), (16, 16), (16, 16)),
    "depthwise": Conv(70, 1, (12, 12), (5, 5), (1, 1), (2, 2), samples=2),
    "depthwise_high": Conv(20, 1, (70, 40), (3, 3), padding=(1, 1)),
    "depthwise_wide_rows": Conv(20, 1, (3, 5000), (1, 9), padding=(0, 4)),
    "small_groups": Conv(20, 5, (10, 10), (3, 3), (2, 1), (1, 1)),
    "groups": Conv(3, 30, (9, 9), (3, 3), padding=(1, 1)),
}


@pytest.mark.parametrize("name", ["blocks", "strided", "wide_strided_rows", "pointwise", "groups"])
def test_bfloat16_images_in_pairs(name: str, device: str) -> None:
    """Two of three images make a pair, where the processor multiplies pairs."""
    conv = replace(CASES[name], images=3)
    x = conv.input().to(torch.bfloat16)
    gram = ops.gram_conv2d_(torch.zeros(conv.gram_shape), x, *conv.geometry)
    assert_upper_close(gram, conv.truth(x.float()), 4 * EPSILON[torch.float32])


@in_turns(name=CASES, layout=LAYOUTS)
def test_error_of_float32(name: str, layout: str, backend: str) -> None:
    """At most twice the error of im2col and a matrix product, plus four units in the last place."""
    conv = CASES[name]
    x = conv.input(layout=layout)
    truth = conv.truth(x)
    gram = torch.zeros(conv.gram_shape)
    ops.gram_conv2d_(gram, x, *conv.geometry)
    plain = (conv.plain_float32(x) - truth).abs().max()
    assert (gram - truth).triu().abs().max() <= 2 * plain + 4.8e-7 * truth.abs().max()


@in_turns(name=CASES)
def test_calls_add_up_and_mirror(name: str, backend: str) -> None:
    conv = CASES[name]
    first, second = conv.input(torch.float64), conv.input(torch.float64, "channels_last")
    gram = torch.zeros(conv.gram_shape, dtype=torch.float64)
    for x in (first, second):
        assert ops.gram_conv2d_(gram, x, *conv.geometry) is gram
    assert ops.mirror_upper_(gram) is gram
    assert_upper_close(gram, conv.truth(first) + conv.truth(second), 2e-14)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    conv = CASES[name]
    x = conv.input()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.gram_conv2d_(torch.zeros(conv.gram_shape), x, *conv.geometry))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_what_lies_beside_the_channels_does_not_leak(backend: str) -> None:
    """NaN beside the data, in memory that a vector load may reach, must not affect the result."""
    for channels in CHANNELS:
        x = torch.full((1, 40, channels + 64), torch.nan)
        x[..., 32 : 32 + channels] = 1
        gram = ops.gram_linear_(torch.zeros(1, channels, channels), x[..., 32 : 32 + channels])
        assert torch.equal(gram.triu(), torch.full_like(gram, 40).triu())


def test_mirror(device: str) -> None:
    for columns in (1, 2, 31, 32, 33, 100):
        gram = torch.randn(2, 3, columns, columns)
        upper = gram.triu()
        ops.mirror_upper_(gram)
        assert torch.equal(gram, upper + upper.triu(1).mT)


def test_strides_of_dimensions_of_one_do_not_matter(device: str) -> None:
    """Whether a tensor is contiguous does not depend on them."""
    x = torch.randn(1, 600, 64)
    gram = torch.zeros(64, 1, 64).transpose(0, 1)
    assert gram.is_contiguous() and gram.stride(0) == 64
    ops.gram_linear_(gram, x)
    assert_upper_close(gram, reference.gram_linear(x), 2e-6)


def test_empty_batches_change_nothing(device: str) -> None:
    gram = torch.randn(2, 1, 36, 36)
    before = gram.clone()
    ops.gram_conv2d_(gram, torch.randn(0, 4, 5, 5), (3, 3))
    assert torch.equal(gram, before)
    ops.gram_linear_(gram[:, 0], torch.randn(2, 0, 36))
    assert torch.equal(gram, before)
    assert ops.mirror_upper_(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "gram must have shape", {"gram": torch.zeros(1, 1, 35, 35)}),
        (ValueError, "gram must have shape", {"gram": torch.zeros(1, 36, 36)}),
        (ValueError, "gram must be contiguous", {"gram": torch.zeros(1, 1, 36, 72)[..., ::2]}),
        (ValueError, "multiple of gram's groups", {"gram": torch.zeros(1, 3, 12, 12)}),
        (ValueError, "multiple of gram's samples", {"gram": torch.zeros(3, 1, 36, 36)}),
        (TypeError, "gram must be float32 or float64", {"gram": torch.zeros(1, 1, 36, 36, dtype=torch.float16)}),
        (TypeError, "x must have the dtype of gram", {"x": torch.zeros(2, 4, 5, 5, dtype=torch.float64)}),
        (ValueError, "x must have shape", {"x": torch.zeros(4, 5, 5)}),
        (ValueError, "padded image must be at least", {"x": torch.zeros(2, 4, 5, 2)}),
        (ValueError, "kernel_size must be two", {"kernel_size": (0, 3)}),
        (ValueError, "stride must be two", {"stride": (1, 0)}),
        (ValueError, "padding must be two", {"padding": (-1, 0)}),
        (ValueError, "dilation must be two", {"dilation": (1, 1, 1)}),
    ],
)
def test_bad_convolutions(error: type[Exception], message: str, change: dict[str, object], device: str) -> None:
    arguments: dict[str, object] = {
        "gram": torch.zeros(1, 1, 36, 36),
        "x": torch.zeros(2, 4, 5, 5),
        "kernel_size": (3, 3),
    }
    with pytest.raises(error, match=message):
        ops.gram_conv2d_(**{**arguments, **change})


def test_bad_linear_and_mirror(device: str) -> None:
    with pytest.raises(ValueError, match="gram must have shape"):
        ops.gram_linear_(torch.zeros(1, 3, 3), torch.zeros(1, 7, 4))
    with pytest.raises(ValueError, match="x must have shape"):
        ops.gram_linear_(torch.zeros(1, 3, 3), torch.zeros(7, 3))
    with pytest.raises(TypeError, match="x must have the dtype of gram"):
        ops.gram_linear_(torch.zeros(1, 3, 3), torch.zeros(1, 7, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="gram must have shape"):
        ops.mirror_upper_(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="gram must be contiguous"):
        ops.mirror_upper_(torch.zeros(4, 4).mT[:3, :3])


def test_opcheck() -> None:
    x = torch.randn(2, 4, 5, 5)
    torch.library.opcheck(
        torch.ops.spade_fast.gram_conv2d_, (torch.zeros(1, 1, 36, 36), x, (3, 3), (1, 1), (1, 1), (1, 1))
    )
    torch.library.opcheck(torch.ops.spade_fast.gram_linear_, (torch.zeros(1, 5, 5), torch.randn(1, 7, 5)))
    torch.library.opcheck(torch.ops.spade_fast.mirror_upper_, (torch.randn(2, 5, 5),))
