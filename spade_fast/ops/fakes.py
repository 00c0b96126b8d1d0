"""Fake kernels of the native ops: checks, shapes and dtypes, for `torch.compile` and the meta device.

Their errors are those of the native ops, as far as they do not depend on values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _native  # noqa: F401  registers the ops

_LARGEST = 2**31 - 1


def _value(op: str, right: bool, message: str) -> None:
    torch._check_value(right, lambda: f"{op}: {message}")


def _type(op: str, right: bool, message: str) -> None:
    torch._check_type(right, lambda: f"{op}: {message}")


def _floating(op: str, name: str, tensor: Tensor) -> None:
    right = tensor.dtype in (torch.float32, torch.float64)
    _type(op, right, f"{name} must be float32 or float64, got {tensor.dtype}")


def _integer(op: str, name: str, tensor: Tensor) -> None:
    _type(op, tensor.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, got {tensor.dtype}")


def _dims(op: str, name: str, tensor: Tensor, shape: str) -> None:
    right = tensor.dim() == shape.count(",") + 1
    _value(op, right, f"{name} must have shape {shape}, got {list(tensor.shape)}")


def _shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    message = f"{name} must have shape {list(shape)}, got {list(tensor.shape)}"
    _value(op, tensor.dim() == len(shape), message)
    for size, right in zip(tensor.shape, shape, strict=True):
        _value(op, size == right, message)


def _same_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    message = f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}"
    _value(op, tensor.device == like.device, message)


def _same_dtype(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    _same_device(op, name, tensor, like_name, like)
    message = f"{name} must have the dtype of {like_name} ({like.dtype}), got {tensor.dtype}"
    _type(op, tensor.dtype == like.dtype, message)


def _problem(op: str, weight: Tensor, **matrices: Tensor) -> None:
    _floating(op, "weight", weight)
    _dims(op, "weight", weight, "[problems, rows, columns]")
    message = f"weight must have at most {_LARGEST} columns, got {weight.shape[2]}"
    _value(op, weight.shape[2] <= _LARGEST, message)
    for name, matrix in matrices.items():
        _same_dtype(op, name, matrix, "weight", weight)
        _shape(op, name, matrix, (weight.shape[0], weight.shape[2], weight.shape[2]))


def _divides(op: str, name: str, value: int, weight: Tensor) -> None:
    message = f"{name} must divide the {weight.shape[2]} columns, got {value}"
    _value(op, value >= 1, message)
    _value(op, weight.shape[2] % value == 0, message)


def _gram(op: str, gram: Tensor, x: Tensor) -> None:
    _floating(op, "gram", gram)
    _value(op, gram.is_contiguous(), f"gram must be contiguous, got strides {list(gram.stride())}")
    _same_device(op, "x", x, "gram", gram)
    if x.dtype != torch.bfloat16 or gram.dtype != torch.float32:
        _same_dtype(op, "x", x, "gram", gram)


@torch.library.register_fake("spade_fast::gram_linear_")
def _(gram: Tensor, x: Tensor) -> None:
    op = "gram_linear_"
    _gram(op, gram, x)
    _dims(op, "x", x, "[samples, positions, channels]")
    _shape(op, "gram", gram, (x.shape[0], x.shape[2], x.shape[2]))
    message = f"x must have at most {_LARGEST} positions in one call, got {x.shape[1]}"
    _value(op, x.shape[1] <= _LARGEST, message)


@torch.library.register_fake("spade_fast::gram_conv2d_")
def _(
    gram: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    op = "gram_conv2d_"
    pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        right = len(pair) == 2 and all(least <= size <= _LARGEST for size in pair)
        _value(op, right, f"{name} must be two integers from {least} to {_LARGEST}, got {list(pair)}")
    _dims(op, "x", x, "[images, channels, height, width]")
    _gram(op, gram, x)
    _dims(op, "gram", gram, "[samples, groups, columns, columns]")
    samples, groups = gram.shape[:2]
    right = x.shape[0] % samples == 0 if samples > 0 else x.shape[0] == 0
    message = f"the number of images must be a multiple of gram's samples ({samples}), got {x.shape[0]}"
    _value(op, right, message)
    message = f"the number of channels must be a multiple of gram's groups ({groups}), got {x.shape[1]}"
    _value(op, groups > 0, message)
    _value(op, x.shape[1] % groups == 0, message)
    outputs = []
    for size, kernel, step, pad, spread in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True):
        padded, span = size + 2 * pad, spread * (kernel - 1) + 1
        message = f"the padded image must not be larger than {_LARGEST}, got {size} with padding {pad}"
        _value(op, padded <= _LARGEST, message)
        message = f"the padded image must be at least as large as the dilated kernel ({span}), got {padded}"
        _value(op, padded >= span, message)
        outputs.append((padded - span) // step + 1)
    columns = kernel_size[0] * kernel_size[1] * (x.shape[1] // groups)
    _shape(op, "gram", gram, (samples, groups, columns, columns))
    images = x.shape[0] // samples if samples > 0 else 0
    message = (
        f"a sample must have at most {_LARGEST} output positions in one call, "
        f"got {images} images of {outputs[0]} x {outputs[1]}"
    )
    _value(op, outputs[0] * outputs[1] <= _LARGEST, message)
    _value(op, images * outputs[0] * outputs[1] <= _LARGEST, message)


@torch.library.register_fake("spade_fast::mirror_upper_")
def _(gram: Tensor) -> None:
    op = "mirror_upper_"
    _floating(op, "gram", gram)
    message = f"gram must have shape [..., columns, columns], got {list(gram.shape)}"
    _value(op, gram.dim() >= 2, message)
    _value(op, gram.shape[-1] == gram.shape[-2], message)
    _value(op, gram.is_contiguous(), f"gram must be contiguous, got strides {list(gram.stride())}")


@torch.library.register_fake("spade_fast::inverse_cholesky")
def _(hessian: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    return _factors("inverse_cholesky", hessian, damp)


@torch.library.register_fake("spade_fast::reverse_cholesky")
def _(hessian: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    return _factors("reverse_cholesky", hessian, damp)


def _factors(op: str, hessian: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    _floating(op, "hessian", hessian)
    _dims(op, "hessian", hessian, "[problems, columns, columns]")
    _shape(op, "hessian", hessian, (hessian.shape[0], hessian.shape[2], hessian.shape[2]))
    _same_dtype(op, "damp", damp, "hessian", hessian)
    _shape(op, "damp", damp, (hessian.shape[0],))
    return hessian.new_empty(hessian.shape), hessian.new_empty(hessian.shape[:1], dtype=torch.int32)


@torch.library.register_fake("spade_fast::obs_path")
def _(weight: Tensor, hinv: Tensor, block: int) -> tuple[Tensor, Tensor]:
    _problem("obs_path", weight, hinv=hinv)
    _divides("obs_path", "block", block, weight)
    return _path(weight, weight.shape[2] // block)


@torch.library.register_fake("spade_fast::nm_path")
def _(weight: Tensor, hinv: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    _problem("nm_path", weight, hinv=hinv)
    _divides("nm_path", "m", m, weight)
    _value("nm_path", 0 <= n <= m, f"n must lie in 0..m = {m}, got {n}")
    return _path(weight, weight.shape[2] // m * n)


def _path(weight: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    shape = (*weight.shape[:2], steps)
    return weight.new_empty(shape, dtype=torch.int32), weight.new_empty(shape)


@torch.library.register_fake("spade_fast::obs_solution")
def _(weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int) -> Tensor:
    op = "obs_solution"
    _problem(op, weight, hessian=hessian, hinv=hinv)
    for name, tensor in {"order": order, "counts": counts}.items():
        _integer(op, name, tensor)
        _same_device(op, name, tensor, "weight", weight)
    _dims(op, "order", order, "[problems, rows, steps]")
    _shape(op, "order", order, (*weight.shape[:2], order.shape[2]))
    problems, rows = weight.shape[:2]
    message = f"counts must have shape [..., {problems}, {rows}], got {list(counts.shape)}"
    _value(op, counts.dim() >= 2, message)
    _value(op, counts.shape[-2] == problems, message)
    _value(op, counts.shape[-1] == rows, message)
    _divides(op, "block", block, weight)
    blocks = weight.shape[2] // block
    _value(op, order.shape[2] <= blocks, f"order must have at most {blocks} blocks per row, got {order.shape[2]}")
    return weight.new_empty((*counts.shape, weight.shape[2]))


@torch.library.register_fake("spade_fast::sparsegpt")
def _(
    weight: Tensor,
    factor: Tensor,
    counts: Tensor,
    mask_block: int,
    n: int,
    m: int,
    include_ties: bool,
    keep_zeros: bool,
    of_inverse: bool,
) -> tuple[Tensor, Tensor]:
    op = "sparsegpt"
    _problem(op, weight, factor=factor)
    _value(op, mask_block >= 1, f"mask_block must be at least 1, got {mask_block}")
    _value(op, 0 <= n <= m, f"n and m must fulfil 0 <= n <= m, got n = {n}, m = {m}")
    if m > 0:
        _divides(op, "m", m, weight)
    else:
        _integer(op, "counts", counts)
        _same_device(op, "counts", counts, "weight", weight)
        _shape(op, "counts", counts, (weight.shape[0], -(-weight.shape[2] // mask_block)))
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])
