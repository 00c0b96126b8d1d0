"""Build of the native extension. Settings, from the environment:

SPADE_FAST_CUDA=auto|0|1   CUDA kernels: auto (default) builds them if torch has CUDA and a toolkit of the same major
                           version is found; 0 never; 1 fails where auto would warn. Never asks for a GPU.
CUDA_HOME                  folder of the CUDA toolkit.
TORCH_CUDA_ARCH_LIST       architectures to compile for; default: that of the GPU, without one 7.5, 8.0 and 9.0+PTX.
MAX_JOBS                   compiler processes at once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "spade_fast: torch is needed to build the extension but is not installed here.\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"


def toolkit() -> tuple[str, str] | None:
    """Folder and version of the CUDA toolkit, or None."""
    # torch takes the folder of the nvcc on PATH, which may be a wrapper far from the toolkit.
    homes = [os.environ["CUDA_HOME"]] if "CUDA_HOME" in os.environ else [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for home in filter(None, homes):
        nvcc = Path(home, "bin", "nvcc")
        if nvcc.exists() and Path(home, "include", "cuda_runtime.h").exists():
            text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
            found = re.search(r"release (\d+\.\d+)", text)
            if found:
                return home, found.group(1)
    return None


def decide_cuda(setting: str, torch_cuda: str | None, found: tuple[str, str] | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the sentence that says why. Raises SystemExit for what cannot be done."""
    if setting not in ("auto", "0", "1"):
        sys.exit(f"spade_fast: SPADE_FAST_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "CPU only (SPADE_FAST_CUDA=0)"
    if torch_cuda is None:
        reason = "this torch is a CPU build"
    elif found is None:
        reason = f"torch has CUDA {torch_cuda}, but no toolkit was found (set CUDA_HOME)"
    elif found[1].split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"torch has CUDA {torch_cuda}, but the toolkit in {found[0]} is {found[1]}"
    else:
        return True, f"CPU and CUDA {found[1]} (torch has CUDA {torch_cuda})"
    if setting == "1":
        sys.exit(f"spade_fast: SPADE_FAST_CUDA=1, but {reason}")
    if torch_cuda is not None:
        print(f"spade_fast: warning: {reason}", file=sys.stderr)
    return False, f"CPU only ({reason})"


class BuildExtension(cpp_extension.BuildExtension):
    """Also writes down the torch version, which `import spade_fast` compares before it loads the extension."""

    def run(self) -> None:
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib)
        record = {"torch": torch.__version__}
        (package / "spade_fast" / "ops" / "built_with.json").write_text(json.dumps(record) + "\n")


def sources(with_cuda: bool) -> list[str]:
    cpp = [path for path in ROOT.glob("csrc/**/*.cpp") if with_cuda or path.parent.name != "cuda"]
    return sorted(str(path.relative_to(ROOT)) for path in [*cpp, *(ROOT.glob("csrc/cuda/*.cu") if with_cuda else [])])


def headers() -> list[str]:
    """All headers. A change to one compiles what includes it (without ninja, everything); an sdist holds them."""
    found = (path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh", ".inc"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def extension():
    found = toolkit()
    use_cuda, decision = decide_cuda(os.environ.get("SPADE_FAST_CUDA", "auto"), torch.version.cuda, found)
    print(f"spade_fast: building for {decision}, torch {torch.__version__}")
    macros = [("SPADE_TORCH_VERSION", torch.__version__)]
    # Without -fopenmp, at::parallel_for compiles to a plain loop.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = {"cxx": ["-O3", "-g0", "-fno-math-errno", "-Wall", "-Wno-psabi", "-fvisibility=hidden", *openmp]}
    make = cpp_extension.CppExtension
    if use_cuda:
        make = cpp_extension.CUDAExtension
        cpp_extension.CUDA_HOME = found[0]
        macros.append(("SPADE_CUDA_VERSION", torch.version.cuda))
        flags["nvcc"] = ["-O3"]
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    return make(
        "spade_fast.ops._C",
        sources(use_cuda),
        depends=headers(),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=openmp,
    )


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
