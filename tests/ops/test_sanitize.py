"""The torch-free kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and what their object files export."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CPU = CSRC / "cpu"
FLAGS = ["-std=c++20", "-fno-math-errno", "-Wno-psabi"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or not CPU.exists(), reason="needs g++ and the C++ sources")


# program: sources in csrc beside the kernels
SANITIZED = {
    "kernels": [],
    "gram": ["cpu/gram/method.cpp", "common/gram_plan.cpp", "cpu/runtime/kept_memory.cpp", "cpu/runtime/page_heap.cpp"],
    "page_heap": ["cpu/runtime/page_heap.cpp"],
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Object files of the kernels, which all programs share."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = [CPU / "runtime" / "dispatch.cpp", *sorted((CPU / "isa").glob("*.cpp"))]

    def compiled(source):
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *SANITIZERS, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


@pytest.mark.parametrize("name", SANITIZED)
def test_kernels_are_clean(tmp_path, kernels, name):
    folder = ROOT / "tests" / "sanitize"
    parts = [folder / f"{name}.cpp", *(CSRC / file for file in SANITIZED[name]), *kernels]
    program = tmp_path / name
    command = ["g++", *FLAGS, *SANITIZERS, f"-I{folder / 'stub'}", "-pthread", *map(str, parts), "-o", str(program)]
    subprocess.run(command, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "ok\n", run.stdout + run.stderr


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_wide_instructions_stay_in_their_namespace(tmp_path, level):
    """A function shared with other files, built for wide vectors, could be linked in for older processors.

    Without optimisation none is inlined away, so that all are seen.
    """
    objects = tmp_path / "level.o"
    subprocess.run(
        ["g++", "-O0", "-fno-exceptions", *FLAGS, "-c", str(CPU / "isa" / f"{level}.cpp"), "-o", str(objects)],
        check=True,
    )
    names = subprocess.run(["nm", "-C", "--defined-only", str(objects)], capture_output=True, text=True, check=True)
    exported = [line.split(" ", 2)[2] for line in names.stdout.splitlines() if re.match(r"\S+ [TWVuBD] ", line)]
    assert exported and all(f"spade::{level}::" in name for name in exported), exported
