"""Structured OBS, which removes whole input columns, the same ones in all rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def structured_path(weight: Tensor, hinv: Tensor, size: int) -> Iterator[Tensor]:
    """Remove groups of neighbouring columns greedily, in float64; yield the weights after each removal.

    The score of a group B is ``Σ_r w_rBᵀ ([H⁻¹]_BB)⁻¹ w_rB`` (OBC, arXiv 2208.11580, section 4, with one mask for all
    rows). ``H⁻¹`` itself is never updated; instead, each new pivot row is corrected by the earlier ones.

    Parameters
    ----------
    weight : Tensor ``[R, C]``
    hinv : Tensor ``[C, C]``
    size : int
        Columns per group; divides C.

    Yields
    ------
    Tensor ``[R, C]``
        Weights after 1, 2, … C / size removals.
    """
    weight, hinv = weight.double(), hinv.double()
    rows, columns = weight.shape
    groups = columns // size
    every = torch.arange(groups, device=weight.device)
    gone = torch.zeros(groups, dtype=torch.bool, device=weight.device)
    diagonal = hinv.reshape(groups, size, groups, size)[every, :, every, :].clone()
    pivots, ratios = torch.empty_like(hinv), torch.empty_like(hinv)
    for step in range(groups):
        done = step * size
        grouped = weight.reshape(rows, groups, size).transpose(0, 1)
        scaled = torch.linalg.solve(diagonal, grouped, left=False)
        scores = (scaled * grouped).sum((1, 2)).masked_fill(gone, torch.inf)
        best = int((scores == scores.min()).nonzero()[0])
        span = slice(best * size, (best + 1) * size)
        new = slice(done, done + size)
        pivots[new] = hinv[span] - pivots[:done, span].mT @ ratios[:done]
        ratios[new] = torch.linalg.solve(diagonal[best], pivots[new])
        weight = weight - scaled[best] @ pivots[new]
        gone[best] = True
        weight.reshape(rows, groups, size)[:, gone] = 0
        yield weight
        by_group = [t[new].reshape(size, groups, size).transpose(0, 1) for t in (pivots, ratios)]
        diagonal -= by_group[0].mT @ by_group[1]
        diagonal[gone] = torch.eye(size, dtype=diagonal.dtype, device=diagonal.device)
