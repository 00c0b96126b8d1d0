"""Reference implementations of the native ops in plain float64 torch, against which the tests check the ops.

Every function follows its paper literally and is written for clarity: one weight row at a time, one removal at a time,
no blocking, no shared work.

Inputs of any floating-point dtype are converted to float64, and results are float64. Columns of a convolution are
ordered (kh, kw, in-channel). Among equal scores the lowest index is removed first. Shapes are written as in
:mod:`spade_fast.ops.functions` and :mod:`spade_fast.ops.factors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def gram_linear(x: Tensor) -> Tensor:
    """Compute the Gram matrix ``xᵀx`` of each sample.

    Parameters
    ----------
    x : Tensor ``[S, N, C]``
        N input vectors of each of S samples.

    Returns
    -------
    Tensor ``[S, C, C]``
        Symmetric Gram matrices.
    """
    x = x.double()
    return x.mT @ x


def gram_conv2d(
    x: Tensor,
    groups: int,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    samples: int = 1,
) -> Tensor:
    """Compute the Gram matrices of the im2col columns of a convolution's input.

    Parameters
    ----------
    x : Tensor ``[S * N, C, H, W]``
        Images; N successive ones belong to one sample.
    groups, kernel_size, stride, padding, dilation
        Geometry of the convolution; it is padded with zeros.
    samples : int
        Number of samples S.

    Returns
    -------
    Tensor ``[S, G, K, K]``
        ``K = kh * kw * C / G``, columns ordered (kh, kw, in-channel).
    """
    taps = kernel_size[0] * kernel_size[1]
    images, channels = x.shape[:2]
    columns = F.unfold(x.double(), kernel_size, dilation=dilation, padding=padding, stride=stride)
    columns = columns.reshape(samples, images // samples, groups, channels // groups, taps, -1)
    columns = columns.permute(0, 2, 4, 3, 1, 5).flatten(4).flatten(2, 3)  # [S, G, K, N * positions]
    return columns @ columns.mT


def inverse_cholesky(hessian: Tensor, damp: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the upper factor ``U`` with ``UᵀU = (H + damp I)⁻¹`` from the explicit inverse.

    Parameters
    ----------
    hessian : Tensor ``[B, C, C]``
        Symmetric matrices.
    damp : float or Tensor ``[B]``
        Added to the diagonal.

    Returns
    -------
    factor : Tensor ``[B, C, C]``
        Upper triangular; NaN for problems that are not positive definite.
    info : Tensor ``[B]``, int32
        0 where the matrix is positive definite.
    """
    hessian = hessian.double()
    size = hessian.shape[-1]
    identity = torch.eye(size, dtype=torch.float64, device=hessian.device)
    damping = torch.as_tensor(damp, dtype=torch.float64, device=hessian.device).expand(hessian.shape[0])
    factor = torch.full_like(hessian, math.nan)
    info = torch.zeros(hessian.shape[0], dtype=torch.int32, device=hessian.device)
    for b in range(hessian.shape[0]):
        lower, failed = torch.linalg.cholesky_ex(hessian[b] + damping[b] * identity)
        info[b] = failed
        if failed == 0:
            factor[b] = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor, info


