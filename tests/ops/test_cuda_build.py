"""The CUDA kernels compile for every default architecture without spills; the build loads without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import conftest
import pytest
import torch
from test_build import load_setup

from spade_fast.ops import _native

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda" / "kernels" / "all.cu"
TOOLKIT = load_setup().toolkit()
OPS = (
    "gram_linear_",
    "gram_conv2d_",
    "mirror_upper_",
    "inverse_cholesky",
    "obs_path",
    "nm_path",
    "obs_solution",
    "sparsegpt",
)
THREADS = {"sm_75": 1024, "sm_80": 2048, "sm_90": 2048}  # that a multiprocessor can hold
needs_toolkit = pytest.mark.skipif(TOOLKIT is None, reason="needs a CUDA toolkit")
needs_cuda_build = pytest.mark.skipif(
    _native._C.build_info()["cuda"] is None, reason="spade_fast was built without CUDA kernels (make cuda-check)"
)


@dataclass(frozen=True)
class Kernel:
    """What the assembler reports about a kernel; `threads` is the largest block it is compiled for."""

    registers: int
    stack: int
    spilled: int
    threads: int

    @property
    def resident(self) -> int:
        """Threads that the 65536 registers of a multiprocessor allow."""
        of_warp = -(-32 * self.registers // 256) * 256
        return 65536 // of_warp // (self.threads // 32) * self.threads


def nvcc(*arguments: str | Path) -> str:
    command = [str(Path(TOOLKIT[0], "bin", "nvcc")), "-std=c++17", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def entries(ptx: str) -> dict[str, int]:
    """Threads per block of each kernel."""
    found = re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.S)
    assert len(found) == ptx.count(".entry ")
    return {name: int(threads) for name, threads in found}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of each architecture: the kernels' PTX, and what the assembler says in ``report``."""
    folders = {architecture: tmp_path_factory.mktemp(architecture) for architecture in THREADS}

    def compile_for(architecture: str) -> None:
        folder = folders[architecture]
        strict = ("-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings")
        report = nvcc(
            f"-arch={architecture}", *strict, "--keep", "--keep-dir", folder, "-cubin", KERNELS, "-o", folder / "out"
        )
        (folder / "report").write_text(report)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_for, folders))
    return folders


@pytest.fixture(scope="module")
def virtual(compiled: dict[str, Path]) -> dict[str, int]:
    """Threads per block of each kernel, from the PTX of the oldest architecture."""
    return entries((compiled["sm_75"] / "all.ptx").read_text())


@needs_toolkit
@pytest.mark.parametrize("architecture", THREADS)
def test_no_spills_and_a_quarter_of_the_threads(
    architecture: str, compiled: dict[str, Path], virtual: dict[str, int]
) -> None:
    report = (compiled[architecture] / "report").read_text()
    kernels = {}
    for text in report.split("Compiling entry function '")[1:]:
        name = text.split("'")[0]
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) ", text).groups()
        registers = re.search(r"Used (\d+) registers", text)[1]
        kernels[name] = Kernel(int(registers), int(stack), int(stores) + int(loads), virtual[name])
    assert kernels.keys() == virtual.keys()
    assert {name: kernel for name, kernel in kernels.items() if kernel.stack or kernel.spilled} == {}
    assert {name: kernel for name, kernel in kernels.items() if kernel.resident < THREADS[architecture] / 4} == {}


@needs_toolkit
@needs_cuda_build
def test_all_kernels_of_the_launchers_are_checked(virtual: dict[str, int]) -> None:
    symbols = subprocess.run(["nm", "-C", _native._C.__file__], capture_output=True, text=True, check=True).stdout
    launched = {f"_{name}" for name in re.findall(r"__device_stub_(_Z\w+)\(", symbols)}
    assert {name.lstrip("_") for name in launched} == {name.lstrip("_") for name in virtual}


@needs_cuda_build
@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_cuda_kernel(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spade_fast::{op}", "CUDA")


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_build_loads_and_torch_gives_its_usual_error() -> None:
    code = """
import torch
from spade_fast import ops
hinv = torch.eye(4)[None]
print(ops.obs_path(torch.ones(1, 2, 4), hinv)[0].tolist())
ops.obs_path(torch.ones(1, 2, 4).cuda(), hinv)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[[[0, 1, 2, 3], [0, 1, 2, 3]]]"
    assert run.returncode == 1 and "RuntimeError: Found no NVIDIA driver" in run.stderr


@pytest.mark.parametrize(("required", "outcome"), [("0", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_tests_that_need_a_gpu_are_skipped_or_fail_as_asked(
    required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("SPADE_FAST_REQUIRE_CUDA", required)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    conftest.pytest_runtest_setup(request.node)
    request.node.add_marker(pytest.mark.cuda)
    with pytest.raises(outcome, match="torch finds no GPU"):
        conftest.pytest_runtest_setup(request.node)


def test_resident_threads() -> None:
    assert Kernel(128, 0, 0, 256).resident == 512
    assert Kernel(129, 0, 0, 256).resident == 256
    assert Kernel(32, 0, 0, 512).resident == 2048
