"""Runs the activation functions that a network calls as modules, on which attribution methods set their hooks.

Captum's guided backpropagation and DeepLIFT hook modules: they do not see a call of `torch.relu`, and cannot follow a
module that is used twice. In the forward pass of a prepared network every call of an activation, by a module or
not, is redirected to a stand-in: a module of its own that shares the hooks of the one on which the method set them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from spade_fast._util.errors import InvalidValueError
from spade_fast.attribution.dependence import Dependence
from spade_fast.attribution.function_calls import argument, place_of_call
from spade_fast.attribution.function_kinds import (
    ELEMENTWISE,
    HIDDEN_ELEMENTWISE,
    HIDDEN_RECTIFIERS,
    MAX_POOLS,
    OTHER,
    PRODUCT,
    RECTIFIER,
    SOFTMAX,
    Call,
    read_call,
)

# Modules that Captum would hook itself; what they call is redirected instead.
REDIRECTED = (
    *(nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


class StandIn(nn.Module):
    """Runs the function of one call."""

    function: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)

    def hooked(self) -> bool:
        hooks = (self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks)
        return any(hooks)

    def run(self, function: Callable[[Tensor], Tensor], value: Tensor, **settings: Any) -> Tensor:
        """Run a function of one tensor as a module of its own with the hooks of this one."""
        module = object.__new__(type(self))
        module.__dict__.update(self.__dict__, function=function, **settings)
        # Hooks on the input are called right after those on the output if the input was made right before the call:
        # Captum keeps the output's gradient in between, in one place for all calls.
        return module(value.clone())


class Rectifier(StandIn, nn.ReLU):
    """Stands for ReLU and functions that are ReLU up to a bound, such as ReLU6."""


class Elementwise(StandIn):
    """Stands for any other function of each element by itself."""


class Softmax(StandIn, nn.Softmax):
    """Stands for softmax."""


class MaxPool1d(StandIn, nn.MaxPool1d):
    """Stands for 1-D max pooling."""


class MaxPool2d(StandIn, nn.MaxPool2d):
    """Stands for 2-D max pooling."""


class MaxPool3d(StandIn, nn.MaxPool3d):
    """Stands for 3-D max pooling."""


class StandIns:
    """The stand-ins of one network, by the kind of function."""

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network = network
        pools = (MaxPool1d(1), MaxPool2d(1), MaxPool3d(1))
        self.refused: set[str] | None = None  # during a rehearsal, the functions without a rule
        self.of_kind: dict[str, StandIn] = {
            RECTIFIER: Rectifier(),
            ELEMENTWISE: Elementwise(),
            SOFTMAX: Softmax(),
            **dict(zip(MAX_POOLS, pools, strict=True)),
        }

    def hooked(self) -> bool:
        """Whether a method has set its hooks."""
        return any(one.hooked() for one in self.of_kind.values())

    @contextmanager
    def rehearsal(self, kinds: Iterable[str]) -> Iterator[tuple[set[str], set[str]]]:
        """Set hooks on the stand-ins of some kinds; functions without a rule are noted instead of refused.

        Yields the set of the kinds that have been called, and that of the names of the functions without a rule.
        """
        met: set[str] = set()
        refused = self.refused = set()
        hooks = [self.of_kind[kind].register_forward_hook(lambda *_, kind=kind: met.add(kind)) for kind in kinds]
        try:
            yield met, refused
        finally:
            self.refused = None
            for hook in hooks:
                hook.remove()

    def for_deep_lift(self) -> bool:
        """Whether a method that needs a rule for every function, not only for ReLU, has set its hooks."""
        return self.of_kind[ELEMENTWISE].hooked()


class NoRuleError(InvalidValueError):
    """DeepLIFT meets a function without a rule."""


_running: ContextVar[StandIns | None] = ContextVar("_running", default=None)


class Forward:
    """The forward of a module of a prepared network: redirects calls of activations while hooks are set."""

    def __init__(self, module: nn.Module, stand_ins: StandIns) -> None:
        own = module.__dict__.get("forward")  # set on the instance, as some libraries do
        self.module = module
        self.own: Callable[..., Any] | None = own.own if isinstance(own, Forward) else own
        self.stand_ins = stand_ins

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The forward of the network that was prepared."""
        return self.own or types.MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _running.get() is self.stand_ins or not self.stand_ins.hooked():
            return self.original(*map(_own_node, args), **kwargs)
        # Methods for layers do not ask for gradients of the inputs, but what depends on these must be known.
        args, kwargs = tree_map(lambda one: _own_node(one, floating=True), (args, kwargs))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()]
        redirection = Redirection(self.stand_ins, inputs)
        outputs = _redirect(self.original, args, kwargs, redirection)
        if self.module is self.stand_ins.network:
            redirection.check_rectifiers()
        return outputs


def _own_node(value: Any, floating: bool = False) -> Any:
    """Copy an input that requires gradients, as a network that begins in place must not overwrite it.

    With `floating`, give every input of floating-point numbers a gradient.
    """
    if not isinstance(value, Tensor):
        return value
    if floating and value.is_floating_point() and not value.requires_grad and torch.is_grad_enabled():
        value = value.detach().requires_grad_()
    return value.clone() if value.is_leaf and value.requires_grad else value


