"""The ops of csrc/cuda, run on CPU tensors by the harness: `ops` stands in for torch.ops.spade_fast."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .build import HERE, build

ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc"
NAMESPACE = "spade_fast_simt"

_library: ctypes.CDLL | None = None


def load() -> None:
    """Build and load the emulated ops, and make all CPU tensors from here on device buffers of the harness."""
    global _library
    if _library is not None:
        return
    from torch.utils import cpp_extension  # it looks for CUDA, which takes time

    torch_library = Path(torch.__file__).parent / "lib"
    path = build(
        ROOT / "build" / "simt",
        checked=sorted(SOURCES.glob("cuda/*.cu")),
        plain=[
            SOURCES / "registration.cpp",
            *sorted(SOURCES.glob("common/*.cpp")),
            *sorted(SOURCES.glob("cuda/*.cpp")),
            HERE / "harness" / "allocator.cpp",
        ],
        headers=[path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh", ".inc")],
        flags=[
            f"-I{SOURCES}",
            *(f"-isystem{folder}" for folder in cpp_extension.include_paths()),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-DSPADE_LIBRARY={NAMESPACE}",
            "-DSPADE_CUDA_KEY=CPU",
            "-DSPADE_WORKING_BYTES=(4 << 20)",
        ],
        link=[f"-L{torch_library}", f"-Wl,-rpath,{torch_library}", "-ltorch", "-ltorch_cpu", "-lc10"],
    )
    torch.ops.load_library(path)
    _library = ctypes.CDLL(str(path))


def set_seed(seed: int) -> None:
    """Set the seed of the order in which blocks and threads run."""
    load()
    assert _library is not None
    _library.simt_set_seed(ctypes.c_uint64(seed))


def exact_copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, in a storage that ends where the tensor ends."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    flat = tensor.detach().as_strided((length,), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride())


class Ops:
    """The attributes of torch.ops.spade_fast. Tensors are copied, so that they lie in buffers of their exact size."""

    def __getattr__(self, name: str) -> Any:
        load()
        op = getattr(getattr(torch.ops, NAMESPACE), name)

        def call(*arguments: Any) -> Any:
            copies = _pytree.tree_map_only(Tensor, exact_copy, arguments)
            results = op(*copies)
            if name.endswith("_"):
                arguments[0].copy_(copies[0])
            return results

        return call


ops = Ops()
