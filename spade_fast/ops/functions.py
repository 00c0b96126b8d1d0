"""The documented Python function of each native op.

Each op takes a leading batch of independent problems, in float32 or float64. It has kernels for the CPU and, if the
build includes them, for CUDA. Tensors on any other device are processed on the CPU, and the results are returned on the
device of the inputs. On a GPU no op synchronises or copies to the host; errors that depend on values are therefore not
raised there, as the docstrings of the ops concerned state.

No op has gradients: results never require grad, and inputs that do are used as constants.

Memory is stated in addition to inputs and results. Inputs that are not contiguous are also copied, unless the docstring
states that any strides are read in place.

Shapes: S samples, B problems (samples x groups), G groups, R rows (outputs), C columns (inputs), N positions or images.
In the shape of images, ``[N, C, H, W]``, C stands for channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError
from spade_fast.ops import arguments

_ops = torch.ops.spade_fast


def _in_place(op: str, *integers: Any, gram: Tensor, **others: Any) -> Tensor:
    work, *rest = arguments.tensors(op, gram=gram, **others)
    if arguments.is_negated(gram):
        raise InvalidValueError(f"{op}: gram must not be the negated view of another tensor")
    if gram.requires_grad and torch.is_grad_enabled():
        raise InvalidValueError(f"{op}: gram must not require grad, because it is updated in place without gradients")
    # Inputs of either sign have the same Gram matrix; torch would copy negated ones, and hide whose memory they share.
    rest = [torch._neg_view(other) if arguments.is_negated(other) else other for other in rest]
    getattr(_ops, op)(work, *rest, *integers)
    return gram if work is gram else gram.copy_(work)


def gram_linear_(gram: Tensor, x: Tensor) -> Tensor:
    """Add the Gram matrix ``xᵀx`` of a linear layer's inputs to the upper triangle of `gram`, in place.

    Parameters
    ----------
    gram : Tensor ``[S, C, C]``, contiguous
        Updated in the upper triangle and on the diagonal; values below the diagonal are unspecified until
        `mirror_upper_` is called.
    x : Tensor ``[S, N, C]``
        Inputs, one row per position, in the dtype of `gram`; or in bfloat16, which is summed into a float32 `gram`.

    Returns
    -------
    Tensor ``[S, C, C]``
        `gram`.

    Raises
    ------
    TypeError, ValueError
        A dtype or a shape is wrong; `gram` is then unchanged.

    Notes
    -----
    This is ``X Xᵀ`` of SPADE (arXiv 2310.04519, section 3) before it is scaled by 2/n. Memory: at most 128 MB for
    partial sums, and 2 MB per thread; bfloat16 inputs that cannot be multiplied directly are copied to float32. On a
    GPU: at most 256 MB for partial sums.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> ops.mirror_upper_(ops.gram_linear_(torch.zeros(1, 2, 2), x))
    tensor([[[10., 14.],
             [14., 20.]]])
    """
    return _in_place("gram_linear_", gram=gram, x=x)


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
    gram : Tensor ``[S, G, K, K]``, contiguous
        One matrix per sample and group of the convolution, with ``K = kh * kw * C / G`` columns in the order
        (kh, kw, in-channel). Updated in the upper triangle and on the diagonal; values below the diagonal are
        unspecified until `mirror_upper_` is called.
    x : Tensor ``[S * N, C, H, W]``, any memory format
        Inputs, in the dtype of `gram`; or in bfloat16, which is summed into a float32 `gram`. Images ``s * N`` to
        ``(s + 1) * N - 1`` belong to sample ``s``. Any strides are read in place; bfloat16 is fastest in channels-last
        memory.
    kernel_size, stride, padding, dilation : pairs of int
        Geometry of the convolution; it is padded with zeros.

    Returns
    -------
    Tensor ``[S, G, K, K]``
        `gram`.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or the geometry is wrong; `gram` is then unchanged.

    Notes
    -----
    Equivalent to im2col followed by ``X Xᵀ`` (SPADE, arXiv 2310.04519, section 3), but the im2col matrix is never
    built: pairs of kernel taps at the same distance share their products. Memory: at most 128 MB for partial sums, and
    2 MB per thread; bfloat16 inputs that cannot be multiplied directly are copied to float32. On a GPU: at most 256 MB
    for partial sums.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> gram = ops.gram_conv2d_(torch.zeros(1, 1, 27, 27), torch.rand(8, 3, 16, 16), (3, 3), padding=(1, 1))
    """
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    pairs = (arguments.pair("gram_conv2d_", name, value) for name, value in geometry.items())
    return _in_place("gram_conv2d_", *pairs, gram=gram, x=x)


