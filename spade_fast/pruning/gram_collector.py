"""Adds the inputs of layers to their Gram matrices while a network runs.

Convolutions and matrix products that use a tracked weight are intercepted below `torch.nn`, as calls of the ops
themselves. Whatever a module does around its call (padding of its own, padding modes, shared weights) is therefore
taken into account.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from spade_fast._util.errors import MemoryLimitError
from spade_fast.pruning.convolutions import ConvolutionCall, add_convolution
from spade_fast.pruning.dense_weights import DTYPES
from spade_fast.pruning.gram_sums import Call, GramSums
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.matrix_products import (
    Inputs,
    add_rows,
    chosen_experts,
    grouped_inputs,
    product_inputs,
    same_view,
)
from spade_fast.pruning.recurrent_calls import fused_inputs, without_cudnn
from spade_fast.pruning.weight_sums import WeightSums

_aten = torch.ops.aten
# Matrix products, each with the positions of its two factors among the arguments.
PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((_aten.mm, _aten.mv, _aten.bmm), (0, 1)),
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.baddbmm, _aten._sparse_addmm), (1, 2)),
}
_PRODUCTS_AND_CONVOLUTIONS = (*PRODUCTS, _aten._grouped_mm, _aten.convolution)
# What is only added to or joined with activations is a bias, such as a position embedding or a class token.
_BIAS_USES = (_aten.add, _aten.add_, _aten.cat)
_BIAS_ARGUMENTS: dict[Any, int] = {
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.baddbmm), 0),
    _aten.convolution: 2,
}
# Beside those of other libraries. `view` fails by itself.
_READ_LAYOUT = (_aten.as_strided, _aten.as_strided_, _aten.set_, _aten.resize_)
_LOOKUPS = (_aten.index, _aten.index_select, _aten.gather, _aten.embedding, _aten._embedding_bag)


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
        Sum of ``x xᵀ`` for each layer used so far, one tensor for layers with equal inputs; values below the diagonal
        are unspecified until `ops.mirror_upper_` is called.
    layout_changed : bool
        Whether the model was given images in another memory layout than its user has. An operation on them that depends
        on the layout is then an error.
    names : frozenset of str
        Names of the layers whose weights are tracked.
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

    supports_higher_order_operators = True  # such as flex_attention, which call functions; they are not looked into

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Compiled code never runs under a dispatch mode; marking this one would import the compiler, which is slow.
        return False

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], watched: Mapping[str, Tensor], memory_limit: int | None = None
    ) -> None:
        super().__init__()
        self._products = GramSums()
        self.grams = self._products.grams
        self.layers: dict[str, Layer] = {}
        self.names = frozenset(layer.name for layer in layers)
        self._memory_limit = memory_limit
        self.unsupported: dict[str, str] = {}
        self.used: dict[str, None] = {}
        self.seconds = 0.0
        self.layout_changed = False
        self.collecting = False
        # Keyed by storage, which all views of a weight share. Several parameters can be slices of one storage. Copies
        # of weights stay here until another one gets the address of their memory.
        self._tracked: dict[int, list[_Tracked | _Watched]] = defaultdict(list)
        self._sums = WeightSums(model) if any(layer.bare for layer in layers) else None
        # Vectors, such as [C, 1, 1], that are not matrices but scales, as of a norm, are not layers.
        self._vectors = {layer.name for layer in layers if layer.bare and sum(size > 1 for size in layer.shape) < 2}
        self._scales: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}  # of Gram matrices
        for layer in layers:
            weight = layer.weight(model).detach()
            self._dtypes[layer.name] = gram_dtype(weight)
            self._track(_Tracked(layer, weight))
        for name, weight in watched.items():
            self._track(_Watched(name, weight.detach()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Subclasses such as nested tensors call ops on the tensors that they hold.
        if types and any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()) if kwargs else args)
        if self.layout_changed and _reads_layout(func, tensors):
            raise RuntimeError(f"{func} may depend on the memory layout of its arguments")
        found = [(tracked, tensor) for tensor in tensors for tracked in self._overlapping(tensor)]
        if not found and self._sums is None:
            return _called(func, args, kwargs)
        if isinstance(func, HigherOrderOperator):
            for tracked, _ in found:
                if isinstance(tracked, _Tracked):
                    self._refuse(tracked.layer.name, func)
            self._note([tracked for tracked, _ in found if isinstance(tracked, _Watched)])
            return func(*args, **kwargs)
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
        followed = uses or (self._sums is not None and self._sums.among(tensors))
        whole = func.overloadpacket in _PRODUCTS_AND_CONVOLUTIONS
        if followed and not whole and not any(one.is_nested for one in tensors):  # which have functions of their own
            # In inference mode composite functions arrive here undecomposed.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            if func.overloadpacket is _aten._cudnn_rnn:
                with self:
                    return without_cudnn(args)
        result = _called(func, args, kwargs)  # before collecting, so that an invalid call raises its usual error
        if uses and not func.is_view:
            scale = [kwargs["alpha"]] if "alpha" in kwargs else []  # of the product in addmm and the like
            with self.at_work():
                self._add(uses, func.overloadpacket, (*args, *scale), result)
        if self._sums is not None:
            terms = dict.fromkeys(added, func.overloadpacket)
            for name, function in self._sums.follow(tensors, _tensors([result]), terms, whole).items():
                self._refuse(name, function)
        return result

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count the time of a ``with`` block in `seconds`, and tell its errors from those of the model."""
        start = time.perf_counter()
        self.collecting = True
        yield
        self.collecting = False
        self.seconds += time.perf_counter() - start

    def _add(self, uses: Sequence[tuple[_Tracked, Tensor]], function: Any, args: Sequence[Any], result: Any) -> None:
        """Add the inputs of one call to the Gram matrices of its weights, or note that this is impossible."""
        fused = fused_inputs(args, result) if function is _aten.mkldnn_rnn_layer else []
        if fused:  # in which a weight that is tied to another of the layer has the inputs of both
            uses = list({(tracked, id(tensor)): (tracked, tensor) for tracked, tensor in uses}.values())
        modules = [tracked for tracked, _ in uses if not tracked.layer.bare]
        for tracked, tensor in uses:
            alone = len(uses) == 1 or [tracked] == modules  # bare parameters beside it are its inputs
            inputs = [given for weight, given in fused if weight is tensor]
            if alone and function is _aten._to_copy and self._follow_cast(tracked, tensor, result):
                continue
            if alone and self._follow_choice(tracked, tensor, function, args, result):
                continue
            if inputs and all(self._collect(tracked, tensor, _aten.mm, (tensor, given.t())) for given in inputs):
                continue
            if not alone or not self._collect(tracked, tensor, function, args):
                self._refuse(tracked.layer.name, function)

    def _refuse(self, name: str, function: Any) -> None:
        scaling = function not in (*_PRODUCTS_AND_CONVOLUTIONS, *_LOOKUPS)
        if name in self._vectors and name not in self.layers and scaling:
            self._scales.add(name)
            return
        self.unsupported.setdefault(name, f"its weight is used by {function}")
        self._products.drop(name)

    def _track(self, tracked: _Tracked | _Watched) -> None:
        others = [one for one in self._tracked[tracked.address] if not one.freed]
        self._tracked[tracked.address] = [*others, tracked]

    def _note(self, used: Iterable[_Watched]) -> None:
        """Record the first use of weights, which need not be watched from then on."""
        for watched in used:
            if watched.name not in self.used:
                self.used[watched.name] = None
                self._tracked[watched.address].remove(watched)

    def _follow_cast(self, tracked: _Tracked, tensor: Tensor, cast: Tensor) -> bool:
        """Treat a weight's copy in another dtype, as autocast makes it, as the weight itself.

        Return False if it is not a copy, with the same layout, of the whole weight or of some experts, or is of a type
        that no weight is.
        """
        if tensor.dtype != tracked.dtype or cast.dtype not in DTYPES:
            return False
        weight = tracked.weight(tensor)
        shape = weight.shape
        start, stop = (end // tensor.itemsize for end in _extent(tensor))
        first, rest = 0, start - int(weight.storage_offset())
        if tensor.numel() < weight.numel() and tracked.layer.bare and len(shape) == 3 and weight.is_contiguous():
            first, rest = divmod(rest, weight.stride(0))
            shape = torch.Size([tensor.numel() // weight.stride(0), *shape[1:]])
        if rest or not stop - start == tensor.numel() == shape.numel() or cast.stride() != tensor.stride():
            return False
        like = cast.as_strided(shape, weight.stride())
        chosen = None if tracked.chosen is None else tracked.chosen[first:]
        self._track(_Tracked(tracked.layer, like, tracked.first + first, chosen))
        return True

    def _follow_choice(
        self, tracked: _Tracked, tensor: Tensor, function: Any, args: Sequence[Any], copies: Tensor
    ) -> bool:
        """Treat copies of chosen experts as these experts; return False if the call does something else."""
        if not tracked.layer.bare or tracked.chosen is not None or tensor.dtype != tracked.dtype:
            return False
        numbers = chosen_experts(tracked.weight(tensor), tensor, function, args)
        if numbers is None:
            return False
        self._track(_Tracked(tracked.layer, copies, chosen=numbers + tracked.first))
        return True

    def _overlapping(self, tensor: Tensor) -> Sequence[_Tracked | _Watched]:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
            return ()
        candidates = self._tracked.get(tensor.untyped_storage().data_ptr())
        if not candidates:
            return ()
        start, stop = _extent(tensor)
        return [one for one in candidates if one.extent[0] < stop and start < one.extent[1] and not one.freed]

    def _collect(self, tracked: _Tracked, tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
        """Add the inputs of one call; return False if the call is not a product of the whole weight with its inputs."""
        name = tracked.layer.name
        if name in self.unsupported or name in self._scales or tensor.dtype != tracked.dtype:
            return False
        for layer in self._forms(tracked.layer, function, args):
            if tracked.chosen is not None and not layer.experts:
                continue
            if self.collect(layer, tracked, tensor, function, args):
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

    def collect(self, layer: Layer, tracked: Any, tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
        """Add the inputs of a call that uses a weight, `tensor`, as one of a layer; return False if it does not."""
        weight = tracked.weight(tensor)
        if function is _aten.convolution:
            call = _convolution_call(layer, weight, tensor, args)
            if call is not None and call.x.numel() > 0:
                geometry = {**vars(call), "x": call.x.stride()}
                self._add_product(layer, Call(call.x, geometry), call.x.device, partial(add_convolution, call=call))
            return call is not None
        if function in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[function])
            scale = args[3] if len(args) > 3 else 1
            if tensor is not left and tensor is not right:  # it is added to the product
                return False
            found = product_inputs(layer, weight, tensor, left, right)
        elif function is _aten._grouped_mm:
            scale = 1
            found = grouped_inputs(layer, weight, tensor, args)
        else:
            return False
        for first, inputs in (one for given in found or [] for one in tracked.by_expert(*given)):
            if inputs.numel() > 0:
                whole = Call(inputs, (inputs.stride(), scale)) if len(inputs) == layer.groups else None
                self._add_product(layer, whole, inputs.device, partial(add_rows, first, inputs, scale))
        return found is not None

    def _add_product(
        self, layer: Layer, call: Call | None, device: torch.device, add: Callable[[Tensor], None]
    ) -> None:
        def zeros() -> Tensor:
            dtype = self._dtypes[layer.name]
            size = layer.groups * layer.columns**2 * dtype.itemsize
            if layer.bare and self._memory_limit is not None and size > self._memory_limit:
                raise MemoryLimitError(
                    f"parameter {layer.name!r} is used as a layer that needs {size} bytes for its Gram matrices, more "
                    f"than the memory_limit of {self._memory_limit} bytes: leave it out of `layers`"
                )
            shape = (layer.groups, layer.columns, layer.columns)
            with torch.inference_mode(False):  # otherwise it could not be updated outside the model's inference mode
                return torch.zeros(shape, dtype=dtype, device=device)

        self._products.add(layer.name, call, zeros, add)


class _Bytes:
    """The bytes of a storage that a tensor occupies, as long as the storage exists."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.address, self.extent, self._storage = storage.data_ptr(), _extent(tensor), weakref.ref(storage)

    @property
    def freed(self) -> bool:
        """Whether the storage no longer exists; another may be at its address."""
        return self._storage() is None


class _Watched(_Bytes):
    """A weight that is not pruned."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__(weight)
        self.name = name


class _Tracked(_Bytes):
    """A layer, and its weight, or a copy of it, or that of experts.

    The experts are those from `first` on, or those that were `chosen`, Tensor ``[experts]``.
    """

    def __init__(self, layer: Layer, weight: Tensor, first: int = 0, chosen: Tensor | None = None) -> None:
        super().__init__(weight)
        self.layer, self.dtype, self.first, self.chosen = layer, weight.dtype, first, chosen
        self._geometry = weight.shape, weight.stride(), weight.storage_offset()

    def weight(self, tensor: Tensor) -> Tensor:
        """Return the weight, given any tensor of its type in its storage."""
        return tensor.as_strided(*self._geometry)

    def by_expert(self, place: int, inputs: Tensor) -> Iterator[Inputs]:
        """Iterate over the inputs ``[experts, N, C]`` of the experts here from `place` on, by numbers of the layer."""
        if self.chosen is None:
            yield self.first + place, inputs
            return
        numbers = self.chosen[place : place + len(inputs)]
        for number in numbers.unique().tolist():
            yield number, inputs[numbers == number].flatten(0, 1)[None]


def _called(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function. Casts of parameters that require grad do so, too, as those that autocast keeps.

    Torch's `matmul` copies a weight that requires none for each row of inputs, which in bfloat16 takes longer than the
    product.
    """
    result = function(*args, **kwargs)
    if function is _aten._to_copy.default and isinstance(args[0], nn.Parameter) and result.dtype == torch.bfloat16:
        result.requires_grad_(args[0].requires_grad)
    return result


def _reads_layout(function: Any, tensors: Iterable[Tensor]) -> bool:
    if function.namespace == "aten" and function.overloadpacket not in _READ_LAYOUT:
        return False
    return any(one.layout is torch.strided and not one.is_contiguous() for one in tensors)


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


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
