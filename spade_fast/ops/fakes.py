"""Fake kernels of the native ops: shapes and dtypes of the results, for `torch.compile` and the meta device."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.ops import _native  # noqa: F401  registers the ops


@torch.library.register_fake("spade_fast::gram_linear_")
def _(gram: Tensor, x: Tensor) -> None:
    return None


@torch.library.register_fake("spade_fast::gram_conv2d_")
def _(
    gram: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    return None


@torch.library.register_fake("spade_fast::mirror_upper_")
def _(gram: Tensor) -> None:
    return None


@torch.library.register_fake("spade_fast::inverse_cholesky")
def _(hessian: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    return hessian.new_empty(hessian.shape), hessian.new_empty(hessian.shape[:1], dtype=torch.int32)


@torch.library.register_fake("spade_fast::obs_path")
def _(weight: Tensor, hinv: Tensor, block: int) -> tuple[Tensor, Tensor]:
    shape = (*weight.shape[:2], weight.shape[2] // block)
    return weight.new_empty(shape, dtype=torch.int32), weight.new_empty(shape)


@torch.library.register_fake("spade_fast::nm_path")
def _(weight: Tensor, hinv: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    shape = (*weight.shape[:2], weight.shape[2] // m * n)
    return weight.new_empty(shape, dtype=torch.int32), weight.new_empty(shape)


@torch.library.register_fake("spade_fast::obs_solution")
def _(weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int) -> Tensor:
    return weight.new_empty((*counts.shape, weight.shape[2]))


@torch.library.register_fake("spade_fast::sparsegpt")
def _(
    weight: Tensor, factor: Tensor, counts: Tensor, mask_block: int, n: int, m: int, include_ties: bool
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])
