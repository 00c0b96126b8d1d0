"""Which of torch's functions are activations: the kind of a call, by which attribution methods choose its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from spade_fast.attribution.function_calls import argument, function_names, name_of, overwrites

RECTIFIER, ELEMENTWISE, SOFTMAX, PRODUCT, OTHER = "rectifier", "elementwise", "softmax", "product", "other"
MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
STAND_INS = (RECTIFIER, ELEMENTWISE, SOFTMAX, *MAX_POOLS)
_LINEAR = "linear"

ELEMENTWISE_NAMES = function_names(
    "relu relu6 threshold clamp clip clamp_min clamp_max hardtanh leaky_relu rrelu prelu elu selu celu gelu silu",
    "mish softplus softsign tanhshrink hardshrink softshrink hardswish hardsigmoid logsigmoid log_sigmoid sigmoid",
    "expit tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow rpow float_power reciprocal rdiv",
    "rtruediv abs absolute sin cos tan asin acos atan arctan sinh cosh asinh acosh atanh erf erfc erfinv sinc",
    "arcsin arccos arcsinh arccosh arctanh logit sign sgn round floor ceil trunc fix frac maximum minimum fmax fmin",
    "max min div divide true_divide nan_to_num xlogy xlog1py copysign lgamma digamma i0 i0e i1 i1e ndtr log_ndtr erfcx",
    "entr",
)
_QUOTIENTS = frozenset(("div", "divide", "true_divide"))
_GATES = frozenset(("mul", "multiply", "where", "masked_fill", "setitem"))
# Linear in each of their tensors, but not in two together.
PRODUCTS = function_names(
    "mul multiply matmul bmm mm mv dot einsum baddbmm addmm addbmm outer linear bilinear conv1d conv2d conv3d",
    "conv_transpose1d conv_transpose2d conv_transpose3d convolution addcmul tensordot lerp grid_sample rmatmul addmv",
    "addr inner vdot ger kron cross linalg_cross",
)
_INDEXED = function_names("getitem index index_put")  # by one index for each dimension
_GATHERED = function_names("gather take_along_dim masked_select scatter scatter_add")  # by an index of each element
_ALONG_DIMENSION = function_names("index_select index_add index_copy")
CHOICES = _INDEXED | _GATHERED | _ALONG_DIMENSION
LINEAR_NAMES = function_names(
    # shapes
    "view view_as unsafe_view reshape reshape_as permute transpose swapaxes swapdims t adjoint get flatten ravel",
    "unflatten squeeze unsqueeze expand expand_as repeat repeat_interleave tile broadcast_to broadcast_tensors movedim",
    "moveaxis rollaxis narrow select slice split chunk unbind tensor_split hsplit vsplit dsplit split_with_sizes",
    "unsafe_split unsafe_chunk unsafe_split_with_sizes cat concat concatenate stack hstack vstack dstack column_stack",
    "row_stack block_diag flip fliplr flipud roll rot90 diag diagonal diag_embed diagflat tril triu trace unfold fold",
    "as_strided atleast_1d atleast_2d atleast_3d meshgrid pixel_shuffle pixel_unshuffle channel_shuffle",
    "native_channel_shuffle pad constant_pad_nd im2col col2im iter",
    # values as they are
    "to type type_as float double half bfloat16 cpu cuda contiguous clone alias positive pos detach requires_grad",
    "as_subclass copy to_copy resolve_conj resolve_neg lift_fresh dropout dropout1d dropout2d dropout3d alpha_dropout",
    "feature_dropout feature_alpha_dropout native_dropout real imag view_as_real view_as_complex conj conj_physical",
    "embedding embedding_bag complex",
    # sums
    "add sub subtract radd rsub neg negative sum mean nansum nanmean cumsum diff trapezoid avg_pool1d avg_pool2d",
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample upsample_nearest",
    "upsample_bilinear upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d",
    "upsample_bicubic2d upsample_trilinear3d affine_grid fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn",
    "fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_hfft fft_ihfft fft_fftshift fft_ifftshift stft",
    "istft zero zeros_like ones_like",
)
_KNOWN = ELEMENTWISE_NAMES | _GATES | PRODUCTS | CHOICES | {"softmax", "batch_norm", *MAX_POOLS}
# As their backward functions are called in autograd's graph; the last one stands for a whole scripted function.
HIDDEN_RECTIFIERS = function_names("relu relu6 threshold clamp clampmin hardtanh differentiablegraph")
HIDDEN_ELEMENTWISE = HIDDEN_RECTIFIERS | {name.replace("_", "") for name in ELEMENTWISE_NAMES}


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
    """Return the kind of a call, or None if its gradient is the rule of every method: if it is linear.

    Functions that are not listed above are `OTHER`.

    `depends` says whether a tensor is computed, with a gradient, from the network's input.
    """
    name = name_of(function).removeprefix("special_")
    if name in LINEAR_NAMES:
        return None
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    places = [
        place
        for place, value in arguments
        if any(isinstance(one, Tensor) and depends(one) for one in tree_leaves(value))
    ]
    if not places:
        return None
    place = places[0] if len(places) == 1 else None
    kind = _kind(name, args, kwargs, places)
    return None if kind == _LINEAR else Call(name, kind, place, overwrites(function, kwargs))


def _kind(name: str, args: Sequence[Any], kwargs: dict[str, Any], places: list[int | str]) -> str:
    if name in MAX_POOLS:
        return OTHER if kwargs.get("return_indices") else name
    if name == "softmax":
        return SOFTMAX
    if name == "batch_norm":
        return OTHER if argument(args, kwargs, 5, "training", False) else _LINEAR
    if name not in _KNOWN:
        return OTHER
    if name in CHOICES:
        return _kind_of_index(name, args, kwargs)
    if any(isinstance(one, Tensor) and one.is_complex() for one in tree_leaves((args, kwargs))):
        return _LINEAR if name in PRODUCTS | _GATES | _QUOTIENTS and places in ([0], [1]) else OTHER
    if name in PRODUCTS and len(places) > 1:
        return PRODUCT if name in ("mul", "multiply") else OTHER
    if name in _GATES and len(places) > 1:
        return _LINEAR if name == "setitem" else OTHER
    if name in _GATES:
        return _kind_of_gate(name, args, kwargs, places)
    if name in PRODUCTS:
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
        gate, kept = argument(args, kwargs, 0, "condition", None), argument(args, kwargs, 1, "input", None)
        other = argument(args, kwargs, 2, "other", None)
        if isinstance(kept, Tensor) and kept.dtype == torch.bool:  # the method of a tensor
            gate, kept = kept, gate
        if isinstance(kept, int | float) or places in ([2], ["other"]):
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
    return OTHER if not gate.requires_grad and gate.dim() == kept.dim() and _is_computed(gate, kept) else _LINEAR


def _kind_of_index(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Return the kind of a call that chooses elements of its first argument, or changes them, by indices."""
    chosen = argument(args, kwargs, 0, "input", None)
    if not isinstance(chosen, Tensor):
        return OTHER
    if name in _ALONG_DIMENSION:  # samples among others
        return OTHER if argument(args, kwargs, 1, "dim") in (0, -chosen.dim()) else _LINEAR
    choices = [*args[1:], *kwargs.values()]
    if name in _INDEXED:
        given = argument(args, kwargs, 1, "indices")
        given = given if isinstance(given, tuple | list) else [given]
        choices = list(given) if given and isinstance(given[0], Tensor) else []  # which belong together
    choices = [one for one in choices if isinstance(one, Tensor) and one.dim() and not one.is_floating_point()]
    if name in _GATHERED:
        choices = [one for one in choices if one.dim() == chosen.dim()]
    return OTHER if any(_is_computed(one, chosen) for one in choices) else _LINEAR


def _is_computed(choice: Tensor, of: Tensor) -> bool:
    """Whether a gate or index differs between inputs and baselines, the halves of DeepLIFT's batch."""
    if not of.dim() or len(choice) != len(of) or len(choice) % 2:
        return False
    samples = torch.arange(len(choice), device=choice.device)
    return not torch.equal(choice, samples) and not torch.equal(*choice.chunk(2))


def _is_zero(value: Any) -> bool:
    return bool((value == 0).all()) if isinstance(value, Tensor) else isinstance(value, int | float) and value == 0


def _is_positive(value: Any) -> bool:
    return value is None or bool((value > 0).all() if isinstance(value, Tensor) else value > 0)
