"""Runs the dense network over a calibration set: checks of the batches, autocast, timing, and the Gram matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from spade_fast import ops
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed, without_autocast, without_kept_casts
from spade_fast._util.nested import moved_to, tensors_in
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast._util.ranges import stage
from spade_fast.ops.memory import keep_freed_memory
from spade_fast.pruning.computed_weights import held_constant
from spade_fast.pruning.gram_collector import GramCollector, gram_dtype
from spade_fast.pruning.layers import Layer

if TYPE_CHECKING:
    from spade_fast.pruning.compiled_network import CompiledNetwork

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
Batches = Tensor | Iterable[Batch]


@dataclass
class Calibration:
    """The result of one run over a calibration set.

    Attributes
    ----------
    grams : dict of Tensor ``[G, C, C]``
        For each layer that the data reached, the sum of ``x xᵀ`` over the positions and images of its inputs x. It is
        symmetric, in float64 for float64 weights and otherwise float32, on the device of the layer's inputs. Layers
        that had the same inputs share a tensor, so only one of them can be solved at a time.
    images
        Number of images.
    layers : dict of Layer
        The layers with Gram matrices, by name. A bare parameter is here what it was used as.
    unreached
        Layers that the network did not use; bare parameters do not count as layers then.
    unsupported
        Layers whose weight was used (possibly among other uses) by an operation other than a convolution or matrix
        product with the whole weight, with the reason. They have no Gram matrix.
    used
        Names of the watched weights that the network used.
    seconds
        Seconds per stage: ``augment`` (waiting for batches), ``forward`` (also compiling the network) and ``gram``. GPU
        work is queued, so these are the times that the host measures.
    """

    grams: dict[str, Tensor]
    images: int
    layers: dict[str, Layer]
    unreached: list[str]
    unsupported: dict[str, str]
    used: list[str]
    seconds: dict[str, float]


def calibrate(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[Layer],
    *,
    watched: Mapping[str, Tensor] | None = None,
    memory_limit: int | None = None,
    precision: str = "float32",
    progress: Callable[[int], None] | None = None,
    compiled: CompiledNetwork | None = None,
) -> Calibration:
    """Run the dense model over a calibration set and collect the Gram matrices of its layers.

    The model runs without gradients in evaluation mode. Its modes, buffers and weights are restored afterwards, also
    after an exception.

    Parameters
    ----------
    model
        The dense model.
    batches
        Images ``[N, C, H, W]``, or an iterable of batches: tensors, sequences of positional arguments or mappings of
        keyword arguments of the model, which may hold tensors at any depth. They are moved to the model's device. The
        first dimension of the first tensor counts images; if that is in a list, the list does.
    layers
        Layers of the model (:func:`spade_fast.pruning.layers.find_layers`).
    watched : dict of Tensor
        By name, other weights of the model of which only the use is noted.
    precision : "float32" or "bf16"
        With ``"bf16"`` the model runs under autocast to bfloat16 on images in channels-last memory, unless it cannot
        run its first batch that way, and the products of its bfloat16 layer inputs are summed in float32. With
        ``"float32"`` the model runs in its own precision.
    memory_limit
        Largest size of the Gram matrices of a bare parameter, in bytes.
    progress
        Called after each batch with the number of images so far.
    compiled
        Prepared for the model. It runs the batches that have the shape of the first one, once it is verified on that.

    Raises
    ------
    TypeError
        `batches` or a batch has the wrong type, or a batch has the wrong dtype.
    ValueError
        `batches` is empty; a batch or the inputs of a layer are NaN or infinite; the model cannot run a batch, or
        cannot be compiled.
    """
    device = device_of(model)
    augmenting = forward = 0.0
    images = 0
    bf16 = precision == "bf16"
    channels_last = bf16
    computed = [one for layer in layers if (one := layer.computed(model)) is not None]
    with keep_freed_memory(), undisturbed(model), held_constant(computed), without_kept_casts():
        new_collector = partial(GramCollector, model, layers, watched or {}, memory_limit)
        collector = new_collector()
        mark = time.perf_counter()
        for index, given in enumerate(_awaited(split_batches(batches))):
            batch = _checked(given, index, device)
            as_given = batch
            channels_last = channels_last and any(_is_image(one) for one in tensors_in(batch))
            if channels_last:
                batch = _channels_last(batch)
            collector.layout_changed = channels_last
            images += _images(batch)
            ready = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16) if bf16 else without_autocast(device):
                if compiled is not None and compiled.fits(batch, collector):
                    with stage("forward"):
                        compiled.run(batch, collector)
                else:
                    try:
                        _run(model, batch, index, collector)
                    except (InvalidTypeError, InvalidValueError):
                        if index > 0 or not channels_last:
                            raise
                        channels_last, batch, collector = False, as_given, new_collector()
                        again = True
                    else:
                        again = False
                    if again:  # not while the error still holds the activations
                        _run(model, batch, index, collector)
                    if compiled is not None and index == 0:
                        compiled.verify(model, batch, collector, new_collector())
            done = time.perf_counter()
            augmenting, forward, mark = augmenting + ready - mark, forward + done - ready, done
            if progress is not None:
                progress(images)
    if images == 0:
        raise InvalidValueError("batches is empty: it must have at least one image to calibrate on")
    with stage("gram"):
        for name, gram in collector.grams.items():
            # Any non-finite input reaches the diagonal, and a finite diagonal bounds all other entries.
            if not bool(torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all()):
                raise InvalidValueError(f"layer {name!r} got NaN, infinite or overflowing inputs during calibration")
            ops.mirror_upper_(gram)
    collecting = collector.seconds + time.perf_counter() - mark
    grams = {layer.name: collector.grams[layer.name] for layer in layers if layer.name in collector.grams}
    found = {**grams, **collector.unsupported}
    unreached = [layer.name for layer in layers if layer.name not in found and not layer.bare]
    used_layers = {name: collector.layers[name] for name in grams}
    seconds = {"augment": augmenting, "forward": forward - collector.seconds, "gram": collecting}
    return Calibration(grams, images, used_layers, unreached, collector.unsupported, list(collector.used), seconds)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer, or the CPU if it has none."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def split_batches(batches: Batches) -> Iterable[Batch]:
    """Return the batches of a calibration set given as a tensor of images or as an iterable."""
    if isinstance(batches, Tensor):
        if batches.dim() == 0:
            raise InvalidValueError(
                "batches must be images [N, C, H, W] or an iterable of batches, got a single number"
            )
        # The first dimension is known to count independent items only for images.
        return batches.split(images_per_batch(batches.device)) if batches.dim() == 4 else [batches]
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise InvalidTypeError(f"batches must be a tensor or an iterable of batches, got {type(batches).__name__}")
    return batches


def images_per_batch(device: torch.device) -> int:
    """Return the default number of images per forward pass.

    It is small on a CPU, so that activations stay in the caches and their memory is reused instead of returned.
    """
    return 8 if device.type == "cpu" else 64


def draw_id(name: str, draw: int) -> str:
    """Return the id with which an augmenter makes another set of calibration images of a sample; draw 0 is its own."""
    return f"{name}/draw{draw}" if draw else name


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
    """Return the size of a layer's Gram matrices for one sample, in bytes."""
    return max(layer.groups, layer.parts) * layer.columns**2 * gram_dtype(layer.weight(model)).itemsize