def mirror_upper_(gram: Tensor) -> Tensor:
    """Copy the upper triangle of each matrix onto the lower one, in place.

    Parameters
    ----------
    gram : Tensor ``[..., C, C]``, contiguous

    Returns
    -------
    Tensor ``[..., C, C]``
        `gram`.

    Raises
    ------
    TypeError, ValueError
        The dtype or the shape is wrong.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> ops.mirror_upper_(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    return _in_place("mirror_upper_", gram=gram)


def obs_path(weight: Tensor, hinv: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """Compute the pruning path of every row: the order in which exact OBS removes its weights, and each removal's loss.

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
    hinv : Tensor ``[B, C, C]``
        Inverse Hessians, symmetric positive definite.
    block : int
        Number of neighbouring columns removed together. Must divide C.

    Returns
    -------
    order : Tensor ``[B, R, C / block]``, int32
        Blocks in order of removal. Among equal scores the block of lowest index is removed first.
    losses : Tensor ``[B, R, C / block]``
        Increase of ``½ δᵀHδ`` caused by each removal, which is half the OBS score.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or `block` is wrong.

    Notes
    -----
    ExactOBS of OBC (arXiv 2208.11580, algorithm 1; blocks: section 4), computed as a pivoted Cholesky factorisation of
    each row's copy of `hinv`. Memory: C² values per thread, and with blocks one copy of `hinv`. On a GPU, rows are
    processed together as far as 2 C² values per row fit into an eighth of the device memory (at least one row).

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> order, losses = ops.obs_path(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.eye(3)[None])
    >>> order
    tensor([[[1, 2, 0]]], dtype=torch.int32)
    """
    given = arguments.tensors("obs_path", weight=weight, hinv=hinv)
    order, losses = _ops.obs_path(*given, arguments.integer("obs_path", "block", block))
    return order.to(weight.device), losses.to(weight.device)


def nm_path(weight: Tensor, hinv: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Compute the pruning path of every row under an n:m pattern: `n` of every `m` neighbouring columns are removed.

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
    hinv : Tensor ``[B, C, C]``
        Inverse Hessians, symmetric positive definite.
    n, m : int
        ``0 <= n <= m``; m must divide C.

    Returns
    -------
    order : Tensor ``[B, R, C / m * n]``, int32
        Columns in order of removal.
    losses : Tensor ``[B, R, C / m * n]``
        Increase of ``½ δᵀHδ`` caused by each removal.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape, `n` or `m` is wrong.

    Notes
    -----
    The n:m variant of ExactOBS (arXiv 2208.11580, section 4). Memory: C² values per thread. On a GPU, rows are
    processed together as far as 2 C² values per row fit into an eighth of the device memory (at least one row).

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> order, losses = ops.nm_path(torch.tensor([[[3.0, 1.0, 2.0, 4.0]]]), torch.eye(4)[None], 2, 4)
    >>> order
    tensor([[[1, 2]]], dtype=torch.int32)
    """
    given = arguments.tensors("nm_path", weight=weight, hinv=hinv)
    pattern = arguments.integer("nm_path", "n", n), arguments.integer("nm_path", "m", m)
    order, losses = _ops.nm_path(*given, *pattern)
    return order.to(weight.device), losses.to(weight.device)


