"""The algorithms as the papers write them, in plain float32 torch: what the benchmarks compare with.

Straightforward on purpose, and close to the published code in what it computes and stores: im2col for Hessians, one
rank-1 (or rank-``block``) update of every row's own inverse Hessian for each removal, 32 rows at a time, all weight
vectors along the path kept, and a full update of the later columns after each mask block of SparseGPT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_AT_ONCE = 32


def linear_hessian(x: Tensor) -> Tensor:
    """``2/n Σ x xᵀ`` over the ``n`` rows of ``x``."""
    return 2 / len(x) * (x.t() @ x)


def conv_hessian(x: Tensor, kernel: int, stride: int, padding: int, groups: int = 1) -> Tensor:
    """``2/n Σ x xᵀ`` over the im2col columns of ``n`` images: ``[groups, K, K]``, ordered (in-channel, kh, kw)."""
    columns = F.unfold(x, kernel, padding=padding, stride=stride)
    columns = columns.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return 2 / len(x) * (columns @ columns.mT)


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Upper ``U`` with ``UᵀU = H⁻¹``, by way of the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def obs_paths(weight: Tensor, hessian: Tensor, block: int = 1, n: int = 0, m: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Exact OBS (OBC, arXiv 2208.11580, Algorithm 1).

    Parameters
    ----------
    weight : Tensor ``[R, C]``
    hessian : Tensor ``[C, C]``
    block : int
        Neighbouring columns removed together.
    n, m : int
        With m > 0: remove single columns until n of every m neighbouring ones are removed.

    Returns
    -------
    losses : Tensor ``[R, removals]``
    paths : list of Tensor ``[removals + 1, rows, C]``
        Weights after every removal, for each chunk of rows.
    """
    hinv = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    chunks = [_removals(rows, hinv, block, n, m) for rows in weight.split(ROWS_AT_ONCE)]
    return torch.cat([losses for losses, _ in chunks]), [path for _, path in chunks]


def _removals(weight: Tensor, hinv: Tensor, block: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    blocks = columns // block
    steps = columns // m * n if m > 0 else blocks
    w, inverse = weight.clone(), hinv.repeat(rows, 1, 1)
    path = w.new_empty(steps + 1, rows, columns)
    path[0] = w
    losses = w.new_empty(rows, steps)
    gone = torch.zeros(rows, blocks, dtype=torch.bool, device=w.device)
    each, every = torch.arange(rows, device=w.device), torch.arange(blocks, device=w.device)
    for step in range(steps):
        if block == 1:
            scores = w.square() / inverse.diagonal(dim1=1, dim2=2)
        else:
            diagonal = inverse.reshape(rows, blocks, block, blocks, block)[:, every, :, every].transpose(0, 1)
            diagonal = torch.where(gone[:, :, None, None], torch.eye(block, device=w.device), diagonal)
            inverted = torch.cholesky_inverse(torch.linalg.cholesky(diagonal))
            values = w.reshape(rows, blocks, 1, block)
            scores = (values @ inverted @ values.mT).flatten(1)
        scores[gone] = math.inf
        if m > 0:
            scores[(gone.unflatten(1, (-1, m)).sum(2) >= n).repeat_interleave(m, 1)] = math.inf
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
    kept = zip(paths, counts, strict=True)
    return torch.cat([path[count, torch.arange(len(count), device=path.device)] for path, count in kept])


def solution(weight: Tensor, hessian: Tensor, removed: Tensor) -> Tensor:
    """Best weights ``[R, C]`` for a mask of removed ones: the normal equations of each row's kept weights."""
    result = torch.zeros_like(weight)
    for w, gone, out in zip(weight, removed, result, strict=True):
        kept = ~gone
        lower = torch.linalg.cholesky(hessian[kept][:, kept])
        out[kept] = w[kept] + torch.cholesky_solve((hessian[kept][:, gone] @ w[gone])[:, None], lower)[:, 0]
    return result


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, mask_block: int, damping: float) -> Tensor:
    """SparseGPT (arXiv 2301.00774, Algorithm 1) and the published threshold: it removes ``int(weights * s) + 1``."""
    w = weight.clone()
    columns = w.shape[1]
    identity = torch.eye(columns, device=w.device)
    factor = inverse_cholesky(hessian + damping * hessian.diagonal().mean() * identity)
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


class SparseGPT:
    """Hessian and solver of one layer, for :func:`prune_by_hooks`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.hessian: Tensor | float = 0.0
        self.images = 0

    def add_batch(self, x: Tensor, out: Tensor) -> None:
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            new = conv_hessian(x, layer.kernel_size[0], layer.stride[0], layer.padding[0])[0]  # type: ignore[arg-type]
        else:
            new = linear_hessian(x)
        total = self.images + len(x)
        self.hessian = self.hessian * (self.images / total) + new * (len(x) / total)
        self.images = total

    def fasterprune(self, sparsity: float, blocksize: int) -> None:
        weight = self.layer.weight.data
        assert isinstance(self.hessian, Tensor)
        pruned_matrix = sparsegpt(weight.flatten(1), self.hessian, sparsity, blocksize, 0.01)
        self.layer.weight.data = pruned_matrix.reshape(weight.shape)


def prune_by_hooks(
    model: nn.Module,
    images: Tensor,
    batch: int,
    layers: Collection[str],
    sparsity: float,
    solver: Callable[[nn.Module], Any],
    prune: Callable[[Any, float, int], object],
) -> tuple[dict[str, Tensor], float]:
    """FastSPADE as published: hooks collect Hessians batch by batch, then one layer after another is pruned in place.

    Parameters
    ----------
    layers
        Names of the linear and convolutional modules to prune.
    solver
        Makes the solver of a layer, with a method ``add_batch(inputs, outputs)``.
    prune
        Called with a solver, the sparsity and the number of columns in a mask block: as many as a kernel has taps.

    Returns
    -------
    weights : dict of Tensor
        The pruned weight of each layer.
    seconds : float
        Spent on Hessians and solvers, without the network's own forward pass.
    """
    modules = {name: module for name, module in model.named_modules() if name in layers}
    solvers = {name: solver(module) for name, module in modules.items()}
    seconds = 0.0

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal seconds
            start = time.perf_counter()
            solvers[name].add_batch(inputs[0], output)
            seconds += time.perf_counter() - start

        return hook

    handles = [module.register_forward_hook(collect(name)) for name, module in modules.items()]
    with torch.no_grad():
        for part in images.split(batch):
            model(part)
        for handle in handles:
            handle.remove()
        start = time.perf_counter()
        for name, module in modules.items():
            prune(solvers[name], sparsity, math.prod(getattr(module, "kernel_size", (1,))))
            solvers[name] = None
    seconds += time.perf_counter() - start
    return {name: module.weight.detach() for name, module in modules.items()}, seconds
