"""Rules of layer-wise relevance propagation (LRP) for the functions that a network calls.

Relevance divided by activation flows in the backward pass. The gradient is then the rule of every linear function
(epsilon rule with an epsilon of zero), and Taylor's decomposition of every other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.modes import run_uncompiled
from spade_fast.attribution.dependence import Dependence
from spade_fast.attribution.function_calls import argument, function_names, name_of, overwrites, place_of_call
from spade_fast.attribution.function_kinds import CHOICES, ELEMENTWISE_NAMES, LINEAR_NAMES, MAX_POOLS, PRODUCTS
from spade_fast.attribution.pointwise import Pointwise

_CONVOLUTIONS = function_names("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
_LAYERS = function_names("linear bilinear matmul rmatmul mm bmm mv addmm addmv addbmm baddbmm einsum tensordot")
_ADDENDS = {  # position and name of the argument that is a term, not a factor
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "addr", "addcmul"), (0, "input")),
    **dict.fromkeys(("linear", *_CONVOLUTIONS), (2, "bias")),
    "bilinear": (3, "bias"),
}
_QUOTIENTS = function_names("div divide true_divide")
# Functions whose gradient is their rule: linear ones, those that select elements, and those that are homogeneous of
# degree one (input times gradient is the output).
_GRADIENT = (
    LINEAR_NAMES
    | CHOICES
    | function_names(
        "max min maximum minimum fmax fmin amax amin where masked_fill setitem topk sort kthvalue median cummax cummin",
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices std norm vector_norm",
    )
    | set(MAX_POOLS)
)
_SCALED = function_names("rms_norm normalize local_response_norm")  # x / g(x), times constants
# As their backward functions are called in autograd's graph; they may be called out of sight.
_UNSEEN = {name.replace("_", "") for name in LINEAR_NAMES} | {"accumulategrad", "copyslices", "reshapealias"}


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return argument(self.args, self.kwargs, place, name, default)

    @property
    def overwrites(self) -> bool:
        """Whether it overwrites its first argument, which its rule needs."""
        return self.name not in _GRADIENT and overwrites(self.function, self.kwargs)

    def run(self) -> Any:
        call = self.with_argument(0, "input", self.argument(0, "input").clone()) if self.overwrites else self
        return call.function(*call.args, **call.kwargs)

    def tensors(self) -> list[Tensor]:
        return [one for one in tree_leaves((self.args, self.kwargs)) if isinstance(one, Tensor)]

    def with_argument(self, place: int, name: str, value: Any) -> _Call:
        """Return the call with another value of an argument that it has."""
        if len(self.args) > place:
            return replace(self, args=(*self.args[:place], value, *self.args[place + 1 :]))
        return replace(self, kwargs={**self.kwargs, name: value}) if name in self.kwargs else self

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> _Call:
        """Return the call with all tensors changed."""
        args, kwargs = tree_map(lambda one: change(one) if isinstance(one, Tensor) else one, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


class RelevanceRules(TorchFunctionMode):
    """Gives the functions that are called in a forward pass the gradients by which LRP propagates relevance.

    Parameters
    ----------
    inputs : list of Tensor
        Of the pass. They are not leaves of the graph.
    epsilon : float
        Added to the magnitude of the denominators.
    """

    def __init__(self, inputs: list[Tensor], epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.depends = Dependence(inputs, lambda name: name not in _UNSEEN)
        self._pointwise = Pointwise()
        self._convolved: tuple[Tensor, int, _Call] | None = None
        self._rules: dict[str, Callable[[_Call, list[Tensor]], Any]] = {
            **dict.fromkeys(ELEMENTWISE_NAMES, self._elementwise),
            **dict.fromkeys(_QUOTIENTS, self._quotient),
            **dict.fromkeys(PRODUCTS, self._product),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            **dict.fromkeys(_SCALED, self._scaled),
            **dict.fromkeys(_GRADIENT, lambda call, _: call.run()),
            "lerp": partial(self._linear_in_others, 2, "weight"),
            "grid_sample": partial(self._linear_in_others, 1, "grid"),
            "batch_norm": self._batch_norm,
            "softmax": self._softmax,
            "layer_norm": self._layer_norm,
            "group_norm": self._group_norm,
            "instance_norm": self._instance_norm,
            "var": self._var,
            "glu": self._glu,
            "scaled_dot_product_attention": self._attention,
            "multi_head_attention_forward": self._multi_head_attention,
        }

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _Call(function, name_of(function).removeprefix("special_").removeprefix("linalg_"), args, kwargs or {})
        given = call.tensors()
        dependent = [one for one in given if self.depends(one)]
        if not dependent or not torch.is_grad_enabled():
            return function(*args, **call.kwargs)
        outputs = self._run(call, dependent)
        for one in [*given, *tree_leaves(outputs)]:
            if isinstance(one, Tensor):
                self.depends(one, seen=True)
        self._pointwise.note(call.name, args, call.kwargs, given, dependent, outputs)
        return outputs

    def _run(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Run a call with the gradient that is its rule."""
        rule = self._rules.get(call.name, self._unknown)
        if not call.overwrites:
            return rule(call, dependent)
        return call.argument(0, "input").copy_(rule(call, dependent))

    def _unknown(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Run a function that has no rule; raise ValueError if a gradient flows through it."""
        outputs = call.run()
        if any(isinstance(one, Tensor) and self.depends(one, seen=True) for one in tree_leaves(outputs)):
            raise InvalidValueError(f"LRP has no rule for {call.name}{place_of_call(run_with_rules.__code__)}")
        return outputs

    # Layers with weights, and products

    def _convolution(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Apply the z+ rule."""
        if len(dependent) > 1 or dependent[0] is not call.argument(0, "input"):
            return self._product(call, dependent)
        output = self._carried_by(_positive_part(call, call.argument(1, "weight")), call.run())
        self._convolved = (output, output._version, call)
        return output

    def _batch_norm(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Count a batch norm behind a convolution as part of it; any other is linear."""
        inputs, variance = call.argument(0, "input"), call.argument(2, "running_var")
        if call.argument(5, "training", False) or len(dependent) > 1:
            return self._unknown(call, dependent)
        output = call.run()
        if self._convolved is None or call.function is not F.batch_norm:
            return output
        last, version, convolution = self._convolved
        # It may have been changed in place by an activation in between.
        if last is not inputs or last._version != version or "transpose" in convolution.name:
            return output
        scale = (variance + call.argument(7, "eps", 1e-5)).rsqrt()
        factor = call.argument(3, "weight")
        scale = scale if factor is None else scale * factor
        weight = convolution.argument(1, "weight")
        return self._carried_by(_positive_part(convolution, weight * scale.view(-1, *[1] * (weight.dim() - 1))), output)

    def _product(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Apply the epsilon rule to layers, and the uniform rule to products of several tensors that have relevance."""
        place = _ADDENDS.get(call.name)
        others = call if place is None else call.with_argument(*place, None)
        factors = [one for one in others.tensors() if self.depends(one)]
        held: list[Tensor] = []
        if call.name in ("mul", "multiply") and len(factors) > 1:
            root = self._pointwise.common_root(factors)
            if root is not None:  # an activation function that is written as several calls
                return self._carried_by(root, call.run())
            held = [one for one in factors if self._pointwise.is_normaliser(one)]
            held = held if len(held) == 1 else []
        share = 1 / max(1, len(factors) - len(held))

        def change(one: Tensor) -> Tensor:
            if any(one is other for other in held):
                return one.detach()
            return _share(one, share) if share < 1 and self.depends(one) else one

        changed = others.with_tensors(change)
        output = (changed if place is None else changed.with_argument(*place, call.argument(*place))).run()
        if call.name not in _LAYERS or share < 1 or output.is_complex():
            return output
        return self._carried_by(output, output)

    def _linear_in_others(self, place: int, name: str, call: _Call, dependent: list[Tensor]) -> Any:
        """Refuse a function if the argument of which it is not linear depends on the inputs."""
        one = call.argument(place, name)
        return self._unknown(call, dependent) if isinstance(one, Tensor) and self.depends(one) else call.run()

    def _quotient(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Hold divisors that normalise constant."""
        divisor = call.argument(1, "other")
        if not isinstance(divisor, Tensor) or not self.depends(divisor):
            return call.run()
        if self._pointwise.is_normaliser(divisor) and len(dependent) > 1:
            return call.with_argument(1, "other", divisor.detach()).run()
        return self._elementwise(call, dependent)

    # Functions without weights

    def _elementwise(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Pass the relevance of each element on (identity rule)."""
        root = dependent[0] if len(dependent) == 1 else self._pointwise.common_root(dependent)
        if root is None or root.is_complex():
            return self._unknown(call, dependent)
        return self._carried_by(root, call.run())

    def _scaled(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Pass relevance on unchanged (identity rule of normalisations)."""
        return self._carried_by(dependent[0], call.run()) if len(dependent) == 1 else self._unknown(call, dependent)

    def _layer_norm(self, call: _Call, dependent: list[Tensor]) -> Any:
        if len(dependent) > 1:
            return self._unknown(call, dependent)
        inputs, weight, bias = dependent[0], call.argument(2, "weight"), call.argument(3, "bias")
        dims = tuple(range(-len(call.argument(1, "normalized_shape")), 0))
        return _exact(call.run(), _normalised(inputs, dims, call.argument(4, "eps", 1e-5)), weight, bias)

    def _group_norm(self, call: _Call, dependent: list[Tensor]) -> Any:
        groups, weight, bias = call.argument(1, "num_groups"), call.argument(2, "weight"), call.argument(3, "bias")
        return self._grouped(call, dependent, groups, weight, bias, call.argument(4, "eps", 1e-5))

    def _instance_norm(self, call: _Call, dependent: list[Tensor]) -> Any:
        if not call.argument(5, "use_input_stats", True):
            return call.run()
        weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
        return self._grouped(call, dependent, dependent[0].shape[1], weight, bias, call.argument(7, "eps", 1e-5))

    def _grouped(
        self, call: _Call, dependent: list[Tensor], groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Any:
        if len(dependent) > 1:
            return self._unknown(call, dependent)
        inputs = dependent[0]
        normalised = _normalised(inputs.reshape(len(inputs), groups, -1), (-1,), eps).view_as(inputs)
        shape = (-1, *[1] * (inputs.dim() - 2))
        weight, bias = (None if one is None else one.view(shape) for one in (weight, bias))
        return _exact(call.run(), normalised, weight, bias)

    def _var(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Apply the uniform rule to the squares."""
        return call.with_tensors(lambda one: _share(one, 0.5)).run()

    def _glu(self, call: _Call, dependent: list[Tensor]) -> Any:
        with self:
            value, gate = dependent[0].chunk(2, call.argument(1, "dim", -1))
            return value * gate.sigmoid()

    # Attention

    def _softmax(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Decompose it by Taylor's theorem: its gradient is the rule."""
        return call.run()

    def _attention(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Apply the uniform rule to both products, and the rule of softmax between them.

        The weights of the values get half of the relevance, and of this query and key get half each.
        """
        places = {"query": 0, "key": 1, "value": 2, "attn_mask": 3}
        given = {name: call.argument(place, name) for name, place in places.items()}
        given = {name: one for name, one in given.items() if isinstance(one, Tensor) and self.depends(one)}
        of_weights = 1 / (1 + ("value" in given)) if given.keys() - {"value"} else 0.0
        of_scores = of_weights / max(1, len(given.keys() & {"query", "key"}))
        shares = {"query": of_scores, "key": of_scores, "value": 1 - of_weights, "attn_mask": of_weights}
        for name, one in given.items():
            call = call.with_argument(places[name], name, _share(one, shares[name]))
        return call.run()

    def _multi_head_attention(self, call: _Call, dependent: list[Tensor]) -> Any:
        """Run the Python code of the function, whose calls have rules."""
        code: Any = F.multi_head_attention_forward
        # The function would hand itself over to this mode again.
        names = {**code.__globals__, "has_torch_function": lambda _: False}
        function = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        with self:
            return function(*call.args, **call.kwargs)

    def _carried_by(self, carrier: Tensor, value: Tensor) -> Tensor:
        """Return `value` with a gradient that passes its relevance on to `carrier`."""
        stable = carrier + torch.where(carrier < 0, -self.epsilon, self.epsilon)
        ratio = (value / stable).detach()
        return value.detach() + ((carrier - carrier.detach()) * ratio).to(value.dtype)


def run_with_rules(network: Callable[..., Any], inputs: tuple[Any, ...], epsilon: float) -> Any:
    """Run a network so that its gradient, times the inputs, is their relevance.

    Raises
    ------
    ValueError
        The network calls a function that has no rule, or that cannot be given another gradient.
    """
    inputs = tuple(one.clone() if isinstance(one, Tensor) and one.requires_grad else one for one in inputs)
    rules = RelevanceRules([one for one in inputs if isinstance(one, Tensor)], epsilon)
    with run_uncompiled(), rules:
        outputs = network(*inputs)
    for one in tree_leaves(outputs):
        if isinstance(one, Tensor):
            rules.depends(one)  # raises if a part of the network was out of sight
    return outputs


def _positive_part(convolution: _Call, weight: Tensor) -> Tensor:
    """Return the sum of the positive products of inputs and weights, per output."""
    inputs, weight = convolution.argument(0, "input"), weight.detach()
    without_bias = convolution.with_argument(2, "bias", None)

    def run(inputs: Tensor, weight: Tensor) -> Any:
        return without_bias.with_argument(0, "input", inputs).with_argument(1, "weight", weight).run()

    positive: Tensor = run(inputs.clamp(min=0), weight.clamp(min=0))
    if (inputs < 0).any():
        positive = positive + run(inputs.clamp(max=0), weight.clamp(max=0))
    return positive


def _share(tensor: Tensor, share: float) -> Tensor:
    """Return the tensor with a gradient of which only a share is passed on."""
    return tensor.detach() + (tensor - tensor.detach()) * share


def _normalised(inputs: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Return inputs less their mean, times one over their standard deviation, which is held constant."""
    factor = (inputs.detach().var(dims, correction=0, keepdim=True) + eps).rsqrt()
    return (inputs - inputs.mean(dims, keepdim=True)) * factor


def _exact(value: Tensor, normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `value` with the gradient of normalised inputs, scaled and shifted."""
    result = normalised if weight is None else normalised * weight
    result = result if bias is None else result + bias
    return value.detach() + (result - result.detach())
