"""Random layer-wise problems for the tests of the solvers."""

from __future__ import annotations

import torch
from torch import Tensor


def random_problem(
    problems: int, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0, damp: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, R, C], Hessians [B, C, C] of correlated inputs, and their inverses, all rounded from float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(problems, columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(problems, columns, 2 * columns + 3, generator=generator, dtype=torch.float64)
    inputs = inputs + mixing @ inputs / max(columns, 1) ** 0.5
    hessian = 2 * inputs @ inputs.mT / inputs.shape[2]
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1) if columns else torch.zeros(problems, dtype=torch.float64)
    hessian = hessian + damp * mean[:, None, None] * torch.eye(columns, dtype=torch.float64)
    weight = torch.randn(problems, rows, columns, generator=generator, dtype=torch.float64)
    hinv = torch.cholesky_inverse(torch.linalg.cholesky(hessian)) if columns else hessian
    return weight.to(dtype), hessian.to(dtype), hinv.to(dtype)


def layer_errors(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """½ δᵀHδ of every row, in float64. Shapes [B, R, C], [B, R, C], [B, C, C] -> [B, R]."""
    change = (pruned - weight).double()
    return ((change @ hessian.double()) * change).sum(2) / 2
