"""Runs the dense network over a calibration set and collects the Gram matrices of layer inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast import ops
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast._util.ranges import stage
from spade_fast.pruning.gram_collector import GramCollector, gram_dtype
from spade_fast.pruning.layers import Layer

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Batches = Tensor | Iterable[Batch]


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
        Layers whose weight was used by an operation other than a convolution or matrix product of the whole weight
        (and perhaps by those too), with the reason. They have no Gram matrix.
    seconds
        Time by stage: ``augment`` (waiting for batches), ``forward``, ``gram``; on a GPU, whose work is
        queued, as the host sees it.
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
        Layers of the model (:func:`spade_fast.pruning.layers.find_layers`).
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
    # Casts kept from a calibration before, in the same autocast block, would not be seen to be those of the weights.
    torch.clear_autocast_cache()
    collector = GramCollector(model, layers)
    device = next(model.parameters()).device
    augmenting = forward = 0.0
    images = 0
    with undisturbed(model):
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
        raise InvalidValueError("batches is empty: there is no image to calibrate on")
    with stage("gram"):
        for name, gram in collector.grams.items():
            # A value that is not finite reaches the diagonal, and finite diagonals bound all other entries.
            if not bool(torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all()):
                raise InvalidValueError(f"layer {name!r} got NaN, infinite or too large inputs during calibration")
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
            raise InvalidValueError(
                "batches must be images [n, C, H, W] or an iterable of batches, got a single number"
            )
        # Only for images is the first dimension known to be one of independent items.
        return batches.split(images_per_batch(batches.device)) if batches.dim() == 4 else [batches]
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise InvalidTypeError(f"batches must be a tensor or an iterable of batches, got {type(batches).__name__}")
    return batches


def images_per_batch(device: torch.device) -> int:
    """Return how many images to run at once where nothing is said.

    On a CPU few: the caches then hold what lies between two layers, and its memory is used again instead of returned.
    """
    return 8 if device.type == "cpu" else 64


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
    return layer.groups * layer.columns**2 * gram_dtype(layer.weight(model)).itemsize


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
        raise InvalidTypeError(f"batch {index} must be a tensor or a list, tuple or mapping of tensors, got {given}")
    if not any(isinstance(value, Tensor) for value in _values(moved)):
        raise InvalidTypeError(f"batch {index} holds no tensor")
    return moved


def _checked_tensor(value: Any, index: int, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        raise InvalidValueError(f"batch {index} has a tensor without dimensions; the first dimension must count images")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InvalidValueError(f"batch {index} has NaN or infinite values")
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
        if collector.collecting or isinstance(error, torch.OutOfMemoryError):
            raise
        tensors = [value for value in _values(batch) if isinstance(value, Tensor)]
        given = ", ".join(f"{value.dtype} {list(value.shape)}" for value in tensors)
        expected = next(model.parameters()).dtype
        wrong_type = any(value.is_floating_point() and value.dtype != expected for value in tensors)
        kind = InvalidTypeError if wrong_type or isinstance(error, TypeError) else InvalidValueError
        raise kind(f"the model, of {expected} parameters, cannot run batch {index} ({given}): {error}") from error
