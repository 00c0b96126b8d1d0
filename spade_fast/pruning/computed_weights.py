"""Weights that a module computes from other parameters, such as `weight_norm`; held constant, at any value, for a time.

Two mechanisms of torch are known: `torch.nn.utils.parametrize`, and the hooks of `torch.nn.utils.weight_norm`,
`spectral_norm` and `prune`, which compute an attribute before each forward pass. What computes a weight is an object of
its own. Copies of a module that share this object share the weight, also while it is held.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from spade_fast._util.modes import evaluation_mode, run_uncompiled
from spade_fast._util.module_names import uncompiled

_Hook = WeightNorm | SpectralNorm | BasePruningMethod


@dataclass(frozen=True)
class ComputedWeight:
    """The attribute `name` of a module, which it computes from other parameters whenever it is needed."""

    module: nn.Module
    name: str

    @property
    def computation(self) -> nn.Module | _Hook:
        """The object that computes the weight."""
        return _hook(self.module, self.name) or _parametrization(self.module, self.name)

    def sources(self) -> list[nn.Parameter]:
        """Return the parameters from which the weight is computed."""
        if parametrize.is_parametrized(self.module, self.name):
            return list(_parametrization(self.module, self.name).parameters())
        found = (self.module._parameters.get(f"{self.name}{ending}") for ending in ("_g", "_v", "_orig"))
        return [parameter for parameter in found if parameter is not None]

    def value(self) -> Tensor:
        """Return the weight as the module computes it in evaluation mode, or what it is held at; without gradient."""
        with _lock:
            held = _held.get(id(self.computation))
        if held is not None:
            return held.value
        tensor = self.sources()[0]
        exact = torch.autocast(tensor.device.type, enabled=False)
        with torch.no_grad(), exact, evaluation_mode(self.module):
            hook = _hook(self.module, self.name)
            if hook is None:
                return getattr(self.module, self.name).detach()
            before = getattr(self.module, self.name)
            try:
                hook(self.module, ())
                return getattr(self.module, self.name).detach()
            finally:
                setattr(self.module, self.name, before)

    def hold(self, value: Tensor) -> None:
        """Let the weight be `value` until as many calls of `release`; if it is held already, it stays as it is.

        Compiled code runs uncompiled meanwhile, since it may have the computation built in.
        """
        with _lock:
            key = id(self.computation)
            if key not in _held:
                if not _held:
                    _uncompiled_block.enter()
                _held[key] = _Held(self.computation, value, _put(self.module, self.name, value))
            _held[key].users += 1

    def release(self) -> None:
        """End a `hold`; after the last one the module computes the weight as before."""
        with _lock:
            key = id(self.computation)
            _held[key].users -= 1
            if not _held[key].users:
                _held.pop(key).undo()
                if not _held:
                    _uncompiled_block.leave()


def computed_weight(module: nn.Module, name: str) -> ComputedWeight | None:
    """Return the computed weight `name` of a module, or None if it is not computed in a way that is known."""
    return ComputedWeight(module, name) if name in computed_names(module) else None


def computed_names(module: nn.Module) -> list[str]:
    """Return the names of the weights that a module computes."""
    parametrizations = module.parametrizations if parametrize.is_parametrized(module) else None
    named = parametrizations.items() if isinstance(parametrizations, nn.ModuleDict) else []
    names = [name for name, one in named if any(True for _ in one.parameters())]  # not those of buffers
    return names + [_name(hook) for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook)]


def computations(model: nn.Module) -> list[nn.Module | _Hook]:
    """Return the objects that compute weights of a model."""
    return [weight.computation for _, weight in computed_weights(model)]


def computed_weights(model: nn.Module) -> Iterator[tuple[str, ComputedWeight]]:
    """Iterate over the computed weights of a model, under the names that they would have as parameters."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in computed_names(module):
            yield f"{uncompiled(prefix)}.{name}".lstrip("."), ComputedWeight(module, name)


@contextmanager
def held_constant(weights: Iterable[ComputedWeight]) -> Iterator[None]:
    """Hold weights at their present values during a ``with`` block, so that each is one tensor."""
    with ExitStack() as stack:
        for weight in weights:
            weight.hold(weight.value())
            stack.callback(weight.release)
        yield


@dataclass
class _Held:
    """A weight that is held: what computes it (so that nothing else gets its id), its value, and how to undo it."""

    computation: nn.Module | _Hook
    value: Tensor
    undo: Callable[[], None]
    users: int = 0


_held: dict[int, _Held] = {}
_lock = threading.RLock()


class _UncompiledBlock:
    """Runs compiled code uncompiled between `enter` and `leave`."""

    def __init__(self) -> None:
        self._block: AbstractContextManager[object] | None = None

    def enter(self) -> None:
        if "torch._dynamo" in sys.modules:
            self._block = run_uncompiled()
            self._block.__enter__()

    def leave(self) -> None:
        if self._block is not None:
            self._block.__exit__(None, None, None)
            self._block = None
        elif "torch._dynamo" in sys.modules:  # imported meanwhile: code was compiled with the values that were held
            torch._dynamo.reset()


_uncompiled_block = _UncompiledBlock()


def _parametrization(module: nn.Module, name: str) -> nn.Module:
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    return parametrizations[name]


def _hook(module: nn.Module, name: str) -> _Hook | None:
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook))
    return next((hook for hook in hooks if _name(hook) == name), None)


def _name(hook: _Hook) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


class _Constant:
    """Takes the place of a computation."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.value


def _put(module: nn.Module, name: str, value: Tensor) -> Callable[[], None]:
    """Let a weight be `value`, and return the function that undoes it."""
    hook = _hook(module, name)
    if hook is None:
        undo = _replace(_parametrization(module, name), "forward", value)
    else:
        method = "apply_mask" if isinstance(hook, BasePruningMethod) else "compute_weight"
        undo, before = _replace(hook, method, value), getattr(module, name)
        setattr(module, name, value)

    def undo_all() -> None:
        undo()
        if hook is not None:
            setattr(module, name, before)
        parametrize._cache.clear()

    parametrize._cache.clear()  # what `torch.nn.utils.parametrize.cached` remembers
    return undo_all


def _replace(owner: object, method: str, value: Tensor) -> Callable[[], None]:
    """Let a method of an object return `value`, and return the function that undoes it."""
    attributes = vars(owner)
    before = {key: attributes[key] for key in (method,) if key in attributes}
    attributes[method] = _Constant(value)

    def undo() -> None:
        attributes.pop(method, None)
        attributes.update(before)

    return undo
