"""The solvers as the papers write them, in plain float32 torch: what the benchmarks compare with.

Straightforward on purpose, and close to the published code in what it computes and stores: im2col for Hessians, one
rank-1 (or rank-``block``) update of every row's own inverse Hessian for each removal, 32 rows at a time, all weight
vectors along the path kept, and a full update of the later columns after each mask block of SparseGPT.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 32


def conv_hessian(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """``2/n Σ x xᵀ`` over the im2col columns of ``n`` images, float64, columns ordered (in-channel, kh, kw)."""
    columns = F.unfold(x, kernel, padding=padding, stride=stride).transpose(0, 1).flatten(1)
    return 2 / len(x) * (columns @ columns.t()).double()


def obs_paths(weight: Tensor, hessian: Tensor, block: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Exact OBS (OBC, arXiv 2208.11580, Algorithm 1).

    Parameters
    ----------
    weight : Tensor, [R, C]
    hessian : Tensor, [C, C]
    block : int
        Neighbouring columns removed together.

    Returns
    -------
    losses : Tensor, [R, C / block]
    paths : list of Tensor, [C / block + 1, rows, C]
        Weights after every removal, for each chunk of rows.
    """
    hinv = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    chunks = [_removals(rows, hinv, block) for rows in weight.split(ROWS_AT_ONCE)]
    return torch.cat([losses for losses, _ in chunks]), [path for _, path in chunks]


def _removals(weight: Tensor, hinv: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    blocks = columns // block
    w, inverse = weight.clone(), hinv.repeat(rows, 1, 1)
    path = torch.empty(blocks + 1, rows, columns)
    path[0] = w
    losses = torch.empty(rows, blocks)
    gone = torch.zeros(rows, blocks, dtype=torch.bool)
    each, every = torch.arange(rows), torch.arange(blocks)
    for step in range(blocks):
        if block == 1:
            scores = w.square() / inverse.diagonal(dim1=1, dim2=2)
        else:
            diagonal = inverse.reshape(rows, blocks, block, blocks, block)[:, every, :, every].transpose(0, 1)
            diagonal = torch.where(gone[:, :, None, None], torch.eye(block), diagonal)
            inverted = torch.cholesky_inverse(torch.linalg.cholesky(diagonal))
            values = w.reshape(rows, blocks, 1, block)
            scores = (values @ inverted @ values.mT).flatten(1)
        scores[gone] = math.inf
        best = scores.argmin(1)
        losses[:, step] = scores[each, best] / 2
        gone[each, best] = True
        if block == 1:
            pivot = inverse[each, best]
            scale = pivot[each, best]
            w = w - pivot * (w[each, best] / scale)[:, None]
            pivot = pivot / scale.sqrt()[:, None]
            inverse -= torch.bmm(pivot[:, :, None], pivot[:, None, :])
        else:
            pivots = inverse.reshape(rows, blocks, block, columns)[each, best]
            ratio = torch.bmm(inverted[each, best], pivots)
            w = w - torch.bmm(w.reshape(rows, blocks, block)[each, best][:, None], ratio)[:, 0]
            inverse -= torch.bmm(pivots.mT, ratio)
        w[gone.repeat_interleave(block, 1)] = 0
        path[step + 1] = w
    return losses, path


def pruned(losses: Tensor, paths: list[Tensor], sparsity: float) -> Tensor:
    """Weights ``[R, C]`` after the cheapest ``ceil(removals * sparsity)`` removals of all rows."""
    removals = math.ceil(losses.numel() * sparsity)
    chosen = losses.flatten().argsort()[:removals] // losses.shape[1]
    counts = chosen.bincount(minlength=len(losses)).split(ROWS_AT_ONCE)
    return torch.cat([path[count, torch.arange(len(count))] for path, count in zip(paths, counts, strict=True)])


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, mask_block: int, damping: float) -> Tensor:
    """SparseGPT (arXiv 2301.00774, Algorithm 1) with the published threshold: ``int(weights * sparsity) + 1`` go."""
    w = weight.clone()
    columns = w.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    scale = factor.diagonal()
    for start in range(0, columns, mask_block):
        stop = min(start + mask_block, columns)
        scores = (w[:, start:stop] / scale[start:stop]).square()
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        mask = scores <= threshold
        errors = torch.zeros_like(scores)
        for j in range(start, stop):
            errors[:, j - start] = torch.where(mask[:, j - start], w[:, j], 0.0) / scale[j]
            w[:, j:stop] -= torch.outer(errors[:, j - start], factor[j, j:stop])
            w[:, j].masked_fill_(mask[:, j - start], 0)
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w
