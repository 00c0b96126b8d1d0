"""The native ops. Each takes a leading batch of independent problems, in float32 or float64.

There are kernels for the CPU and, where the build has them, for CUDA. Tensors on another device are computed on the
CPU, and the results are returned on the device the inputs came from. On a GPU no op waits for the device or copies to
the host; what would have to be looked at there for an error is said where it applies.

What a docstring says of memory comes on top of inputs and results; inputs that are not contiguous are copied besides,
unless it says that any strides are read in place. Shapes: S samples, B problems (samples x groups), R rows (outputs),
C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spade_fast.ops._native import _C

_ops = torch.ops.spade_fast


def simd_level() -> str:
    """Name of the instruction set in use: ``generic``, ``avx2`` or ``avx512``."""
    return _C.simd_level()


def simd_levels() -> list[str]:
    """Names of the instruction sets that this processor can use, narrowest first."""
    return _C.simd_levels()


def set_simd_level(name: str) -> None:
    """Choose an instruction set, for tests and measurements. ValueError for one that is not in `simd_levels()`."""
    _C.set_simd_level(name)


_NATIVE = {"cpu", "meta", "cuda"} if _C.build_info()["cuda"] else {"cpu", "meta"}


def _home(tensor: Tensor) -> torch.device:
    """Where to compute: the tensor's own device if it has native kernels (or only shapes), else the CPU."""
    return tensor.device if tensor.device.type in _NATIVE else torch.device("cpu")


def _in_place(op: Callable[..., None], gram: Tensor, *arguments: Any) -> Tensor:
    home = _home(gram)
    work = gram.to(home)
    op(work, *(a.to(home) if isinstance(a, Tensor) else a for a in arguments))
    return gram if work is gram else gram.copy_(work)


def gram_linear_(gram: Tensor, x: Tensor) -> Tensor:
    """Add the Gram matrix of a linear layer's inputs to the upper triangle of `gram`, in place.

    Parameters
    ----------
    gram : Tensor [S, C, C], contiguous
        Changed in the upper triangle, diagonal included; below it the contents are unspecified until `mirror_upper_`.
    x : Tensor [S, N, C]
        Inputs, one row a position, of the dtype of `gram`; or bfloat16, which is summed into a float32 `gram`.

    Returns
    -------
    Tensor
        `gram`.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit; `gram` is then unchanged.

    Notes
    -----
    ``X Xᵀ`` of SPADE (arXiv 2310.04519, section 3) before its scaling by 2/n. Takes at most 128 MB for sums that are
    collected apart from each other, and 2 MB a thread; bfloat16 that is not multiplied as such is copied to float32.
    On a GPU: at most 256 MB for such sums.
    """
    return _in_place(_ops.gram_linear_, gram, x)