def obs_solution(
    weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int = 1
) -> Tensor:
    """Compute the optimal weights of every row after the first `counts` entries of its `order` are removed.

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
        Dense weights.
    hessian, hinv : Tensor ``[B, C, C]``
        The Hessian and its inverse; each row uses whichever gives the smaller system.
    order : Tensor ``[B, R, P]``, int32 or int64
        Blocks in order of removal, as returned by `obs_path` or `nm_path`.
    counts : Tensor ``[..., B, R]``, int32 or int64
        Number of blocks to remove from each row, 0 to P. Leading dimensions are levels of sparsity; the levels of one
        call share their factorisations.
    block : int
        Columns per block.

    Returns
    -------
    Tensor ``[..., B, R, C]``
        Removed weights are exactly 0. Rows with a count of 0 are unchanged.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape, an entry of `order` or a count is wrong.
    torch.linalg.LinAlgError
        A restricted Hessian is not positive definite in the given precision.

    Notes
    -----
    The group OBS update (arXiv 2208.11580, equation 4) for the whole set at once, so that no path of weights is stored.
    Memory: n (n + 100) values per thread. With one level, n is the smaller of the numbers of removed and kept weights,
    at most C/2; with several levels, n is at most 0.63 C. On a GPU, rows are processed together as far as C²/4 values
    per row fit into an eighth of the device memory (at least one row).

    On a GPU values are not checked: entries of `order` or `counts` that are out of range raise no error (the row's
    result is then undefined), and the kept weights of a row whose restricted Hessian is not positive definite are NaN.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> weight, identity = torch.tensor([[[3.0, 1.0, 2.0]]]), torch.eye(3)[None]
    >>> order, losses = ops.obs_path(weight, identity)
    >>> ops.obs_solution(weight, identity, identity, order, torch.tensor([[2]]))
    tensor([[[3., 0., 0.]]])
    """
    given = arguments.tensors("obs_solution", weight=weight, hessian=hessian, hinv=hinv, order=order, counts=counts)
    return _ops.obs_solution(*given, arguments.integer("obs_solution", "block", block)).to(weight.device)


def sparsegpt(
    weight: Tensor,
    factor: Tensor,
    counts: Tensor,
    mask_block: int,
    *,
    n: int = 0,
    m: int = 0,
    include_ties: bool = False,
    keep_zeros: bool = False,
    of_inverse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Prune with SparseGPT: one sweep over the columns; the columns to the right compensate for each removal.

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
    factor : Tensor ``[B, C, C]``
        Upper factors ``U`` of the inverse Hessians, from `inverse_cholesky`; or, with `of_inverse` False, lower factors
        of the Hessians themselves, from `reverse_cholesky`.
    counts : Tensor ``[B, ceil(C / mask_block)]``, int32 or int64
        Number of weights to remove in each mask block, over all rows. Not used in n:m mode.
    mask_block : int
        Number of neighbouring columns whose mask is chosen together, when the sweep reaches them. The weights of
        smallest score ``w² / U_jj²`` are removed; among equal scores the lowest column first, then the lowest row.
    n, m : int
        With ``m > 0``: instead remove the n smallest of every m neighbouring columns of each row. m must divide C.
    include_ties : bool
        Also remove every weight whose score equals the largest one removed, as the published ``score <= threshold``
        does.
    keep_zeros : bool
        Remove the weights that are zero in `weight` before all others, and keep them zero even where a count, or n, is
        smaller than their number. Otherwise compensation changes them like other weights.
    of_inverse : bool
        Which `factor` is given. The results are the same up to rounding.

    Returns
    -------
    pruned : Tensor ``[B, R, C]``
        Removed weights are exactly 0.
    losses : Tensor ``[B, R]``
        Sum of ``½ w² / U_jj²`` over the removed weights, which is the increase of ``½ δᵀHδ``.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape, a count, `mask_block`, `n` or `m` is wrong.

    Notes
    -----
    SparseGPT (arXiv 2301.00774, algorithm 1) with separate block sizes for its two purposes: masks are chosen per
    `mask_block`; trailing updates are applied about every 128 columns, which affects only speed and rounding. Memory:
    one copy of `weight`, or two without `of_inverse`, with `keep_zeros` one byte per weight, and 128 (2 R + C + 300)
    values per problem in progress. Factors of the Hessians are inverted first on a GPU, and for several mask blocks of
    more than 128 columns: two more ``C x C`` matrices per problem. On a GPU, updates are applied about every 32
    columns, all problems are in progress at once with (33 + 2 `mask_block`) R values each, and counts that are out of
    range are clamped without an error.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ops
    >>> pruned, losses = ops.sparsegpt(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.eye(3)[None], torch.tensor([[1]]), 3)
    >>> pruned
    tensor([[[3., 0., 2.]]])
    """
    given = arguments.tensors("sparsegpt", weight=weight, factor=factor, counts=counts)
    sizes = {"mask_block": mask_block, "n": n, "m": m}
    flags = {"include_ties": include_ties, "keep_zeros": keep_zeros, "of_inverse": of_inverse}
    pruned, losses = _ops.sparsegpt(
        *given,
        *(arguments.integer("sparsegpt", name, value) for name, value in sizes.items()),
        *(arguments.flag("sparsegpt", name, value) for name, value in flags.items()),
    )
    return pruned.to(weight.device), losses.to(weight.device)
