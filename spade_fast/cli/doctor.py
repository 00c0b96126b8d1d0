"""The facts and checks of ``spade-fast doctor``: versions, the machine, and the native ops against their oracle."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spade_fast import ops
from spade_fast._util.versions import library_version, versions_of
from spade_fast.ops import reference
from spade_fast.ops._native import _C

_ROWS, _COLUMNS, _BLOCK = 6, 48, 4
# Largest error relative to the largest value of the oracle, for float32 ops on well-conditioned problems.
_TOLERANCE = 1e-3
GPU_READY = torch.cuda.is_available() and _C.build_info()["cuda"] is not None


@dataclass(frozen=True)
class Check:
    """One op compared with its oracle: what was compared, its error relative to the largest value, and the verdict."""

    op: str
    checked: str
    error: float
    passed: bool


def versions() -> dict[str, str]:
    """Return the versions of all packages that can affect results, and the instruction set in use."""
    found = {"spade_fast": library_version(), "python": platform.python_version(), "torch": torch.__version__}
    found["instruction set"] = ops.simd_level()
    return {**found, **versions_of("numpy", "safetensors", "captum", "torchvision", "matplotlib")}


def describe() -> dict[str, str]:
    """Return versions, instruction sets, threads and the state of CUDA as text to print."""
    facts = versions()
    facts["instruction sets"] = f"{ops.simd_level()} in use, of {', '.join(ops.simd_levels())}"
    del facts["instruction set"]
    facts["threads"] = str(torch.get_num_threads())
    build = _C.build_info()
    facts.update({f"built with {name}": str(value or "none") for name, value in build.items()})
    facts["CUDA in torch"] = torch.version.cuda or "none"
    facts["CUDA device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return facts


def check_ops(device: str = "cpu", seed: int = 0) -> list[Check]:
    """Run every op on a small random problem in float32 and compare it with `spade_fast.ops.reference` in float64."""
    generator = torch.Generator().manual_seed(seed)
    checks = _checks(generator, device)
    return [check if device == "cpu" else replace(check, op=f"{check.op}, {device}") for check in checks]


def _checks(generator: torch.Generator, device: str) -> Iterator[Check]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x = random(1, 5 * _COLUMNS, _COLUMNS)
    weight = random(1, _ROWS, _COLUMNS)
    gram = ops.mirror_upper_(ops.gram_linear_(x.new_zeros(1, _COLUMNS, _COLUMNS), x))
    yield _compare("gram_linear_", "values", gram, reference.gram_linear(x.double()))

    images = random(2, 4, 9, 7)
    expected = reference.gram_conv2d(images.double(), 1, (3, 3), (1, 1), (1, 1), (1, 1))
    conv = ops.mirror_upper_(ops.gram_conv2d_(x.new_zeros(1, 1, 36, 36), images, (3, 3), padding=(1, 1)))
    yield _compare("gram_conv2d_", "values", conv, expected)

    hessian = gram / x.shape[1]
    factor, info = ops.inverse_cholesky(hessian, 0.01)
    expected, _ = reference.inverse_cholesky(hessian.double(), 0.01)
    yield _compare("inverse_cholesky", "values, info", factor, expected, bool((info == 0).all()))

    lower, info = ops.reverse_cholesky(hessian, 0.01)
    expected, _ = reference.reverse_cholesky(hessian.double(), 0.01)
    yield _compare("reverse_cholesky", "values, info", lower, expected, bool((info == 0).all()))

    damped = hessian + 0.01 * torch.eye(_COLUMNS, device=device)
    inverse = factor.mT @ factor
    counts = torch.full((1, _ROWS), _COLUMNS // 2, device=device)
    for block in (1, _BLOCK):
        order, losses = ops.obs_path(weight, inverse, block)
        expected_order, expected = reference.obs_path(weight.double(), inverse.double(), block)
        yield _compare(
            f"obs_path, block {block}", "order, losses", losses, expected, torch.equal(order, expected_order)
        )
    order, losses = ops.nm_path(weight, inverse, 2, 4)
    expected_order, expected = reference.nm_path(weight.double(), inverse.double(), 2, 4)
    yield _compare("nm_path 2:4", "order, losses", losses, expected, torch.equal(order, expected_order))

    order, _ = ops.obs_path(weight, inverse)
    solved = ops.obs_solution(weight, damped, inverse, order, counts)
    expected = reference.obs_solution(weight.double(), damped.double(), inverse.double(), order, counts)
    yield _compare("obs_solution", "mask, weights", solved, expected, torch.equal(solved == 0, expected == 0))

    removals = torch.full((1, _COLUMNS // _BLOCK), _ROWS * _BLOCK // 2, device=device)
    solved, _ = ops.sparsegpt(weight, factor, removals, _BLOCK)
    expected, _ = reference.sparsegpt(weight.double(), factor.double(), removals, _BLOCK)
    yield _compare("sparsegpt", "mask, weights", solved, expected, torch.equal(solved == 0, expected == 0))


def _compare(op: str, checked: str, found: Tensor, expected: Tensor, exact: bool = True) -> Check:
    error = float((found.double().reshape(expected.shape) - expected).abs().max() / expected.abs().max())
    return Check(op, checked, error, exact and error <= _TOLERANCE)
