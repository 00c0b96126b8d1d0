"""Which dimension of a feature map holds its channels: the second, as in convolutions, or the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spade_fast.attribution.function_calls import argument, function_names, name_of

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


class Layouts(TorchFunctionMode):
    """Tracks, during a forward pass, where the channels of its four-dimensional tensors are.

    Parameters
    ----------
    image : Tensor ``[N, C, H, W]``
        The input of the pass.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self._channels: Any = WeakTensorKeyDictionary()
        self._set(image, FIRST)

    def channels(self, tensor: Tensor) -> int | None:
        """Return `FIRST` or `LAST`, or None if the operations on the tensor did not tell."""
        found: int | None = self._channels.get(tensor)
        return found

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = name_of(function)
        given = args[0] if args else next(iter(kwargs.values()), None)
        layout = self._layout(name, given, args, kwargs)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._set(one, layout)
        return result

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