def reverse_cholesky(hessian: Tensor, damp: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the lower factor ``L`` with ``LᵀL = H + damp I``, as that of `inverse_cholesky` inverted and transposed.

    Parameters
    ----------
    hessian : Tensor ``[B, C, C]``
        Symmetric matrices.
    damp : float or Tensor ``[B]``
        Added to the diagonal.

    Returns
    -------
    factor : Tensor ``[B, C, C]``
        Lower triangular; NaN for problems that are not positive definite.
    info : Tensor ``[B]``, int32
        0 where the matrix is positive definite.
    """
    upper, info = inverse_cholesky(hessian, damp)
    factor = torch.full_like(upper, math.nan)
    identity = torch.eye(upper.shape[2], dtype=upper.dtype, device=upper.device)
    for each in (info == 0).nonzero().flatten():
        factor[each] = torch.linalg.solve_triangular(upper[each], identity, upper=True).mT
    return factor, info


def obs_path(weight: Tensor, hinv: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """Compute order and losses of greedy exact OBS removal (OBC, arXiv 2208.11580, algorithm 1).

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
        Rows of each problem.
    hinv : Tensor ``[B, C, C]``
        Inverse Hessians, one for all rows of a problem.
    block : int
        Number of neighbouring columns that are removed together; divides C.

    Returns
    -------
    order : Tensor ``[B, R, C / block]``, int32
        Block indices in order of removal.
    losses : Tensor ``[B, R, C / block]``
        Half the score of each removal, ``½ w_Bᵀ ([H⁻¹]_BB)⁻¹ w_B`` when it is made.
    """
    blocks = weight.shape[2] // block

    def anything_left(order: list[int], candidate: int) -> bool:
        return candidate not in order

    return _path(weight, hinv, block, blocks, anything_left)


def nm_path(weight: Tensor, hinv: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Compute order and losses of greedy exact OBS that removes `n` of every `m` neighbouring columns.

    Parameters
    ----------
    weight, hinv
        As for :func:`obs_path`.
    n, m : int
        A column is a candidate until `n` columns of its group of `m` are removed. `m` divides C.

    Returns
    -------
    order : Tensor ``[B, R, C / m * n]``, int32
    losses : Tensor ``[B, R, C / m * n]``
    """
    steps = weight.shape[2] // m * n

    def group_not_full(order: list[int], candidate: int) -> bool:
        return candidate not in order and sum(removed // m == candidate // m for removed in order) < n

    return _path(weight, hinv, 1, steps, group_not_full)


def _path(
    weight: Tensor, hinv: Tensor, block: int, steps: int, allowed: Callable[[list[int], int], bool]
) -> tuple[Tensor, Tensor]:
    problems, rows, columns = weight.shape
    order = torch.zeros(problems, rows, steps, dtype=torch.int32, device=weight.device)
    losses = torch.zeros(problems, rows, steps, dtype=torch.float64, device=weight.device)
    for b in range(problems):
        for r in range(rows):
            w, inverse = weight[b, r].double(), hinv[b].double()
            removed: list[int] = []
            for step in range(steps):
                candidates = [block_ for block_ in range(columns // block) if allowed(removed, block_)]
                scores = _scores(w, inverse, torch.tensor(candidates, device=w.device), block)
                best = int((scores == scores.min()).nonzero()[0])
                losses[b, r, step] = scores[best] / 2
                removed.append(candidates[best])
                w, inverse = _eliminate(w, inverse, slice(removed[-1] * block, (removed[-1] + 1) * block))
            order[b, r] = torch.tensor(removed, dtype=torch.int32)
    return order, losses


def _scores(w: Tensor, inverse: Tensor, candidates: Tensor, block: int) -> Tensor:
    """Return the score ``w_Bᵀ ([H⁻¹]_BB)⁻¹ w_B`` of each candidate block."""
    columns = candidates[:, None] * block + torch.arange(block, device=w.device)
    values = w[columns]
    if block == 1:
        return values[:, 0] ** 2 / inverse.diagonal()[candidates]
    diagonal_blocks = inverse[columns[:, :, None], columns[:, None, :]]
    return (values * torch.linalg.solve(diagonal_blocks, values)).sum(1)


def _eliminate(w: Tensor, inverse: Tensor, gone: slice) -> tuple[Tensor, Tensor]:
    """Return weights and inverse Hessian after the weights `gone` are set to zero (OBC, equations 3 and 4)."""
    ratio = torch.linalg.solve(inverse[gone, gone], inverse[gone])
    w = w - w[gone] @ ratio
    w[gone] = 0
    return w, inverse - inverse[:, gone] @ ratio


def obs_solution(
    weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int = 1
) -> Tensor:
    """Compute optimal weights after the first removals of each row from the normal equations of the kept weights.

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
    hessian : Tensor ``[B, C, C]``
    hinv : Tensor ``[B, C, C]``
        Not used; it is here so that the signature is that of the op.
    order : Tensor ``[B, R, P]``
        Block indices in order of removal.
    counts : Tensor ``[..., B, R]``
        Number of removals of each row, at any number of levels.
    block : int
        Columns per block.

    Returns
    -------
    Tensor ``[..., B, R, C]``
        Removed weights are exactly 0.
    """
    if counts.ndim > 2:
        return torch.stack([obs_solution(weight, hessian, hinv, order, level, block) for level in counts])
    result = weight.double().clone()
    within = torch.arange(block, device=weight.device)
    for b in range(weight.shape[0]):
        h = hessian[b].double()
        for r in range(weight.shape[1]):
            gone = order[b, r, : int(counts[b, r])].long()
            removed = torch.zeros(weight.shape[2], dtype=torch.bool, device=weight.device)
            removed[(gone[:, None] * block + within).flatten()] = True
            w = result[b, r].clone()
            correction = torch.linalg.solve(h[~removed][:, ~removed], h[~removed][:, removed] @ w[removed])
            result[b, r, ~removed] = w[~removed] + correction
            result[b, r, removed] = 0
    return result


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
    """Prune with SparseGPT (arXiv 2301.00774, algorithm 1), one column after another.

    Parameters
    ----------
    weight : Tensor ``[B, R, C]``
    factor : Tensor ``[B, C, C]``
        Upper factors ``U`` with ``UᵀU = (H + damp I)⁻¹``; without `of_inverse` lower ones with ``LᵀL = H + damp I``.
    counts : Tensor ``[B, ceil(C / mask_block)]``, int64
        Number of weights to remove in each mask block, over all rows; ignored in n:m mode.
    mask_block : int
        Number of columns whose mask is chosen together, before any of them is changed.
    n, m : int
        With ``m > 0``: instead remove `n` of every `m` neighbouring columns. Groups start at the beginning of each mask
        block; a shorter last group loses at most `n`. The mask of a group is chosen at its first column.
    include_ties : bool
        Also remove every weight whose score equals the largest removed score. Otherwise equal scores are removed by
        column, then by row.
    keep_zeros : bool
        Remove the weights that are zero in `weight` first, and all of them, even if they are more than `counts` or `n`.
    of_inverse : bool
        Which `factor` is given.

    Returns
    -------
    weight : Tensor ``[B, R, C]``
    losses : Tensor ``[B, R]``
        ``½ Σ (w - q)² / U_jj²`` over the columns.
    """
    result = weight.double().clone()
    losses = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
    columns = weight.shape[2]
    for b in range(weight.shape[0]):
        w, u = result[b], factor[b].double()
        if not of_inverse:
            u = torch.linalg.solve_triangular(u, torch.eye(len(u), dtype=u.dtype, device=u.device), upper=False).mT
        zeros = (w == 0) & keep_zeros
        scale = u.diagonal()
        for index, start in enumerate(range(0, columns, mask_block)):
            stop = min(start + mask_block, columns)
            mask = torch.zeros(w.shape[0], columns, dtype=torch.bool, device=w.device)
            if m == 0:
                scores = (w[:, start:stop] / scale[start:stop]) ** 2
                kept = zeros[:, start:stop]
                mask[:, start:stop] = _smallest(scores.mT, int(counts[b, index]), include_ties, kept.mT).mT
            for j in range(start, stop):
                if m > 0 and (j - start) % m == 0:
                    group = slice(j, min(j + m, stop))
                    scores = (w[:, group] / scale[group]) ** 2
                    for r in range(w.shape[0]):
                        mask[r, group] = _smallest(scores[r], min(n, scores.shape[1]), False, zeros[r, group])
                error = torch.where(mask[:, j], w[:, j], 0.0) / scale[j]
                losses[b] += error**2 / 2
                w[:, j:] -= error[:, None] * u[j, j:]
                w[mask[:, j], j] = 0
    return result, losses


def _smallest(scores: Tensor, count: int, include_ties: bool, first: Tensor) -> Tensor:
    """Return a boolean mask of `first` and, up to a total of `count`, the smallest other scores."""
    mask = first.flatten().clone()
    others = (~mask).nonzero().flatten()
    ranked, positions = scores.flatten()[others].sort(stable=True)
    count = max(0, count - int(mask.sum()))
    mask[others[positions[:count]]] = True
    mask = mask.reshape(scores.shape)
    if include_ties and count > 0:
        mask |= scores <= ranked[count - 1]
    return mask
