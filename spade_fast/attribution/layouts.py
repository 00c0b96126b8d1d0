"""Where the channels of a feature map are, the second dimension or the last, and the places of tokens in the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spade_fast.attribution.function_calls import argument, function_names, name_of
from spade_fast.attribution.function_kinds import ELEMENTWISE_NAMES

FIRST, LAST = 1, 3

# Functions of maps [N, C, H, W].
_OF_FIRST = function_names(
    "conv2d conv_transpose2d batch_norm instance_norm group_norm local_response_norm max_pool2d avg_pool2d",
    "adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices fractional_max_pool2d lp_pool2d interpolate",
    "upsample pixel_shuffle pixel_unshuffle channel_shuffle grid_sample",
)
_NORMS = frozenset(("layer_norm", "rms_norm"))
_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "std", "var", "norm", "logsumexp"))
_EXCHANGES = frozenset(("transpose", "swapaxes", "swapdims"))
# After these, among them properties such as mT, the order of the dimensions is not known.
_OTHERS = function_names(
    "view reshape unflatten movedim moveaxis rollaxis einsum tensordot matmul bmm baddbmm stack unfold fold",
    "scaled_dot_product_attention rot90 as_strided unsqueeze expand squeeze get",
)


_RESHAPES = function_names("view reshape flatten unflatten")
# They change each token by itself.
_OF_TOKENS = ELEMENTWISE_NAMES | function_names(
    "linear layer_norm rms_norm add sub subtract rsub radd mul multiply neg where masked_fill softmax dropout",
    "alpha_dropout feature_dropout to type float double half bfloat16 contiguous clone",
)


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a tensor with three dimensions are the positions of a feature map, row by row.

    Attributes
    ----------
    height, width : int
        Of the map.
    start : int
        Number of tokens before them, such as the class token.
    axis : int
        Dimension of the tokens.
    """

    height: int
    width: int
    start: int
    axis: int

    @property
    def count(self) -> int:
        return self.height * self.width

    def to_map(self, tokens: Tensor) -> Tensor:
        """Return the map ``[N, C, height, width]`` of these tokens; others are left out."""
        tokens = tokens.movedim(self.axis, -1) if self.axis else tokens.permute(1, 2, 0)
        return tokens.narrow(-1, self.start, self.count).unflatten(-1, (self.height, self.width))


