"""SparseGPT, factor and sweep, with the mask blocks and the threshold of the published code."""

from __future__ import annotations

from collections.abc import Callable

import published
import textbook
import torch
from checks import assert_same_pruning
from device import ON_CUDA, cuda_only, to_device
from measuring import OURS, TEXTBOOK, THREADS, Case, by_implementation
from shapes import BYTES, Weights
from torch import Tensor, nn

from spade_fast import ops
from spade_fast.ops import reference

_SPARSITY, _DAMPING = 0.9, 0.01


def _of_hessian(shape: Weights) -> bool:
    """Whether the solver takes the factor of the Hessian itself."""
    return not ON_CUDA and 384 * shape.rows < shape.columns**2


def _sparsegpt(shape: Weights, ratio_goal: float | None) -> Case:
    matrix, weights = shape.columns**2, shape.problems * shape.rows * shape.columns
    at_hand = THREADS if shape.problems >= THREADS else 1
    return Case(
        "sparsegpt",
        f"{shape.problems} x {shape.rows}x{shape.columns}, mask block {shape.block}",
        shape,
        work=shape.problems * ((2 - _of_hessian(shape)) * shape.columns**3 / 3 + shape.rows * shape.columns**2),
        # Of both ops: the allocator may keep the memory of one while the other runs.
        stated=BYTES * ((shape.problems + at_hand) * matrix + (2 + _of_hessian(shape)) * weights),
        ratio_goal=ratio_goal,
    )


CASES = [
    _sparsegpt(Weights(1000, 2048), 10),  # ResNet-50, classifier
    _sparsegpt(Weights(512, 4608, block=9), 3),  # ResNet-50, 3x3 of the last stage
    _sparsegpt(Weights(512, 1024, problems=8), 10),  # ResNet-50, 1x1, eight samples
    _sparsegpt(Weights(3072, 768), None),  # ViT-B/16, MLP
    _sparsegpt(Weights(64, 64), 1),  # ResNet-50, 1x1 of the first stage
    *cuda_only(_sparsegpt(Weights(1000, 2048, problems=8), None), _sparsegpt(Weights(512, 1024, problems=64), None)),
]


def _removals(shape: Weights) -> Tensor:
    """Weights to remove, as published: one more of each mask block than the sparsity says."""
    sizes = [shape.rows * min(shape.block, shape.columns - start) for start in range(0, shape.columns, shape.block)]
    return torch.tensor([int(size * _SPARSITY) + 1 for size in sizes]).repeat(shape.problems, 1)


def _ours(weight: Tensor, hessian: Tensor, counts: Tensor, block: int) -> Tensor:
    damp = _DAMPING * hessian.diagonal(dim1=1, dim2=2).mean(1)
    of_hessian = _of_hessian(Weights(*weight.shape[1:], block))
    factor, _ = (ops.reverse_cholesky if of_hessian else ops.inverse_cholesky)(hessian, damp)
    return ops.sparsegpt(weight, factor, counts, block, include_ties=True, of_inverse=not of_hessian)[0]


def _by_textbook(weight: Tensor, hessian: Tensor, block: int) -> Tensor:
    pairs = zip(weight, hessian, strict=True)
    return torch.stack([textbook.sparsegpt(w, h, _SPARSITY, block, _DAMPING) for w, h in pairs])


def _by_published(weight: Tensor, hessian: Tensor, block: int) -> Tensor:
    """The published class prunes one layer for several samples; each sample has a layer for its result."""
    layers = [nn.Linear(*weight.shape[:0:-1], bias=False, device=weight.device) for _ in weight]
    layers[0].weight.data = weight[0].clone()
    with published.running() as classes:
        solver = classes.SparseGPTSuperFast(layers[0], len(layers))
        solver.H = hessian.clone()  # it damps in place
        solver.fasterprune(_SPARSITY, layers, blocksize=block, percdamp=_DAMPING)
    return torch.stack([layer.weight.detach() for layer in layers])


def _assert_like_oracle(block: int) -> None:
    """Compare with the tests' oracle on a problem small enough for it."""
    shape = Weights(48, 20 * block if block > 1 else 150, block, problems=2)
    weight, hessian = shape.random_problem()
    counts = _removals(shape)
    damp = _DAMPING * hessian.diagonal(dim1=1, dim2=2).mean(1)
    factor, _ = reference.inverse_cholesky(hessian, damp)
    truth, _ = reference.sparsegpt(weight, factor, counts, block, include_ties=True)
    result = _ours(*to_device(weight, hessian, counts), block).cpu()
    for problem in zip(weight, hessian, result, truth, strict=True):
        assert_same_pruning(*problem, flips=2e-2, error=5e-3)


@by_implementation(CASES)
def test_sparsegpt(case: Case, implementation: str, report: Callable[..., None]) -> None:
    shape: Weights = case.shape
    weight, hessian = shape.random_problem()
    weight[:] = weight[0].clone()  # the same layer for all samples
    *given, counts = to_device(weight, hessian, _removals(shape))

    def check(result: Tensor) -> None:
        # Two scores next to a threshold may be equal in float32, and all later columns depend on which is removed.
        _assert_like_oracle(shape.block)
        other = _by_textbook if implementation == OURS else lambda w, h, block: _ours(w, h, counts, block)
        expected = other(*given, shape.block).cpu()
        for problem in zip(weight, hessian, result, expected, strict=True):
            assert_same_pruning(*problem, flips=2e-2, error=5e-3)

    if implementation == OURS:
        report(case, implementation, lambda: _ours(*given, counts, shape.block), check)
    else:
        run = _by_textbook if implementation == TEXTBOOK else _by_published
        once = False if shape.columns <= 64 else None
        report(case, implementation, lambda: run(*given, shape.block), check, once=once)
