"""Compiles CUDA sources and the harness into a library, with g++."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
HARNESS = [HERE / "harness" / f"{name}.cpp" for name in ("fiber", "hooks", "lanes", "memory", "report", "shared")]
FLAGS = ["-std=c++20", "-fPIC", "-g1", "-ffp-contract=off", "-fno-extern-tls-init", "-Wall", "-Wno-unknown-pragmas"]
# What is checked is what the compiler instruments; the harness takes the place of the sanitizers' runtimes.
# (Not bounds-strict: a last member T x[1] may stand for a longer array.)
CHECKED = ["-O1", "-fsanitize=thread,bounds,alignment", "--param=tsan-instrument-func-entry-exit=0"]


def _digest(*parts: object) -> str:
    text = "\n".join(part.read_text() if isinstance(part, Path) else str(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compile(command: Sequence[str], output: Path) -> Path:
    """Run a compiler unless its output is there. The output's name tells what it was made of."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"{output.name}.partial")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(partial, output)
    return output


def build(
    folder: Path,
    checked: Sequence[Path],
    plain: Sequence[Path] = (),
    *,
    headers: Sequence[Path] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """Build a library of the harness, the CUDA sources `checked` and the C++ sources `plain`.

    What is in `folder` from an earlier call is used again if the sources, all `headers` and the flags are the same.
    """
    compiler = os.environ.get("CXX", "g++")
    common = [*FLAGS, f"-I{HERE / 'include'}", *flags]
    headers = [*sorted(HERE.rglob("*.h")), *sorted(headers)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    base = _digest(version, *common, *CHECKED, *headers)
    jobs = [(source, CHECKED) for source in checked] + [(source, ["-O2"]) for source in (*HARNESS, *plain)]

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, own = job
        command = [compiler, *common, *own, "-x", "c++", "-c", str(source)]
        return _compile(command, folder / "objects" / f"{source.stem}-{_digest(base, *own, source)}.o")

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [str(path) for path in pool.map(compile_one, jobs)]
        # Bsymbolic: several of these libraries may be in one process, each with a harness of its own.
        command = [compiler, "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *objects, *link]
        return _compile(command, folder / _digest(*command) / "simt.so")