def _redirect(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], redirection: Redirection
) -> Any:
    token = _running.set(redirection.stand_ins)
    try:
        with redirection:
            outputs = forward(*args, **kwargs)
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                redirection.depends(one)  # raises if a part of the network was out of sight
        return outputs
    finally:
        _running.reset(token)


class Redirection(TorchFunctionMode):
    """Runs calls that depend on the inputs on the stand-ins that have hooks, and refuses those without a rule."""

    def __init__(self, stand_ins: StandIns, inputs: list[Tensor]) -> None:
        super().__init__()
        self.stand_ins = stand_ins
        self._batch = max(1, len(inputs[0])) if inputs else 1
        self.depends = Dependence(inputs, self._needs_rule)
        self._rectified = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self.depends(one)
        outputs = self._call(function, args, kwargs or {})
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                self.depends(one, seen=True)
        return outputs

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = read_call(function, args, kwargs, self.depends) if torch.is_grad_enabled() else None
        if call is None:
            return function(*args, **kwargs)
        if call.kind == OTHER:
            outputs = function(*args, **kwargs)
            differentiable = any(
                isinstance(one, Tensor) and self.depends(one, seen=True) for one in tree_leaves(outputs)
            )
            if differentiable and self.stand_ins.for_deep_lift():
                self._refuse(_no_rule(call), call)
            return outputs
        stand_in = self.stand_ins.of_kind.get(call.kind)
        self._rectified |= call.kind == RECTIFIER
        try:
            if stand_in is None and self.stand_ins.for_deep_lift():
                result = self._product(call, args, kwargs)
            elif stand_in is None or not stand_in.hooked():
                return function(*args, **kwargs)
            else:
                result = self._run(stand_in, call, function, args, kwargs)
        except NoRuleError as error:
            self._refuse(error, call)
            return function(*args, **kwargs)
        return (args[0] if args else kwargs["input"]).copy_(result) if call.inplace else result

    def _needs_rule(self, name: str) -> bool:
        """Whether a function that is called out of sight would have a rule, by its name in autograd's graph."""
        return name in (HIDDEN_ELEMENTWISE if self.stand_ins.for_deep_lift() else HIDDEN_RECTIFIERS)

    def _refuse(self, error: NoRuleError, call: Call) -> None:
        """Raise the error, or note the function in a rehearsal."""
        if self.stand_ins.refused is None:
            raise error
        self.stand_ins.refused.add(call.name)

    def check_rectifiers(self) -> None:
        """Refuse a method that changes the gradient of ReLU only, if no ReLU was called."""
        if not (self._rectified or self.stand_ins.for_deep_lift() or self.stand_ins.refused is not None):
            raise InvalidValueError("the network calls no ReLU, whose gradient the method modifies")

    def _run(
        self,
        stand_in: StandIn,
        call: Call,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        place = call.place
        value = kwargs[place] if isinstance(place, str) else args[place or 0]
        if not isinstance(value, Tensor) or (call.inplace and place not in (0, "input")):
            raise _no_rule(call)

        def of_value(value: Tensor) -> Any:
            changed = [value if index == place else one for index, one in enumerate(args)]
            result = function(*changed, **{**kwargs, place: value} if isinstance(place, str) else kwargs)
            return value if call.inplace else result

        settings: dict[str, Any] = {}
        if call.kind in MAX_POOLS:
            settings = _pooling(args, kwargs)
        elif call.kind == SOFTMAX:
            settings = {"dim": args[1] if len(args) > 1 else kwargs["dim"]}
            if settings["dim"] is None:
                raise _no_rule(call)
        result = stand_in.run(of_value, value, **settings)
        if self.stand_ins.for_deep_lift():
            self._check_batch(call, value)
            if call.kind not in MAX_POOLS and result.shape != value.shape:
                raise _no_rule(call)
        return result

    def _product(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Multiply two activations with DeepLIFT's even division: the multiplier of one is the mean of the other."""
        first, second = args[0], argument(args, kwargs, 1, "other")
        if call.kind != PRODUCT or not isinstance(first, Tensor) or not isinstance(second, Tensor):
            raise _no_rule(call)
        for one in (first, second):
            self._check_batch(call, one)
        means = [(one + one.roll(len(one) // 2, 0)).detach() / 2 for one in (first, second)]
        value = (first * second).detach()
        return value + (first - first.detach()) * means[1] + (second - second.detach()) * means[0]

    def _check_batch(self, call: Call, value: Tensor) -> None:
        """DeepLIFT compares the two halves of the batch, which must be the first dimension."""
        if value.dim() == 0 or len(value) % self._batch:
            place = place_of_call(_redirect.__code__)
            raise InvalidValueError(
                f"DeepLIFT needs the batch as first dimension, got {list(value.shape)} in {call.name}{place}"
            )


def _pooling(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a pooling call as attributes of a pooling module."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given = {**defaults, **kwargs, **dict(zip(names, args[1:], strict=False))}
    return {**{name: given[name] for name in names}, "stride": given["stride"] or given["kernel_size"]}


def _no_rule(call: Call) -> NoRuleError:
    return NoRuleError(f"DeepLIFT has no rule for {call.name}{place_of_call(_redirect.__code__)}")
