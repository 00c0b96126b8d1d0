"""Context managers that put a network into evaluation mode and restore its modes and buffers afterwards."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Modules in evaluation mode: by id, the number of blocks that they are in, of all threads, and their modes before.
_blocks: Counter[int] = Counter()
_modes: dict[int, bool] = {}
_lock = threading.Lock()
_COMPILERS = {"torch._dynamo", "torch.nn.attention.flex_attention"}
_COMMON = frozenset(vars(nn.Module()))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode during a ``with`` block; modes and buffers are restored afterwards.

    So are the weights of embeddings with `max_norm`, which scale the rows that they look up in place, and the numbers
    and tensors by which a module that replaces its buffers knows what is in them. Blocks may overlap, in one thread or
    several; the last one that ends restores the modes. The modules' flags are set without calling `train` or `eval`,
    which some networks override to change their weights.
    """
    modules = list(model.modules())
    buffers = [(module, dict(module._buffers.items())) for module in modules]
    values = [_values(module) for module in modules]
    copies = [[None if b is None else b.detach().clone() for b in of_module.values()] for _, of_module in buffers]
    scaled = [
        (module.weight, module.weight.detach().clone())
        for module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    entered: list[nn.Module] = []
    try:
        with _lock:
            for module in modules:
                _modes.setdefault(id(module), module.training)
                _blocks[id(module)] += 1
                entered.append(module)
                module.training = False
        yield
    finally:
        with _lock:
            for module in entered:
                _blocks[id(module)] -= 1
                if _blocks[id(module)]:
                    module.training = False
                else:
                    module.training = _modes.pop(id(module))
                    del _blocks[id(module)]
        with torch.no_grad():
            for weight, before in scaled:
                if not torch.equal(weight, before):
                    weight.copy_(before)
            for (module, originals), of_module, value in zip(buffers, copies, values, strict=True):
                if not isinstance(module, torch.jit.ScriptModule):  # whose buffers cannot be replaced
                    now = module._buffers
                    if now.keys() != originals.keys() or any(now[name] is not originals[name] for name in now):
                        now.clear()
                        now.update(originals)
                        for name in _values(module):
                            del vars(module)[name]
                        vars(module).update(value)
                for original, copy in zip(originals.values(), of_module, strict=True):
                    if original is None or copy is None:
                        continue
                    if original.grad_fn is not None:  # updated in place by values with a gradient
                        original.detach_()
                    if not torch.equal(original, copy):
                        original.copy_(copy)


def _values(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, other than those that every module has, that are numbers, tensors and such."""
    kinds = (bool, int, float, str, tuple, Tensor, type(None))
    return {name: value for name, value in vars(module).items() if name not in _COMMON and isinstance(value, kinds)}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Disable gradients, fused attention and compiled code in evaluation mode; modes and buffers are restored."""
    with torch.no_grad(), evaluation_mode(model), run_uncompiled(), _unfused.block():
        yield


def run_uncompiled() -> AbstractContextManager[object]:
    """Return a context manager that runs compiled modules uncompiled; nothing is compiled without torch._dynamo.

    It takes a second to import, and is not if it need not be. `flex_attention` imports it when it is called.
    """
    return _uncompiled.block() if _COMPILERS & sys.modules.keys() else nullcontext()


class _OverlappingBlocks:
    """Blocks, of all threads, that change a setting of the process: the first that begins and the last that ends do."""

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change, self._users, self._lock = change, 0, threading.Lock()
        self._changed: AbstractContextManager[object] = nullcontext()

    @contextmanager
    def block(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._changed = self._change()
                self._changed.__enter__()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._changed.__exit__(None, None, None)


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_unfused = _OverlappingBlocks(_without_fused_attention)
_uncompiled = _OverlappingBlocks(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def without_kept_casts() -> Iterator[None]:
    """Make autocast cast a weight again each time that this thread uses it.

    Torch keeps them in one place for all threads. A cast that another thread made, or that was made before, could not
    be traced back to its weight.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager that disables the caller's autocast.

    Nothing is entered if it is not enabled: a network's own autocast would be an inner one, whose casts of weights are
    kept and taken for those of another type.
    """
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()
