"""Collects the Gram matrices of layer inputs while the dense network runs over a calibration set.

The calls of convolution and matrix multiplication themselves are intercepted, below `torch.nn`, wherever they use a
tracked weight. What a module does around its call (own padding, padding modes, sharing) is therefore right by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spade_fast import ops
from spade_fast.layers import Layer
from spade_fast.settings import images_a_batch
from spade_fast.stages import stage

PRECISIONS = ("float32", "bf16")

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Batches = Tensor | Iterable[Batch]

_ConvolutionCall = tuple[Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]
_aten = torch.ops.aten
# Matrix products by the positions of their two factors.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((_aten.mm, _aten.mv, _aten.bmm), (0, 1)),
    **dict.fromkeys((_aten.addmm, _aten.addmv, _aten.baddbmm), (1, 2)),
}


@dataclass
class Calibration:
    """What one run over a calibration set gives.

    Attributes
    ----------
    grams : dict of Tensor, [groups, columns, columns]
        Sum of ``x xᵀ`` over positions and images of the inputs of each reached layer, symmetric; float64 for float64
        weights, else float32. On the device of the layer's inputs.
    images
        Number of images.
    unreached
        Layers that the network did not use.
    unsupported
        Layers whose weight was used by an operation that is no convolution or matrix product of the whole weight
        (and perhaps by those too), with the reason. They have no Gram matrix.
    seconds
        Time by stage: ``augment`` (waiting for batches), ``forward``, ``gram``.
    """

    grams: dict[str, Tensor]
    images: int
    unreached: list[str]
    unsupported: dict[str, str]
    seconds: dict[str, float]


def calibrate(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[Layer],
    *,
    precision: str = "float32",
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Run the dense model over a calibration set and collect the Gram matrices of layers.

    The model runs without gradients in evaluation mode, and is left as it was, also after an exception: modes, buffers
    and weights.

    Parameters
    ----------
    model
        The dense model.
    batches
        Images ``[n, C, H, W]``, or an iterable of batches: tensors, sequences of positional arguments or mappings of
        keyword arguments of the model. They are moved to the model's device; their first dimension counts images.
    layers
        Layers of the model (:func:`spade_fast.layers.find_layers`).
    precision : "float32" or "bf16"
        With ``"bf16"`` the model runs under autocast to bfloat16, images in channels-last memory, and the products of
        its bfloat16 layer inputs are summed in float32. With ``"float32"`` all is as the model says.
    progress
        Called with the number of images after each batch.

    Raises
    ------
    TypeError
        `batches` or a batch of the wrong type, or a batch of the wrong dtype.
    ValueError
        No images; NaN or infinite values in a batch or in the inputs of a layer; a batch which the model cannot run.
    """
    collector = _GramCollector(model, layers)
    device = next(model.parameters()).device
    augmenting = forward = 0.0
    images = 0
    with _undisturbed(model):
        mark = time.perf_counter()
        for index, given in enumerate(_awaited(split_batches(batches))):
            batch = _checked(given, index, device)
            if precision == "bf16":
                batch = _channels_last(batch)
            images += _images(batch)
            ready = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                _run(model, batch, index, collector)
            done = time.perf_counter()
            augmenting, forward, mark = augmenting + ready - mark, forward + done - ready, done
            if progress is not None:
                progress(images)
    if images == 0:
        raise ValueError("batches is empty: there is no image to calibrate on")
    with stage("gram"):
        for name, gram in collector.grams.items():
            # A value that is not finite reaches the diagonal, and finite diagonals bound all other entries.
            if not bool(torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all()):
                raise ValueError(f"layer {name!r} got NaN, infinite or too large inputs during calibration")
            ops.mirror_upper_(gram)
    collecting = collector.seconds + time.perf_counter() - mark
    grams = {layer.name: collector.grams[layer.name] for layer in layers if layer.name in collector.grams}
    unreached = [layer.name for layer in layers if layer.name not in grams and layer.name not in collector.unsupported]
    seconds = {"augment": augmenting, "forward": forward - collector.seconds, "gram": collecting}
    return Calibration(grams, images, unreached, collector.unsupported, seconds)


def split_batches(batches: Batches) -> Iterable[Batch]:
    """Return the batches of a calibration set given as a tensor of images or as an iterable."""
    if isinstance(batches, Tensor):
        if batches.dim() == 0:
            raise ValueError("batches must be images [n, C, H, W] or an iterable of batches, got a single number")
        # Only for images is the first dimension known to be one of independent items.
        return batches.split(images_a_batch(batches.device)) if batches.dim() == 4 else [batches]
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a tensor or an iterable of batches, got {type(batches).__name__}")
    return batches


