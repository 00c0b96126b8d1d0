"""Gram matrices of linear and convolutional layers against the oracle, on every backend and memory layout."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

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


BESIDE = """
import ctypes, mmap, torch
from spade_fast import ops

values = 2 * 32 * 28 * 28  # whole pages of float32
memory = mmap.mmap(-1, 4 * values + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
library = ctypes.CDLL(None)
assert not library.mprotect(ctypes.c_void_p(start + 4 * values), ctypes.c_size_t(mmap.PAGESIZE), 0)
x = torch.frombuffer((ctypes.c_float * values).from_address(start), dtype=torch.float32)
for level in ops.simd_levels():
    ops.set_simd_level(level)
    for kernel in (1, 3):
        gram = torch.zeros(1, 1, 32 * kernel**2, 32 * kernel**2)
        ops.gram_conv2d_(gram, x.view(2, 32, 28, 28), (kernel, kernel), padding=(kernel // 2, kernel // 2))
    ops.gram_linear_(torch.zeros(1, 32, 32), x.view(1, 32, 1568).transpose(1, 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_beside_the_inputs() -> None:
    run = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


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


LARGE = 2**31 - 1


OVERFLOWS = [
    ("kernel_size must be two integers from 1 to 2147483647", {"kernel_size": (2**32, 2**32)}),
    ("stride must be two integers from 1 to 2147483647", {"stride": (2**62, 1), "padding": (1, 1)}),
    ("padding must be two integers from 0 to 2147483647", {"padding": (2**62, 2**62)}),
    ("dilation must be two integers", {"stride": (2, 2), "padding": (LARGE, 1), "dilation": (2**62, 2)}),
    ("padded image must be at least", {"kernel_size": (LARGE, 3)}),
    ("padded image must be at least", {"kernel_size": (LARGE, 3), "dilation": (LARGE, 1)}),
    ("padded image must be at least", {"dilation": (LARGE, LARGE)}),
    ("padded image must not be larger than 2147483647, got 5 with padding 2147483647", {"padding": (LARGE, 1)}),
    ("at most 2147483647 output positions in one call, got 2 images of", {"padding": (2**30 - 9, 2**30 - 9)}),
    (
        "at most 2147483647 output positions in one call, got 2 images of 1073741825 x 3",
        {"padding": (2**29 - 1, 0)},
    ),
    ("padded image must not be larger", {"x": torch.zeros(1).expand(2, 4, 2**31, 1)}),
    ("gram must have shape", {"x": torch.zeros(0, 2**40, 3, 3), "gram": torch.zeros(0, 1, 9, 9)}),
    ("too many taps", {"x": torch.zeros(1).expand(1, 2**62, 1, 1), "padding": (1, 1)}),
    ("output positions", {"x": torch.zeros(1).expand(2, 4, 2**20, 2**20)}),
]


def overflowing(change: dict[str, Any]) -> dict[str, Any]:
    return {"gram": torch.zeros(1, 1, 36, 36), "x": torch.zeros(2, 4, 5, 5), "kernel_size": (3, 3)} | change


@pytest.mark.parametrize(("message", "change"), OVERFLOWS)
def test_geometries_that_overflow(message: str, change: dict[str, Any], device: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gram_conv2d_(**overflowing(change))


@pytest.mark.parametrize(("message", "change"), OVERFLOWS)
def test_geometries_that_overflow_on_the_meta_device(message: str, change: dict[str, Any]) -> None:
    given = overflowing(change)
    for name in ("gram", "x"):
        given[name] = torch.empty_strided(given[name].shape, given[name].stride(), device="meta")
    with pytest.raises(ValueError, match=message.replace("too many taps", "gram must have shape")):
        ops.gram_conv2d_(**given)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(2, 2, (10, 4), (3, 3), (LARGE, 1), (1, 1)),
        Conv(1, 3, (7, 5), (3, 2), (LARGE, LARGE), (2, 0), (1, 3)),
        Conv(1, 40, (7, 5), (1, 1), (LARGE, 4), (0, 1)),
        Conv(1, 40, (9, 7), (3, 3), (LARGE, LARGE), (1, 1)),
    ],
)
def test_large_strides(conv: Conv, device: str) -> None:
    check_by_hand(conv)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(1, 3, (4, 5), (3, 1), (2**27, 1), (2**28, 0)),
        Conv(20, 1, (4, 4), (2, 2), padding=(2**29, 0), dilation=(2**29, 1), images=1),
    ],
)
def test_large_paddings(conv: Conv) -> None:
    """Not on the emulator, whose kernels visit every output."""
    check_by_hand(conv)


def check_by_hand(conv: Conv) -> None:
    x = conv.input(torch.float64)
    gram = ops.gram_conv2d_(torch.zeros(conv.gram_shape, dtype=torch.float64), x, *conv.geometry)
    assert_upper_close(gram, truth_by_hand(conv, x), 1e-14)


def truth_by_hand(conv: Conv, x: Tensor) -> Tensor:
    """The oracle from those outputs alone that see the image, wherever the padding puts them."""
    starts = []
    for size, kernel, stride, padding, dilation in zip(conv.image, *conv.geometry, strict=True):
        span = dilation * (kernel - 1)
        last = (size + 2 * padding - span - 1) // stride
        seen = {
            -(-(padding - tap * dilation + place) // stride)
            for tap in range(kernel)
            for place in range(size)
            if (padding - tap * dilation + place) % stride == 0
        }
        starts.append([o * stride - padding for o in sorted(seen) if 0 <= o <= last])
    columns = []
    for ky in range(conv.kernel[0]):
        for kx in range(conv.kernel[1]):
            at = torch.zeros(*x.shape[:2], len(starts[0]), len(starts[1]), dtype=x.dtype)
            for i, y in enumerate(starts[0]):
                for j, z in enumerate(starts[1]):
                    row, column = y + ky * conv.dilation[0], z + kx * conv.dilation[1]
                    if 0 <= row < conv.image[0] and 0 <= column < conv.image[1]:
                        at[:, :, i, j] = x[:, :, row, column]
            columns.append(at.reshape(conv.samples, conv.images, conv.groups, conv.channels, -1))
    stacked = torch.stack(columns, 3).permute(0, 2, 3, 4, 1, 5).flatten(4).flatten(2, 3)
    return stacked @ stacked.mT


def test_positions_of_a_linear_layer_are_bounded(device: str) -> None:
    with pytest.raises(ValueError, match="x must have at most 2147483647 positions in one call, got 2147483648"):
        ops.gram_linear_(torch.zeros(1, 2, 2), torch.zeros(1).expand(1, 2**31, 2))


NOT_OWNED = {
    "negated": lambda: torch._neg_view(torch.zeros(1, 3, 3)),
    "conjugated": lambda: torch.zeros(1, 3, 3, dtype=torch.complex64).conj().imag,
    "expanded": lambda: torch.zeros(1, 1, 3).expand(1, 3, 3),
    "expanded matrices": lambda: torch.zeros(1, 3, 3).expand(2, 3, 3),
    "transposed": lambda: torch.zeros(1, 3, 3).mT,
    "every second": lambda: torch.zeros(1, 3, 6)[..., ::2],
}


@pytest.mark.parametrize("kind", NOT_OWNED)
@pytest.mark.parametrize("op", ["gram_linear_", "mirror_upper_"])
def test_only_plain_memory_is_written(op: str, kind: str, device: str) -> None:
    gram = NOT_OWNED[kind]()
    given = (gram, torch.ones(len(gram), 5, 3)) if op == "gram_linear_" else (gram,)
    with pytest.raises(ValueError, match=f"{op}: gram must (be contiguous|not be the negated view)"):
        getattr(ops, op)(*given)
    assert not gram.any()


def test_the_same_for_convolutions(device: str) -> None:
    for gram in (torch._neg_view(torch.zeros(1, 1, 9, 9)), torch.zeros(1, 1, 1, 9).expand(1, 1, 9, 9)):
        with pytest.raises(ValueError, match="gram_conv2d_: gram must"):
            ops.gram_conv2d_(gram, torch.ones(1, 1, 5, 5), (3, 3))


def test_inputs_may_be_negated(device: str) -> None:
    x = torch.randn(1, 5, 3)
    gram = ops.gram_linear_(torch.zeros(1, 3, 3), torch._neg_view(x))
    assert_upper_close(gram, reference.gram_linear(x), 2e-6)
    gram = ops.gram_linear_(torch.zeros(1, 3, 3), torch.complex(x[..., :1], x[..., :1]).conj().imag.expand(1, 5, 3))
    assert_upper_close(gram, reference.gram_linear(x[..., :1].expand(1, 5, 3)), 2e-6)


def test_memory_is_not_shared_with_the_inputs() -> None:
    memory = torch.randn(200)
    before = memory.clone()
    gram = memory[100:125].view(1, 5, 5)
    shared = [gram, memory[:105].view(1, 21, 5), memory[124:134].view(1, 2, 5), memory[::2].view(1, 20, 5)]
    for x in [*shared, *map(torch._neg_view, shared)]:
        with pytest.raises(ValueError, match="gram_linear_: x must not share memory with gram"):
            ops.gram_linear_(gram, x)
        with pytest.raises(ValueError, match="gram_conv2d_: x must not share memory with gram"):
            ops.gram_conv2d_(gram[None], x[:, None], (1, 5))
    assert torch.equal(memory, before)
    beside = (memory[:100].view(1, 20, 5), memory[125:].view(1, 15, 5), memory[100:100].view(1, 0, 5))
    for x in beside:
        start = gram.clone()
        truth = reference.gram_linear(x.clone())
        assert_upper_close(ops.gram_linear_(gram, x) - start, truth, 4e-6)


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


def test_compiles():
    x = torch.randn(2, 5, 3)
    compiled = torch.compile(lambda x: ops.gram_linear_(x.new_zeros(2, 3, 3), x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.gram_linear_(torch.zeros(2, 3, 3), x))
