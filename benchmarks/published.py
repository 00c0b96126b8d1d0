"""The published solvers, from the checkout that the environment variable SPADE_REFERENCE names.

None of their code is in this repository. Their files are found by the classes they define. They import transformers
for the name of one class and call CUDA's `synchronize`; both are replaced by stand-ins, the latter on the CPU only.
They compute on the device of the layer and the Hessian that they are given.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from device import ON_CUDA
from torch import nn

_VARIABLE = "SPADE_REFERENCE"
_CLASS = re.compile(r"^class (TrueOBS|SparseGPT|SparseGPTSuperFast)\b", re.MULTILINE)


def is_given() -> bool:
    """Whether there is published code to compare with."""
    return bool(os.environ.get(_VARIABLE))


@functools.cache
def classes() -> SimpleNamespace:
    """Return those of TrueOBS, SparseGPT and SparseGPTSuperFast that the checkout has, as attributes.

    Raises
    ------
    FileNotFoundError
        The checkout has none of them.
    """
    folder = Path(os.environ[_VARIABLE]).expanduser()
    found = SimpleNamespace()
    for path in sorted(folder.rglob("*.py")):
        names = [name for name in _CLASS.findall(path.read_text(errors="replace")) if not hasattr(found, name)]
        if names:
            module = _load(path)
            for name in names:
                setattr(found, name, getattr(module, name))
    if not vars(found):
        raise FileNotFoundError(f"{_VARIABLE}={folder} has no Python file that defines one of the published solvers")
    return found


def _load(path: Path) -> ModuleType:
    transformers = ModuleType("transformers")
    transformers.Conv1D = type("Conv1D", (nn.Module,), {})  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(f"published_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, transformers=transformers), mock.patch.object(sys, "path", sys.path.copy()):
        sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running() -> Iterator[Any]:
    """Let the published code run without its prints, and on the CPU too; yields its classes."""
    wait = contextlib.nullcontext() if ON_CUDA else mock.patch("torch.cuda.synchronize")
    with wait, contextlib.redirect_stdout(io.StringIO()):
        yield classes()
