"""Context managers that put a network into evaluation mode and restore its modes and buffers afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode during a ``with`` block; modes and buffers are restored afterwards.

    The modules' flags are set without calling `train` or `eval`, which some networks override to change their weights.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers.items())) for module, _ in modes]
    copies = [[None if b is None else b.detach().clone() for b in of_module.values()] for _, of_module in buffers]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for (module, originals), of_module in zip(buffers, copies, strict=True):
                if not isinstance(module, torch.jit.ScriptModule):  # whose buffers cannot be replaced
                    module._buffers.clear()
                    module._buffers.update(originals)
                for original, copy in zip(originals.values(), of_module, strict=True):
                    if original is None or copy is None:
                        continue
                    if original.grad_fn is not None:  # updated in place by values with a gradient
                        original.detach_()
                    if not torch.equal(original, copy):
                        original.copy_(copy)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Disable gradients, fused attention and compiled code in evaluation mode; modes and buffers are restored."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), evaluation_mode(model), _uncompiled():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _uncompiled() -> AbstractContextManager[object]:
    """Return a context manager that runs compiled modules uncompiled; nothing is compiled without torch._dynamo."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
