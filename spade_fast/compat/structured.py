"""Structured OBS: whole input columns are removed, the same ones for all rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def structured_path(weight: Tensor, hinv: Tensor, size: int) -> Iterator[Tensor]:
    """Weights after each greedy removal of a group of neighbouring columns, in float64.

    The score of a group is ``Σ_r w_rBᵀ([H⁻¹]_BB)⁻¹w_rB`` (OBC, arXiv 2208.11580, section 4, with the rows sharing
    one mask). ``H⁻¹`` itself is never updated: the pivot rows are, by the rows removed before.

    Parameters
    ----------
    weight : Tensor, [R, C]
    hinv : Tensor, [C, C]
    size : int
        Columns of a group; divides ``C``.

    Yields
    ------
    Tensor, [R, C]
        The same tensor, updated, after 1, 2, … C / size removals.
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
