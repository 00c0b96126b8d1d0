"""The torch-free kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and what their object files export."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CPU = CSRC / "cpu"
FLAGS = ["-std=c++20", "-fno-math-errno", "-Wno-psabi"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or not CPU.exists(), reason="needs g++ and the C++ sources")


# program: sources in csrc beside the kernels
SANITIZED = {"kernels": [], "gram": ["cpu/gram/method.cpp", "common/gram_plan.cpp"]}


@pytest.mark.parametrize("name", SANITIZED)
def test_kernels_are_clean(tmp_path, name):
    folder = ROOT / "tests" / "sanitize"
    sources = [folder / f"{name}.cpp", *(CSRC / file for file in SANITIZED[name]), CPU / "runtime" / "dispatch.cpp"]
    sources += sorted((CPU / "isa").glob("*.cpp"))
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{folder / 'stub'}", "-pthread"]
    program = tmp_path / name
    subprocess.run(["g++", "-O1", *FLAGS, *sanitizers, *map(str, sources), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "ok\n", run.stdout + run.stderr


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_wide_instructions_stay_in_their_namespace(tmp_path, level):
    """A function shared with other files, built for wide vectors, could be linked in for older processors."""
    objects = tmp_path / "level.o"
    subprocess.run(["g++", "-O3", *FLAGS, "-c", str(CPU / "isa" / f"{level}.cpp"), "-o", str(objects)], check=True)
    names = subprocess.run(["nm", "-C", "--defined-only", str(objects)], capture_output=True, text=True, check=True)
    exported = [line.split(" ", 2)[2] for line in names.stdout.splitlines() if re.match(r"\S+ [TWVuBD] ", line)]
    assert all(f"spade::{level}::" in name for name in exported), exported