def _awaited(batches: Iterable[Batch]) -> Iterator[Batch]:
    iterator = iter(batches)
    while True:
        with stage("augment"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def gram_bytes(layer: Layer, model: nn.Module) -> int:
    """Bytes of a layer's Gram matrices for one sample."""
    return layer.groups * layer.columns**2 * _gram_dtype(layer.weight(model)).itemsize


def _gram_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class _GramCollector(TorchDispatchMode):
    """Adds the inputs of every convolution or matrix product with a tracked weight to the layer's Gram matrix."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Compiled code does not run under a mode anyway; marking this would import the compiler, which takes seconds.
        return False

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.grams: dict[str, Tensor] = {}
        self.unsupported: dict[str, str] = {}
        self.seconds = 0.0
        self.collecting = False
        # By storage: every view of a weight shares it, and several parameters may be slices of one.
        self._tracked: dict[int, list[_Tracked]] = defaultdict(list)
        self._casts: dict[str, _Tracked] = {}
        for layer in layers:
            self._track(_Tracked(layer, layer.weight(model).detach()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        uses = [(tracked, tensor) for tensor in tensors for tracked in self._overlapping(tensor)]
        if uses:
            # Composite functions arrive whole in inference mode.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)  # before collecting, so that a call which does not fit fails as ever
        if uses and not func.is_view:
            start = time.perf_counter()
            self.collecting = True
            for tracked, tensor in uses:
                if len(uses) == 1 and func.overloadpacket is _aten._to_copy and tracked.is_whole(tensor):
                    self._follow_cast(tracked, result)
                elif len(uses) > 1 or not self._collect(tracked, tensor, func.overloadpacket, args):
                    self.unsupported.setdefault(tracked.layer.name, f"its weight is used by {func.overloadpacket}")
                    self.grams.pop(tracked.layer.name, None)
            self.collecting = False
            self.seconds += time.perf_counter() - start
        return result

    def _track(self, tracked: _Tracked) -> None:
        self._tracked[tracked.weight.untyped_storage().data_ptr()].append(tracked)

    def _follow_cast(self, tracked: _Tracked, cast: Tensor) -> None:
        """Take a layer's weight in another dtype, as autocast makes it, for the weight itself, until the next cast."""
        before = self._casts.pop(tracked.layer.name, None)
        if before is not None:
            self._tracked[before.weight.untyped_storage().data_ptr()].remove(before)
        self._casts[tracked.layer.name] = _Tracked(tracked.layer, cast)
        self._track(self._casts[tracked.layer.name])

    def _overlapping(self, tensor: Tensor) -> list[_Tracked]:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
            return []
        candidates = self._tracked.get(tensor.untyped_storage().data_ptr())
        if not candidates:
            return []
        start, stop = _extent(tensor)
        return [tracked for tracked in candidates if tracked.extent[0] < stop and start < tracked.extent[1]]

    def _collect(self, tracked: _Tracked, tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
        """Add the inputs of one call; False if it cannot be seen as a product of the whole weight with its inputs."""
        layer, weight = tracked.layer, tracked.weight
        if layer.name in self.unsupported or tensor.dtype != weight.dtype or tensor.data_ptr() != weight.data_ptr():
            return False
        if function is _aten.convolution:
            call = _convolution_inputs(layer, weight, tensor, args)
            if call is not None and call[0].numel() > 0:
                gram = self._gram(tracked, call[0])
                ops.gram_conv2d_(gram[None], _summable(call[0], gram), layer.kernel, *call[1:])
            return call is not None
        if function in _PRODUCTS:
            inputs = _product_inputs(layer, weight, tensor, *(args[i] for i in _PRODUCTS[function]))
            if inputs is not None and inputs.numel() > 0:
                gram = self._gram(tracked, inputs)
                ops.gram_linear_(gram, _summable(inputs[None], gram))
            return inputs is not None
        return False

    def _gram(self, tracked: _Tracked, x: Tensor) -> Tensor:
        layer = tracked.layer
        if layer.name not in self.grams:
            shape = (layer.groups, layer.columns, layer.columns)
            with torch.inference_mode(False):  # else nothing could change it when the model's own inference mode ends
                self.grams[layer.name] = torch.zeros(shape, dtype=_gram_dtype(tracked.weight), device=x.device)
        return self.grams[layer.name]


def _summable(inputs: Tensor, gram: Tensor) -> Tensor:
    return inputs if inputs.dtype == torch.bfloat16 and gram.dtype == torch.float32 else inputs.to(gram.dtype)


class _Tracked:
    """A layer with its weight and the bytes of the storage between which the weight lies."""

    def __init__(self, layer: Layer, weight: Tensor) -> None:
        self.layer, self.weight, self.extent = layer, weight, _extent(weight)

    def is_whole(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self.weight.data_ptr() and _same_view(tensor, self.weight)


def _extent(tensor: Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset())
    stop = start + 1 + sum((int(size) - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.itemsize, stop * tensor.itemsize


def _convolution_inputs(layer: Layer, weight: Tensor, kernel: Tensor, args: Sequence[Any]) -> _ConvolutionCall | None:
    """Input ``[n, C, H, W]``, stride, padding and dilation of a convolution, if its kernel is the whole weight."""
    x, given_kernel, _, stride, padding, dilation, transposed, _, groups = args
    if given_kernel is not kernel or transposed or groups != layer.groups or not _same_view(kernel, weight):
        return None
    if kernel.dim() == 3:
        x, kernel = x.unsqueeze(2), kernel.unsqueeze(2)
        stride, padding, dilation = (1, stride[-1]), (0, padding[-1]), (1, dilation[-1])
    if tuple(kernel.shape) != layer.conv_shape:
        return None
    # A list of one number stands for both dimensions.
    return x, (stride[0], stride[-1]), (padding[0], padding[-1]), (dilation[0], dilation[-1])


def _product_inputs(layer: Layer, weight: Tensor, factor: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """Inputs ``[N, columns]`` of a matrix product, if `factor` is the whole weight, the right way round."""
    if layer.groups != 1 or layer.taps != 1:
        return None
    weight_on_left = factor is left
    if right.dim() == 1:
        right = right[:, None]
    matrix = weight.mT if layer.transposed else weight.reshape(layer.rows, layer.columns)
    if weight_on_left:
        left, right = right.mT, left.mT
    if left.dim() == 3:
        if right.shape[0] > 1 and right.stride(0) != 0:
            return None
        left, right = left.flatten(0, 1), right[0]
    return left if _same_view(right, matrix.mT) and right.shape == matrix.mT.shape else None


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that begin at the same address hold the same elements in the same order."""

    def geometry(tensor: Tensor) -> list[tuple[int, int]]:
        return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]

    return geometry(a) == geometry(b)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _checked(batch: Batch, index: int, device: torch.device) -> Batch:
    """Return a batch on the model's device, or raise an error that names it."""
    if isinstance(batch, Tensor):
        return _checked_tensor(batch, index, device)
    if isinstance(batch, Mapping):
        moved: Batch = {key: _checked_tensor(value, index, device) for key, value in batch.items()}
    elif isinstance(batch, (list, tuple)):
        moved = [_checked_tensor(value, index, device) for value in batch]
    else:
        given = type(batch).__name__
        raise TypeError(f"batch {index} must be a tensor or a list, tuple or mapping of tensors, got {given}")
    if not any(isinstance(value, Tensor) for value in _values(moved)):
        raise TypeError(f"batch {index} holds no tensor")
    return moved


def _checked_tensor(value: Any, index: int, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        raise ValueError(f"batch {index} has a tensor without dimensions; the first dimension must count images")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"batch {index} has NaN or infinite values")
    return value.to(device)


def _channels_last(batch: Batch) -> Batch:
    """The images of a batch in channels-last memory, in which convolutions in bfloat16 are fast on a CPU."""

    def convert(value: Any) -> Any:
        is_image = isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if is_image else value

    if isinstance(batch, Tensor):
        return convert(batch)
    if isinstance(batch, Mapping):
        return {key: convert(value) for key, value in batch.items()}
    return [convert(value) for value in batch]


def _values(batch: Batch) -> Iterable[Any]:
    return [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch


def _images(batch: Batch) -> int:
    return next(int(value.shape[0]) for value in _values(batch) if isinstance(value, Tensor))


def _run(model: nn.Module, batch: Batch, index: int, collector: _GramCollector) -> None:
    try:
        with stage("forward"), collector:
            if isinstance(batch, Tensor):
                model(batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if collector.collecting or isinstance(error, torch.OutOfMemoryError):
            raise
        tensors = [value for value in _values(batch) if isinstance(value, Tensor)]
        given = ", ".join(f"{value.dtype} {list(value.shape)}" for value in tensors)
        expected = next(model.parameters()).dtype
        wrong_type = any(value.is_floating_point() and value.dtype != expected for value in tensors)
        kind = TypeError if wrong_type or isinstance(error, TypeError) else ValueError
        raise kind(f"the model, of {expected} parameters, cannot run batch {index} ({given}): {error}") from error


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or fused paths, after which modes and buffers are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    copies = [[None if b is None else b.clone() for b in of_module.values()] for _, of_module in buffers]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in modes:
                module.training = mode
            for (module, originals), of_module in zip(buffers, copies, strict=True):
                module._buffers.clear()
                module._buffers.update(originals)
                for original, copy in zip(originals.values(), of_module, strict=True):
                    if original is not None and copy is not None and not torch.equal(original, copy):
                        original.copy_(copy)
