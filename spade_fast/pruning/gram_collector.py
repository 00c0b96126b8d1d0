"""Adds the inputs of layers to their Gram matrices while a network runs.

Convolutions and matrix products that use a tracked weight are intercepted below `torch.nn`, as calls of the ops
themselves. Whatever a module does around its call (padding of its own, padding modes, shared weights) is therefore
taken into account.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spade_fast import ops
from spade_fast._util.errors import MemoryLimitError
from spade_fast.pruning.convolutions import ConvolutionCall, add_convolution
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.matrix_products import Inputs, chosen_experts, grouped_inputs, product_inputs, same_view
from spade_fast.pruning.recurrent_calls import fused_inputs, without_cudnn
from spade_fast.pruning.weight_sums import WeightSums

_aten = torch.ops.aten
# Matrix products, each with the positions of its two factors among the arguments.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((_aten.mm, _aten.mv, _aten.bmm), (0, 1)),
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.baddbmm), (1, 2)),
}
_PRODUCTS_AND_CONVOLUTIONS = (*_PRODUCTS, _aten._grouped_mm, _aten.convolution)
# What is only added to or joined with activations is a bias, such as a position embedding or a class token.
_BIAS_USES = (_aten.add, _aten.add_, _aten.cat)
_BIAS_ARGUMENTS: dict[Any, int] = {
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.baddbmm), 0),
    _aten.convolution: 2,
}

_MOST_COPIES = 1 << 30  # bytes of chosen experts that are held during a forward pass


def gram_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a layer's Gram matrix is summed."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class GramCollector(TorchDispatchMode):
    """Adds the inputs of every convolution or matrix product with a tracked weight to the layer's Gram matrix.

    Parameters
    ----------
    model
        The model that will run.
    layers
        Its layers whose weights are tracked.
    watched : dict of Tensor
        By name, other weights of which only the use is noted.
    memory_limit
        Largest size of the Gram matrices of a layer whose shape as a matrix is known from its use alone, in bytes.

    Attributes
    ----------
    grams : dict of Tensor ``[G, C, C]``
        Sum of ``x xᵀ`` for each layer used so far; values below the diagonal are unspecified until `ops.mirror_upper_`
        is called.
    layers : dict of Layer
        Layers used so far; for a bare parameter, as what it is used.
    unsupported
        Layers whose weight was used by another operation, with the reason. They have no Gram matrix.
    used : dict
        Names of the `watched` weights that an operation has used so far, in that order. Parameters that are only added
        to or concatenated with activations do not count: they are biases.
    seconds
        Time spent in this class so far.
    collecting
        True while this class is at work, to distinguish its errors from those of the model.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Compiled code never runs under a dispatch mode; marking this one would import the compiler, which is slow.
        return False

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], watched: Mapping[str, Tensor], memory_limit: int | None = None
    ) -> None:
        super().__init__()
        self.grams: dict[str, Tensor] = {}
        self.layers: dict[str, Layer] = {}
        self._memory_limit = memory_limit
        self.unsupported: dict[str, str] = {}
        self.used: dict[str, None] = {}
        self.seconds = 0.0
        self.collecting = False
        # Keyed by storage, which all views of a weight share. Several parameters can be slices of one storage.
        self._tracked: dict[int, list[_Tracked | _Watched]] = defaultdict(list)
        self._casts: dict[tuple[str, int, torch.Size], _Tracked] = {}
        self._copies: list[_Tracked] = []
        self._sums = WeightSums(model) if any(layer.bare for layer in layers) else None
        for layer in layers:
            self._track(_Tracked(layer, layer.weight(model).detach()))
        for name, weight in watched.items():
            self._track(_Watched(name, weight.detach()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        found = [(tracked, tensor) for tensor in tensors for tracked in self._overlapping(tensor)]
        uses: list[tuple[_Tracked, Tensor]] = []
        added: list[str] = []
        for tracked, tensor in found:
            if isinstance(tracked, _Tracked):
                if tracked.layer.bare and _is_bias(tensor, func.overloadpacket, args):
                    added.append(tracked.layer.name)
                else:
                    uses.append((tracked, tensor))
        if len(uses) < len(found) and not func.is_view and func.overloadpacket not in _BIAS_USES:
            self._note([tracked for tracked, _ in found if isinstance(tracked, _Watched)])
        if uses or (self._sums is not None and self._sums.among(tensors)):
            # In inference mode composite functions arrive here undecomposed.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            if func.overloadpacket is _aten._cudnn_rnn:
                with self:
                    return without_cudnn(args)
        result = func(*args, **kwargs)  # before collecting, so that an invalid call raises its usual error
        if uses and not func.is_view:
            start = time.perf_counter()
            self.collecting = True
            self._add(uses, func.overloadpacket, args, result)
            self.collecting = False
            self.seconds += time.perf_counter() - start
        if self._sums is not None:
            terms = dict.fromkeys(added, func.overloadpacket)
            product = func.overloadpacket in _PRODUCTS_AND_CONVOLUTIONS
            for name, function in self._sums.follow(tensors, _tensors([result]), terms, product).items():
                self._refuse(name, function)
        return result

    def _add(self, uses: Sequence[tuple[_Tracked, Tensor]], function: Any, args: Sequence[Any], result: Any) -> None:
        """Add the inputs of one call to the Gram matrices of its weights, or note that this is impossible."""
        fused = fused_inputs(args, result) if function is _aten.mkldnn_rnn_layer else []
        modules = [tracked for tracked, _ in uses if not tracked.layer.bare]
        for tracked, tensor in uses:
            alone = len(uses) == 1 or [tracked] == modules  # bare parameters beside it are its inputs
            inputs = [given for weight, given in fused if weight is tensor]
            if alone and function is _aten._to_copy and self._follow_cast(tracked, tensor, result):
                continue
            if alone and self._follow_choice(tracked, tensor, function, args, result):
                continue
            if inputs and all(self._collect(tracked, tensor, _aten.mm, (given, tensor.t())) for given in inputs):
                continue
            if not alone or not self._collect(tracked, tensor, function, args):
                self._refuse(tracked.layer.name, function)

    def _refuse(self, name: str, function: Any) -> None:
        self.unsupported.setdefault(name, f"its weight is used by {function}")
        self.grams.pop(name, None)

    def _track(self, tracked: _Tracked | _Watched) -> None:
        self._tracked[tracked.weight.untyped_storage().data_ptr()].append(tracked)

    def _untrack(self, tracked: _Tracked | _Watched) -> None:
        self._tracked[tracked.weight.untyped_storage().data_ptr()].remove(tracked)

    def _note(self, used: Iterable[_Watched]) -> None:
        """Record the first use of weights, which need not be watched from then on."""
        for watched in used:
            if watched.name not in self.used:
                self.used[watched.name] = None
                self._untrack(watched)

    def _follow_cast(self, tracked: _Tracked, tensor: Tensor, cast: Tensor) -> bool:
        """Treat a weight's copy in another dtype, as autocast makes it, as the weight itself until the next cast.

        Return False if it is not a copy, with the same layout, of the whole weight or of some experts.
        """
        if tracked.chosen is not None:
            return False
        weight, shape = tracked.weight, tracked.weight.shape
        start, stop = (end // tensor.itemsize for end in _extent(tensor))
        first, rest = start - int(weight.storage_offset()), 0
        if tensor.numel() < weight.numel() and tracked.layer.bare and len(shape) == 3 and weight.is_contiguous():
            first, rest = divmod(first, weight.stride(0))
            shape = torch.Size([tensor.numel() // weight.stride(0), *shape[1:]])
        if rest or not stop - start == tensor.numel() == shape.numel() or cast.stride() != tensor.stride():
            return False
        key = tracked.layer.name, tracked.first + first, shape
        before = self._casts.pop(key, None)
        if before is not None:
            self._untrack(before)
        like = cast.as_strided(shape, weight.stride())
        self._casts[key] = after = _Tracked(tracked.layer, like, tracked.first + first)
        self._track(after)
        return True

    def _follow_choice(
        self, tracked: _Tracked, tensor: Tensor, function: Any, args: Sequence[Any], copies: Tensor
    ) -> bool:
        """Treat copies of chosen experts as these experts until `forget_copies`; return False if they are too large."""
        if not tracked.layer.bare or tracked.chosen is not None:
            return False
        numbers = chosen_experts(tracked.weight, tensor, function, args)
        held = sum(one.weight.nbytes for one in self._copies)
        if numbers is None or held + copies.nbytes > _MOST_COPIES:
            return False
        self._copies.append(_Tracked(tracked.layer, copies, chosen=numbers + tracked.first))
        self._track(self._copies[-1])
        return True

    def forget_copies(self) -> None:
        """Free the copies of experts that the last forward pass made."""
        while self._copies:
            self._untrack(self._copies.pop())

    def _overlapping(self, tensor: Tensor) -> list[_Tracked | _Watched]:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
            return []
        candidates = self._tracked.get(tensor.untyped_storage().data_ptr())
        if not candidates:
            return []
        start, stop = _extent(tensor)
        return [tracked for tracked in candidates if tracked.extent[0] < stop and start < tracked.extent[1]]

    def _collect(self, tracked: _Tracked, tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
        """Add the inputs of one call; return False if the call is not a product of the whole weight with its inputs."""
        name = tracked.layer.name
        if name in self.unsupported or tensor.dtype != tracked.weight.dtype:
            return False
        for layer in self._forms(tracked.layer, function, args):
            if tracked.chosen is not None and not layer.experts:
                continue
            if self._collect_as(layer, tracked, tensor, function, args):
                self.layers[name] = layer
                return True
        return False

    def _forms(self, layer: Layer, function: Any, args: Sequence[Any]) -> list[Layer]:
        """Return as what a weight may be used: after its first use, as the same thing only."""
        if layer.name in self.layers:
            return [self.layers[layer.name]]
        if layer.bare and function is _aten.convolution and len(layer.shape) > 2:
            return [layer.as_convolution(groups=args[8], transposed=args[6])]
        return layer.as_matrices()

    def _collect_as(self, layer: Layer, tracked: _Tracked, tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
        weight = tracked.weight
        if function is _aten.convolution:
            call = _convolution_call(layer, weight, tensor, args)
            if call is not None and call.x.numel() > 0:
                gram = self._gram(layer, weight, call.x.device)
                add_convolution(gram, replace(call, x=_summable(call.x, gram)))
            return call is not None
        if function in _PRODUCTS:
            found = product_inputs(layer, weight, tensor, *(args[i] for i in _PRODUCTS[function]))
        elif function is _aten._grouped_mm:
            found = grouped_inputs(layer, weight, tensor, args)
        else:
            return False
        for first, inputs in (one for given in found or [] for one in tracked.by_expert(*given)):
            if inputs.numel() > 0:
                gram = self._gram(layer, weight, inputs.device)[first : first + len(inputs)]
                ops.gram_linear_(gram, _summable(inputs, gram))
        return found is not None

    def _gram(self, layer: Layer, weight: Tensor, device: torch.device) -> Tensor:
        if layer.name not in self.grams:
            size = layer.groups * layer.columns**2 * gram_dtype(weight).itemsize
            if layer.bare and self._memory_limit is not None and size > self._memory_limit:
                raise MemoryLimitError(
                    f"parameter {layer.name!r} is used as a layer that needs {size} bytes for its Gram matrices, more "
                    f"than the memory_limit of {self._memory_limit} bytes: leave it out of `layers`"
                )
            shape = (layer.groups, layer.columns, layer.columns)
            with torch.inference_mode(
                False
            ):  # otherwise it could not be updated outside the model's own inference mode
                self.grams[layer.name] = torch.zeros(shape, dtype=gram_dtype(weight), device=device)
        return self.grams[layer.name]


def _summable(inputs: Tensor, gram: Tensor) -> Tensor:
    return inputs if inputs.dtype == torch.bfloat16 and gram.dtype == torch.float32 else inputs.to(gram.dtype)


class _Watched:
    """A weight that is not pruned, and the range of bytes that it occupies in its storage."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight, self.extent = name, weight, _extent(weight)


class _Tracked:
    """A layer, its weight or that of experts, and the bytes that this occupies in its storage.

    The experts are those from `first` on, or those that were `chosen`, Tensor ``[experts]``.
    """

    def __init__(self, layer: Layer, weight: Tensor, first: int = 0, chosen: Tensor | None = None) -> None:
        self.layer, self.weight, self.extent = layer, weight, _extent(weight)
        self.first, self.chosen = first, chosen

    def by_expert(self, place: int, inputs: Tensor) -> Iterator[Inputs]:
        """Iterate over the inputs ``[experts, N, C]`` of the experts here from `place` on, by numbers of the layer."""
        if self.chosen is None:
            yield self.first + place, inputs
            return
        numbers = self.chosen[place : place + len(inputs)]
        for number in numbers.unique().tolist():
            yield number, inputs[numbers == number].flatten(0, 1)[None]


def _is_bias(tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
    place = _BIAS_ARGUMENTS.get(function)
    return function in _BIAS_USES or (place is not None and args[place] is tensor)


def _extent(tensor: Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset())
    stop = start + 1 + sum((int(size) - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.itemsize, stop * tensor.itemsize


def _convolution_call(layer: Layer, weight: Tensor, kernel: Tensor, args: Sequence[Any]) -> ConvolutionCall | None:
    """Return the call of a convolution if its kernel is the whole weight."""
    x, given_kernel, _, stride, padding, dilation, transposed, output_padding, groups = args
    inputs_outputs = (layer.groups * layer.columns // layer.taps, layer.rows)
    leading = inputs_outputs if transposed else (layer.groups * layer.rows, layer.columns // layer.taps)
    if given_kernel is not kernel or transposed != layer.transposed or groups != layer.groups:
        return None
    if kernel.shape[:2] != leading or kernel.data_ptr() != weight.data_ptr() or not same_view(kernel, weight):
        return None
    sizes = tuple(kernel.shape[2:])

    def each(given: Sequence[int]) -> tuple[int, ...]:
        return tuple(given) * len(sizes) if len(given) == 1 else tuple(given)  # one number applies to all dimensions

    return ConvolutionCall(x, sizes, each(stride), each(padding), each(dilation), transposed, each(output_padding))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