def gram_conv2d_(
    gram: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Add the Gram matrices of a convolution's im2col columns to the upper triangles of `gram`, in place.

    Parameters
    ----------
    gram : Tensor [S, G, K, K], contiguous
        One matrix per sample and group of the convolution, K = kh · kw · C / G, columns in the order
        (kh, kw, in-channel).
        Changed in the upper triangle, diagonal included; below it the contents are unspecified until `mirror_upper_`.
    x : Tensor [S · n, C, H, W], any memory format
        Inputs, of the dtype of `gram`; or bfloat16, which is summed into a float32 `gram`. Images s·n … (s+1)·n belong
        to sample s. Any strides are read in place; bfloat16 is fast in channels-last memory.
    kernel_size, stride, padding, dilation : pairs of int
        Of the convolution; padding is with zeros.

    Returns
    -------
    Tensor
        `gram`.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or a setting does not fit; `gram` is then unchanged.

    Notes
    -----
    Equals im2col followed by ``X Xᵀ`` (SPADE, arXiv 2310.04519, section 3), but im2col is never built: pairs of kernel
    taps at the same distance share their products. Takes at most 128 MB for sums that are collected apart from each
    other, and 2 MB a thread; bfloat16 that is not multiplied as such is copied to float32. On a GPU: at most 256 MB for
    such sums.
    """
    return _in_place(_ops.gram_conv2d_, gram, x, kernel_size, stride, padding, dilation)


def mirror_upper_(gram: Tensor) -> Tensor:
    """Copy the upper triangle of each matrix of `gram` [..., C, C] (contiguous) onto the lower one, in place."""
    return _in_place(_ops.mirror_upper_, gram)


def inverse_cholesky(hessian: Tensor, damp: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Upper triangular `U` with ``UᵀU = (H + damp·I)⁻¹``.

    Parameters
    ----------
    hessian : Tensor [B, C, C]
        Symmetric.
    damp : float or Tensor [B]
        Added to the diagonal of each problem.

    Returns
    -------
    factor : Tensor [B, C, C]
        Undefined for a problem whose info is not 0.
    info : Tensor [B], int32
        0, or the order of the leading minor (in reversed column order) that is not positive definite.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit.

    Notes
    -----
    The Cholesky form of the inverse that SparseGPT walks through (arXiv 2301.00774, section 3.3), from one
    factorisation of the reversed matrix and one triangular inverse. Takes one more matrix of the size of a problem's
    for each problem at hand: one, or as many as there are threads if there are at least that many problems. On a GPU
    it is torch's batched linear algebra, and takes four times the size of `hessian`.
    """
    home = _home(hessian)
    if isinstance(damp, Tensor):
        damping = damp.to(home, hessian.dtype).expand(hessian.shape[0] if damp.ndim == 0 else damp.shape)
    else:
        damping = torch.full(hessian.shape[:1], damp, dtype=hessian.dtype, device=home)
    factor, info = _ops.inverse_cholesky(hessian.to(home), damping)
    return factor.to(hessian.device), info.to(hessian.device)


def obs_path(weight: Tensor, hinv: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """Pruning path of every row: the order in which exact OBS removes its weights, and the loss of each removal.

    Parameters
    ----------
    weight : Tensor [B, R, C]
    hinv : Tensor [B, C, C]
        Inverse Hessians, symmetric positive definite.
    block : int
        Columns removed together; blocks are neighbouring columns. Must divide C.

    Returns
    -------
    order : Tensor [B, R, C / block], int32
        Blocks in order of removal. Among equal scores the lowest block goes first.
    losses : Tensor [B, R, C / block]
        Increase of ½ δᵀHδ by each removal, half of OBS's score.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or `block` does not fit.

    Notes
    -----
    ExactOBS of OBC (arXiv 2208.11580, algorithm 1; blocks: section 4), computed as a pivoted Cholesky factorisation of
    each row's own copy of `hinv`. Per thread it takes a workspace of C² values, and once the size of `hinv` for blocks.
    On a GPU as many rows are at work as an eighth of its memory holds, 2 C² values for each, or one.
    """
    home = _home(weight)
    order, losses = _ops.obs_path(weight.to(home), hinv.to(home), block)
    return order.to(weight.device), losses.to(weight.device)


def nm_path(weight: Tensor, hinv: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Pruning path of every row under an n:m pattern: `n` of every `m` neighbouring columns are removed.

    Parameters
    ----------
    weight : Tensor [B, R, C]
    hinv : Tensor [B, C, C]
        Inverse Hessians, symmetric positive definite.
    n, m : int
        0 <= n <= m; m must divide C.

    Returns
    -------
    order : Tensor [B, R, C / m · n], int32
        Columns in order of removal.
    losses : Tensor [B, R, C / m · n]
        Increase of ½ δᵀHδ by each removal.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape, `n` or `m` does not fit.

    Notes
    -----
    The n:m variant of ExactOBS (arXiv 2208.11580, section 4). Per thread it takes a workspace of C² values. On a GPU as
    many rows are at work as an eighth of its memory holds, 2 C² values for each, or one.
    """
    home = _home(weight)
    order, losses = _ops.nm_path(weight.to(home), hinv.to(home), n, m)
    return order.to(weight.device), losses.to(weight.device)


def obs_solution(
    weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int = 1
) -> Tensor:
    """Optimal weights of every row once the first `counts` entries of its `order` are removed, for one or more levels.

    Parameters
    ----------
    weight : Tensor [B, R, C]
        Dense weights.
    hessian, hinv : Tensor [B, C, C]
        The Hessian and its inverse; each row uses the one that gives the smaller system.
    order : Tensor [B, R, P], int32 or int64
        Blocks in order of removal, as from `obs_path` or `nm_path`.
    counts : Tensor [..., B, R], int32 or int64
        Blocks to remove from each row, 0 … P. Leading dimensions are levels of sparsity; levels of one call share
        their factorisations.
    block : int
        Columns of a block.

    Returns
    -------
    Tensor [..., B, R, C]
        Removed weights are exactly 0. Rows with a count of 0 are unchanged.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape, an entry of `order` or a count does not fit.
    torch.linalg.LinAlgError
        If a restricted Hessian is not positive definite in the given precision.

    Notes
    -----
    The group OBS update (arXiv 2208.11580, equation 4) for the whole set at once, so that no path of weights is stored.
    Per thread it takes a workspace of n (n + 100) values. For one level n is the smaller of the two counts (removed,
    kept), at most C/2; for several at most 0.63 C. On a GPU as many rows are at work as an eighth of its memory
    holds, C²/4 values for each, or one.

    On a GPU values are not looked at: entries of `order` and counts out of range raise nothing (such a row is
    undefined), and the kept weights of a row whose restricted Hessian is not positive definite are not a number.
    """
    home = _home(weight)
    given = (t.to(home) for t in (weight, hessian, hinv, order, counts))
    return _ops.obs_solution(*given, block).to(weight.device)


def sparsegpt(
    weight: Tensor,
    factor: Tensor,
    counts: Tensor,
    mask_block: int,
    *,
    n: int = 0,
    m: int = 0,
    include_ties: bool = False,
) -> tuple[Tensor, Tensor]:
    """Prune with SparseGPT: one sweep over the columns, each removal corrected in the columns to its right.

    Parameters
    ----------
    weight : Tensor [B, R, C]
    factor : Tensor [B, C, C]
        Upper factors of the inverse Hessians, from `inverse_cholesky`.
    counts : Tensor [B, ceil(C / mask_block)], int32 or int64
        Weights to remove in each mask block, over all rows. Not used in n:m mode.
    mask_block : int
        Neighbouring columns whose mask is chosen together, when the sweep reaches them: the smallest w²/U_jj² go; among
        equals the lowest column, then the lowest row.
    n, m : int
        With m > 0: remove the n smallest of every m neighbouring columns of each row instead. m must divide C.
    include_ties : bool
        Remove every weight whose score equals the largest one removed, as the published ``score <= threshold`` does.

    Returns
    -------
    pruned : Tensor [B, R, C]
        Removed weights are exactly 0.
    losses : Tensor [B, R]
        Sum over the removed weights of ½ w²/U_jj², the increase of ½ δᵀHδ.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape, a count, `mask_block`, `n` or `m` does not fit.

    Notes
    -----
    SparseGPT (arXiv 2301.00774, algorithm 1) with its two block sizes told apart: masks are chosen per `mask_block`,
    trailing updates are applied about every 128 columns, which changes speed and rounding only. It takes one more copy
    of `weight` and, for each problem at hand, 128 (R + C) values. On a GPU updates are applied about every 32 columns,
    all problems are at hand with (33 + 2 `mask_block`) R values each, and counts out of range are clamped, not
    reported.
    """
    home = _home(weight)
    given = (t.to(home) for t in (weight, factor, counts))
    pruned, losses = _ops.sparsegpt(*given, mask_block, n, m, include_ties)
    return pruned.to(weight.device), losses.to(weight.device)


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