class Layouts(TorchFunctionMode):
    """Tracks, during a forward pass, where the channels of its four-dimensional tensors are, and where its tokens are.

    Tokens are followed from the feature map of which they were made, such as the output of the convolution that embeds
    the patches of a vision transformer.

    Parameters
    ----------
    inputs
        Of the pass. Those with four dimensions are images ``[N, C, H, W]``.
    """

    def __init__(self, *inputs: Any) -> None:
        super().__init__()
        self._channels: Any = WeakTensorKeyDictionary()
        self._tokens: Any = WeakTensorKeyDictionary()
        for one in tree_leaves(inputs):
            self._set(one, FIRST)

    def channels(self, tensor: Tensor) -> int | None:
        """Return `FIRST` or `LAST`, or None if the operations on the tensor did not tell."""
        found: int | None = self._channels.get(tensor)
        return found

    def tokens(self, tensor: Tensor) -> Tokens | None:
        """Return the places of the tokens ``[N, T, C]``, or None if the operations on the tensor did not tell."""
        found: Tokens | None = self._tokens.get(tensor)
        return found

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(function)
        given = args[0] if args else next(iter(kwargs.values()), None)
        result = function(*args, **kwargs)
        layout = self._layout(name, given, args, kwargs)
        if name in _RESHAPES and isinstance(result, Tensor) and result.dim() == 4:
            layout = self._layout_of_tokens(given, result)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._set(one, layout)
        if isinstance(result, Tensor) and result.dim() == 3:
            tokens = self._places(name, given, args, kwargs, result)
            if tokens is None:
                self._tokens.pop(result, None)
            else:
                self._tokens[result] = tokens
        return result

    def _layout_of_tokens(self, given: Any, result: Tensor) -> int | None:
        """Return the layout of a map that is made of all tokens."""
        tokens = self.tokens(given) if isinstance(given, Tensor) else None
        if tokens is None or tokens.count != given.shape[tokens.axis] or tokens.axis == 0:
            return None
        size = (tokens.height, tokens.width)
        channels = given.shape[3 - tokens.axis]
        expected = (*size, channels) if tokens.axis == 1 else (channels, *size)
        return (LAST if tokens.axis == 1 else FIRST) if tuple(result.shape[1:]) == expected else None

    def _places(
        self, name: str, given: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor
    ) -> Tokens | None:
        """Return the places of the tokens that are a call's result."""
        if name in _RESHAPES:
            return self._flattened(given, result)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = [(one, self._tokens[one]) for one in tensors if one in self._tokens]
        places = {one for _, one in known}
        if len(places) != 1:
            return None
        tokens = places.pop()
        if name in ("cat", "concat", "concatenate"):
            parts, dim = argument(args, kwargs, 0, "tensors"), argument(args, kwargs, 1, "dim", 0) % 3
            if dim != tokens.axis:
                return tokens
            place = next(index for index, one in enumerate(parts) if one is known[0][0])
            before = sum(one.shape[dim] for one in parts[:place])
            return replace(tokens, start=tokens.start + before) if len(known) == 1 else None
        if name == "permute":
            dims = argument(args, kwargs, 1, "dims")
            order = dims if isinstance(dims, tuple | list) else args[1:]
            return replace(tokens, axis=[one % 3 for one in order].index(tokens.axis))
        if name in _EXCHANGES:
            pair = [one % 3 for one in (*args[1:3], *kwargs.values())]
            return replace(tokens, axis=sum(pair) - tokens.axis) if tokens.axis in pair else tokens
        if name == "getitem":
            return _sliced(tokens, args[1], given.shape)
        kept = name in _OF_TOKENS and all(one.shape[tokens.axis] == result.shape[tokens.axis] for one, _ in known)
        # The last dimension is that of which linear layers and norms are functions.
        return tokens if kept and (tokens.axis != 2 or name not in _NORMS | {"linear", "softmax"}) else None

    def _flattened(self, given: Any, result: Tensor) -> Tokens | None:
        """Return the places of tokens that are the positions of a map."""
        channels = self.channels(given) if isinstance(given, Tensor) and given.dim() == 4 else None
        if channels is None:
            return None
        height, width = given.shape[2:] if channels == FIRST else given.shape[1:3]
        tokens = Tokens(height, width, 0, 2 if channels == FIRST else 1)
        shape = [given.shape[0], given.shape[channels], given.shape[channels]]
        shape[tokens.axis] = height * width
        return tokens if list(result.shape) == shape else None

    def _layout(self, name: str, given: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
        known = self.channels(given) if isinstance(given, Tensor) else None
        if name in _OF_FIRST:
            self._set(given, FIRST)
            return FIRST
        if name == "linear" or (name in _NORMS and len(argument(args, kwargs, 1, "normalized_shape")) == 1):
            if known == FIRST:  # a function of the columns of a map
                return None
            self._set(given, LAST)
            return LAST
        if name in _REDUCTIONS or name == "flatten":
            self._set(given, known or _kept(name, args, kwargs))
        elif name == "permute":
            order = kwargs.get("dims") or (args[1] if isinstance(args[1], tuple | list) else args[1:])
            return None if known is None else _known([one % 4 for one in order].index(known))
        elif name in _EXCHANGES:
            pair = [one % 4 for one in (*args[1:3], *kwargs.values())]
            return known if known not in pair else _known(sum(pair) - (known or 0))
        if name in _OTHERS:
            return None
        layouts = {self.channels(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)} - {None}
        return layouts.pop() if len(layouts) == 1 else None

    def _set(self, tensor: Any, layout: int | None) -> None:
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            return
        if layout is None:
            self._channels.pop(tensor, None)
        else:
            self._channels[tensor] = layout


def _known(channels: int) -> int | None:
    return channels if channels in (FIRST, LAST) else None


def _kept(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Return the layout of a map whose rows and columns a reduction, or `flatten`, puts together."""
    if name == "flatten":
        start = argument(args, kwargs, 1, "start_dim") or 0
        end = argument(args, kwargs, 2, "end_dim", -1)
        places = set(range(start % 4, end % 4 + 1))
    else:
        dims = argument(args, kwargs, 1, "dim")
        places = {one % 4 for one in dims} if isinstance(dims, tuple | list) else set()
    return FIRST if places == {2, 3} else LAST if places == {1, 2} else None


def _sliced(tokens: Tokens, index: Any, shape: Sequence[int]) -> Tokens | None:
    """Return the places of a slice of tokens, which holds all of a map's."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(one, slice) and one.step in (None, 1) for one in index):
        return None
    if len(index) <= tokens.axis:
        return tokens
    first, last, _ = index[tokens.axis].indices(shape[tokens.axis])
    inside = first <= tokens.start and tokens.start + tokens.count <= last
    return replace(tokens, start=tokens.start - first) if inside else None
