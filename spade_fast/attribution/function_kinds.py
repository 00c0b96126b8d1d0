"""Which of torch's functions are activations: the kind of a call, by which attribution methods choose its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from spade_fast.attribution.function_calls import argument, function_names, name_of

RECTIFIER, ELEMENTWISE, SOFTMAX, PRODUCT, OTHER = "rectifier", "elementwise", "softmax", "product", "other"
MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
STAND_INS = (RECTIFIER, ELEMENTWISE, SOFTMAX, *MAX_POOLS)
_LINEAR = "linear"


_ELEMENTWISE = function_names(
    "relu relu6 threshold clamp clip clamp_min clamp_max hardtanh leaky_relu rrelu prelu elu selu celu gelu silu",
    "mish softplus softsign tanhshrink hardshrink softshrink hardswish hardsigmoid logsigmoid log_sigmoid sigmoid",
    "expit tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow rpow float_power reciprocal rdiv",
    "rtruediv abs absolute sin cos tan asin acos atan arctan sinh cosh asinh acosh atanh erf erfc erfinv sinc",
    "logit sign round floor ceil trunc maximum minimum fmax fmin max min div divide true_divide",
)
_QUOTIENTS = frozenset(("div", "divide", "true_divide"))
_GATES = frozenset(("mul", "multiply", "where", "masked_fill", "setitem"))
# Linear in each of their tensors, but not in two together.
_PRODUCTS = function_names(
    "mul multiply matmul bmm mm mv dot einsum baddbmm addmm addbmm outer linear bilinear conv1d conv2d conv3d",
    "conv_transpose1d conv_transpose2d conv_transpose3d addcmul tensordot lerp grid_sample",
)
_OTHERS = function_names(
    "layer_norm native_layer_norm group_norm instance_norm rms_norm local_response_norm normalize",
    "multi_head_attention_forward scaled_dot_product_attention softmin log_softmax gumbel_softmax logsumexp glu",
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d",
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices lp_pool1d lp_pool2d lp_pool3d",
    "amax amin aminmax cummax cummin topk sort kthvalue median nanmedian prod cumprod norm vector_norm std var",
    "std_mean var_mean lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell addcdiv hypot",
    "atan2 fmod remainder logaddexp logaddexp2 logcumsumexp renorm cosine_similarity cdist pairwise_distance",
)
_KNOWN = _ELEMENTWISE | _GATES | _PRODUCTS | _OTHERS | {"softmax", "batch_norm", *MAX_POOLS}


@dataclass(frozen=True)
class Call:
    """A call of a function with a kind of its own.

    Attributes
    ----------
    name : str
        The function's name, without the underscores of its in-place and operator forms.
    kind : str
        One of the constants of this file.
    place : int or str or None
        Position or keyword of the argument that is the call's only differentiable input.
    inplace : bool
        Whether the first argument is overwritten by the result.
    """

    name: str
    kind: str
    place: int | str | None
    inplace: bool


def read_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], depends: Callable[[Tensor], bool]
) -> Call | None:
    """Return the kind of a call, or None if its gradient is the rule of every method.

    `depends` says whether a tensor is computed, with a gradient, from the network's input.
    """
    full = getattr(function, "__name__", "").split(".")[0]
    name = name_of(function).removeprefix("special_")
    if name not in _KNOWN:
        return None
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    places = [
        place
        for place, value in arguments
        if any(isinstance(one, Tensor) and depends(one) for one in tree_leaves(value))
    ]
    if not places:
        return None
    inplace = kwargs.get("inplace") is True or name == "setitem" or (full[-1] == "_" != full[-2])
    place = places[0] if len(places) == 1 else None
    kind = _kind(name, args, kwargs, places)
    return None if kind == _LINEAR else Call(name, kind, place, inplace)


def _kind(name: str, args: Sequence[Any], kwargs: dict[str, Any], places: list[int | str]) -> str:
    if name in MAX_POOLS:
        return OTHER if kwargs.get("return_indices") else name
    if name == "softmax":
        return SOFTMAX
    if name == "batch_norm":
        return OTHER if argument(args, kwargs, 5, "training", False) else _LINEAR
    if name in _OTHERS:
        return OTHER
    if name in _PRODUCTS and len(places) > 1:
        return PRODUCT if name in ("mul", "multiply") else OTHER
    if name in _GATES and len(places) > 1:
        return _LINEAR if name == "setitem" else OTHER
    if name in _GATES:
        return _kind_of_gate(name, args, kwargs, places)
    if name in _PRODUCTS:
        return _LINEAR
    if len(places) > 1 or (name in ("max", "min") and not isinstance(argument(args, kwargs, 1, "other"), Tensor)):
        return OTHER
    if name in _QUOTIENTS and places[0] == 0:
        return _LINEAR
    return RECTIFIER if _is_rectifier(name, args, kwargs, places[0]) else ELEMENTWISE


def _is_rectifier(name: str, args: Sequence[Any], kwargs: dict[str, Any], place: int | str) -> bool:
    """Whether the call is zero for negative values and the identity from zero to somewhere above."""
    if name in ("relu", "relu6"):
        return True
    if name in ("clamp", "clip"):
        return _is_zero(argument(args, kwargs, 1, "min")) and _is_positive(argument(args, kwargs, 2, "max"))
    if name == "clamp_min":
        return _is_zero(argument(args, kwargs, 1, "min"))
    if name == "hardtanh":
        lower, upper = argument(args, kwargs, 1, "min_val", -1.0), argument(args, kwargs, 2, "max_val", 1.0)
        return _is_zero(lower) and _is_positive(upper)
    if name == "threshold":
        return _is_zero(argument(args, kwargs, 1, "threshold")) and _is_zero(argument(args, kwargs, 2, "value"))
    if name == "leaky_relu":
        return _is_zero(argument(args, kwargs, 1, "negative_slope", 0.01))
    if name in ("maximum", "fmax", "max"):
        return _is_zero(args[0] if place != 0 else argument(args, kwargs, 1, "other"))
    return False


def _kind_of_gate(name: str, args: Sequence[Any], kwargs: dict[str, Any], places: list[int | str]) -> str:
    """Return the kind of a call that keeps one tensor where another says so, or scales it by a constant."""
    other: Any = 0
    if name == "where":
        if len(args) < 3:
            return OTHER
        gate, kept, other = args[:3]
        if places == [2]:
            gate, kept, other = ~gate, other, kept
    elif name in ("masked_fill", "setitem"):
        gate, kept, other = argument(args, kwargs, 1, "mask"), args[0], argument(args, kwargs, 2, "value", 0)
        if not isinstance(gate, Tensor) or gate.dtype != torch.bool:
            return _LINEAR
        gate = ~gate
    else:
        kept, gate = args[0], argument(args, kwargs, 1, "other")
        if places != [0]:
            kept, gate = gate, kept
    if not isinstance(gate, Tensor) or not isinstance(kept, Tensor):
        return _LINEAR
    value = kept.detach()
    if gate.shape == kept.shape and bool((value < 0).any()) and torch.equal(value.clamp(min=0), value * gate):
        return RECTIFIER if _is_zero(other) else OTHER
    # A gate that differs between inputs and baselines, the halves of DeepLIFT's batch, is computed from them.
    batched = not gate.requires_grad and gate.dim() == kept.dim() and len(gate) == len(kept) and len(gate) % 2 == 0
    return OTHER if batched and not torch.equal(*gate.chunk(2)) else _LINEAR


def _is_zero(value: Any) -> bool:
    return bool((value == 0).all()) if isinstance(value, Tensor) else isinstance(value, int | float) and value == 0


def _is_positive(value: Any) -> bool:
    return value is None or bool((value > 0).all() if isinstance(value, Tensor) else value > 0)
