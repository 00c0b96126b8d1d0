"""Exchanges the weights of a model during a ``with`` block, and keeps that and pruning apart."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util import signals
from spade_fast._util.errors import InvalidValueError, TraceAppliedError
from spade_fast._util.ranges import stage
from spade_fast.pruning.computed_weights import ComputedWeight, computed_weights
from spade_fast.pruning.module_kinds import named_parameters
from spade_fast.pruning.pruned_layer import PrunedLayer

# Ids of the parameters whose weights are exchanged at the moment, and of those that must stay dense.
_exchanged: set[int] = set()
_held: Counter[int] = Counter()
_lock = threading.Lock()
_SAME_WEIGHTS = "layers {!r} and {!r} of the trace stand for the same weights of the model"


class WeightsApplied(AbstractContextManager[nn.Module]):
    """The weights of a model, exchanged in place for pruned ones during one ``with`` block.

    They are restored bit for bit at the end, whatever happens. Signals wait for the end of either exchange. Weights
    that a module computes from other parameters are held at the pruned values; the parameters stay as they are.

    Parameters
    ----------
    model
        What the ``with`` statement returns.
    pruned
        The layers; those of one model have different parameters.
    check
        Called with the model before anything is changed.

    Raises
    ------
    ValueError
        The model has no such parameter, or one of another shape or dtype, or two layers stand for the same weights.
    TraceAppliedError
        Some of these weights are exchanged already, or the model is being pruned; or, at the end, they could not be
        restored in place, since the block changed the parameter's shape or dtype. (Also a RuntimeError.)
    """

    def __init__(
        self,
        model: nn.Module,
        pruned: Iterable[PrunedLayer],
        check: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        self._model, self._pruned, self._check = model, list(pruned), check
        self._entered = self._watched = False
        self._reserved: set[int] = set()
        self._originals: list[tuple[str, nn.Parameter, Tensor]] = []
        self._replaced: list[ComputedWeight] = []

    @signals.critical
    def __enter__(self) -> nn.Module:
        if self._entered:
            raise TraceAppliedError("this context serves one `with` statement; call `applied` for another")
        self._entered, self._watched = True, signals.watch()
        try:
            self._apply()
            while self._watched and signals.pending:
                signals.deliver()
            return self._model  # no signal is handled between the last check and the `with` block
        except BaseException:
            self._leave()
            raise

    @signals.critical
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _apply(self) -> None:
        weights: dict[str, nn.Parameter | ComputedWeight] = {
            **dict(named_parameters(self._model, remove_duplicate=False)),
            **dict(computed_weights(self._model)),
        }
        self._reserve(weights[layer.parameter] for layer in self._pruned if layer.parameter in weights)
        with stage("apply"), torch.no_grad():
            self._check(self._model)
            every = [(layer, _target(layer, weights)) for layer in self._pruned]
            targets = [(layer, weight) for layer, weight in every if isinstance(weight, nn.Parameter)]
            computed = [(layer, weight) for layer, weight in every if isinstance(weight, ComputedWeight)]
            _check_apart(targets)
            _check_distinct(computed)
            self._originals = [(layer.parameter, weight, weight.detach().clone()) for layer, weight in targets]
            for layer, weight in targets:
                weight.copy_(layer.dense())
            for layer, target in computed:
                target.hold(layer.dense().to(target.sources()[0].device))
                self._replaced.append(target)
            torch.clear_autocast_cache()  # it knows a weight by its identity, and would go on using the old values

    def _leave(self) -> None:
        try:
            self._restore()
        finally:
            with _lock:
                _exchanged.difference_update(self._reserved)
            if self._watched:
                signals.unwatch()
                while signals.pending:
                    signals.deliver()

    def _restore(self) -> None:
        failed: list[tuple[str, Exception]] = []
        with stage("apply"), torch.no_grad():
            while self._replaced:
                self._replaced.pop().release()
            for name, weight, original in reversed(self._originals):
                try:
                    weight.copy_(original)
                except Exception as error:
                    failed.append((name, error))
                    with suppress(Exception):
                        weight.data = original
            torch.clear_autocast_cache()
        self._originals = []
        if failed:
            name, cause = failed[0]
            raise TraceAppliedError(
                f"parameter {name!r} could not be restored in place, so its weights were put into new memory: {cause}"
            ) from cause

    def _reserve(self, weights: Iterable[nn.Parameter | ComputedWeight]) -> None:
        keys = {
            id(parameter)
            for weight in weights
            for parameter in (weight.sources() if isinstance(weight, ComputedWeight) else [weight])
        }
        with _lock:
            if keys & _exchanged:
                raise TraceAppliedError("a trace is already applied to this model; leave its `with` block first")
            if keys & _held.keys():
                raise TraceAppliedError("the model is being pruned: apply traces, or prune it automatically, later")
            _exchanged.update(keys)
            self._reserved = keys


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Keep traces from being applied to a model during a ``with`` block; several such blocks may run at once.

    Raises
    ------
    TraceAppliedError
        A trace is applied to the model.
    """
    keys = [id(weight) for weight in model.parameters()]
    with _lock:
        if _exchanged.intersection(keys):
            raise TraceAppliedError("a trace is applied to this model: prune it after the `with` block")
        _held.update(keys)
    try:
        yield
    finally:
        with _lock:
            _held.subtract(keys)
            for key in keys:
                if not _held[key]:
                    del _held[key]


def _target(layer: PrunedLayer, weights: Mapping[str, nn.Parameter | ComputedWeight]) -> nn.Parameter | ComputedWeight:
    target = weights.get(layer.parameter)
    weight = target.value() if isinstance(target, ComputedWeight) else target
    if target is None or weight is None:
        raise InvalidValueError(
            f"layer {layer.name!r} of the trace has parameter {layer.parameter!r}, which the model lacks"
        )
    if tuple(weight.shape) != layer.shape or weight.dtype != layer.dtype:
        raise InvalidValueError(
            f"parameter {layer.parameter!r} is {layer.dtype} {list(layer.shape)} in the trace, "
            f"{weight.dtype} {list(weight.shape)} in the model"
        )
    return target


def _check_distinct(computed: Sequence[tuple[PrunedLayer, ComputedWeight]]) -> None:
    """Raise ValueError if two layers stand for the same computed weight."""
    names: dict[tuple[int, str], str] = {}
    for layer, weight in computed:
        other = names.setdefault((id(weight.module), weight.name), layer.name)
        if other != layer.name:
            raise InvalidValueError(_SAME_WEIGHTS.format(other, layer.name))


def _check_apart(targets: Sequence[tuple[PrunedLayer, nn.Parameter]]) -> None:
    """Raise ValueError if two layers stand for the same weights, under one name or two, wholly or in part."""
    ordered = sorted(targets, key=lambda target: target[1].data_ptr())
    for place, (layer, weight) in enumerate(ordered):
        last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        end = weight.data_ptr() + (last + 1) * weight.element_size()
        for other, near in ordered[place + 1 :]:
            if near.data_ptr() >= end:
                break
            if weight.device == near.device and np.isin(_addresses(weight), _addresses(near)).any():
                raise InvalidValueError(_SAME_WEIGHTS.format(layer.name, other.name))


def _addresses(weight: Tensor) -> np.ndarray:
    offsets = np.zeros(weight.shape, np.int64)
    for axis, (size, stride) in enumerate(zip(weight.shape, weight.stride(), strict=True)):
        offsets += (np.arange(size) * stride).reshape(-1, *[1] * (weight.dim() - axis - 1))
    return weight.data_ptr() + offsets.ravel() * weight.element_size()
