"""Context managers that put a network into evaluation mode and restore its modes and buffers afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode during a ``with`` block; the mode of every module is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Disable gradients and fused attention in evaluation mode; modes and buffers are restored afterwards."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    copies = [[None if b is None else b.clone() for b in of_module.values()] for _, of_module in buffers]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), evaluation_mode(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for (module, originals), of_module in zip(buffers, copies, strict=True):
                module._buffers.clear()
                module._buffers.update(originals)
                for original, copy in zip(originals.values(), of_module, strict=True):
                    if original is not None and copy is not None and not torch.equal(original, copy):
                        original.copy_(copy)