def _checked(batch: Batch, index: int, device: torch.device) -> Batch:
    """Return the batch on the model's device, or raise an error that names it.

    Its first tensor must be finite; others may be masks that are added, with infinite values.
    """
    if isinstance(batch, PackedSequence):  # a tuple, but one argument
        batch = [batch]
    if not isinstance(batch, (Tensor, Mapping, list, tuple)):
        given = type(batch).__name__
        raise InvalidTypeError(f"batch {index} must be a tensor or a list, tuple or mapping of tensors, got {given}")
    if not isinstance(batch, Tensor):
        batch = dict(batch) if isinstance(batch, Mapping) else list(batch)
    tensors = tensors_in(batch)
    if not tensors:
        raise InvalidTypeError(f"batch {index} contains no tensor")
    first = tensors[0]
    if first.dim() == 0:
        raise InvalidValueError(f"batch {index} has a tensor without dimensions; the first dimension must count images")
    if first.is_floating_point() and not bool(torch.isfinite(first).all()):
        raise InvalidValueError(f"batch {index} has NaN or infinite values")
    return moved_to(device, batch)


def _channels_last(batch: Batch) -> Batch:
    def convert(value: Any) -> Any:
        return value.contiguous(memory_format=torch.channels_last) if _is_image(value) else value

    converted: Batch = tree_map(convert, batch)
    return converted


def _is_image(value: Any) -> bool:
    """Whether a value is images for which a CPU has fast convolutions."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return False
    return value.dim() == 4 and value.is_floating_point() and value.dtype != torch.float64


def _images(value: Any, *, outermost: bool = True) -> int:
    if isinstance(value, Tensor):
        return len(value)
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, list) and not outermost:
        return len(value)
    values = value.values() if isinstance(value, Mapping) else value
    return _images(next(one for one in values if tensors_in(one)), outermost=False)


def _run(model: nn.Module, batch: Batch, index: int, collector: GramCollector) -> None:
    try:
        with stage("forward"), collector:
            if isinstance(batch, Tensor):
                model(batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if collector.collecting or is_out_of_memory(error):
            raise
        tensors = tensors_in(batch)
        given = ", ".join(f"{value.dtype} {list(value.shape)}" for value in tensors)
        expected = next(model.parameters()).dtype
        wrong_type = any(value.is_floating_point() and value.dtype != expected for value in tensors)
        kind = InvalidTypeError if wrong_type or isinstance(error, TypeError) else InvalidValueError
        message = f"the model, with {expected} parameters, cannot run batch {index} ({given}): {error}"
        if isinstance(batch, Sequence) and isinstance(error, TypeError):
            message += ". The values of a batch are the model's positional arguments: leave out labels"
        raise kind(message) from error
