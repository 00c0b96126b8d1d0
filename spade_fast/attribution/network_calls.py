"""Calibration batches as calls of the network that a Captum method runs: checked against the sample, and completed."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.pruning.calibration import Batch, Batches, split_batches


def network_calls(batches: Batches, inputs: Any, more: Any, *, of_all: bool) -> Batches:
    """Return batches with all positional arguments of the network, which can be iterated as often as those given.

    A batch has a tensor for each of the inputs, of their dtype and number of dimensions; or also values for all further
    arguments. Otherwise these are those of the sample, with the sample's rows repeated. A mapping is a whole call.

    Parameters
    ----------
    inputs : Tensor or tuple of Tensor
        The sample, or all samples.
    more
        The method's `additional_forward_args` for it.
    of_all : bool
        Whether the batches belong to all samples, which may have different further arguments.

    Raises
    ------
    TypeError, ValueError
        While it is iterated: a batch has another structure than the sample, or lacks arguments that differ by sample.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution.network_calls import network_calls
    >>> calls = network_calls([torch.rand(8, 3)], torch.rand(1, 3), (torch.rand(1, 5), "mean"), of_all=False)
    >>> [(tuple(values.shape), tuple(scale.shape), mode) for values, scale, mode in calls]
    [((8, 3), (8, 5), 'mean')]
    """
    calls = _Calls(batches, inputs, more, of_all)
    return iter(calls) if isinstance(batches, Iterator) else calls


class _Calls:
    def __init__(self, batches: Batches, inputs: Any, more: Any, of_all: bool) -> None:
        self.batches, self.of_all = batches, of_all
        self.inputs: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        self.more: tuple[Any, ...] = () if more is None else more if isinstance(more, tuple) else (more,)

    def __length_hint__(self) -> int:
        return operator.length_hint(split_batches(self.batches))

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(split_batches(self.batches)):
            yield self._call(batch, index)

    def _call(self, batch: Batch, index: int) -> Batch:
        if isinstance(batch, Mapping) or not isinstance(batch, (Tensor, list, tuple)):
            return batch
        values = [batch] if isinstance(batch, Tensor) else list(batch)
        if len(values) not in (len(self.inputs), len(self.inputs) + len(self.more)):
            raise InvalidTypeError(
                f"batch {index} has {len(values)} {'value' if len(values) == 1 else 'values'}, but the network is "
                f"called with {_counted(len(self.inputs), 'input')}"
                f"{f' and {len(self.more)} additional_forward_args' if self.more else ''}: a batch is a sequence with "
                "a tensor for each input; leave out labels"
            )
        for place, (value, own) in enumerate(zip(values, self.inputs, strict=False)):
            _check_like_sample(value, own, f"batch {index}" + (f", input {place}" if len(self.inputs) > 1 else ""))
        if len(values) == len(self.inputs):
            values += [self._repeated(one, values[0], index) for one in self.more]
        return values[0] if len(values) == 1 else values

    def _repeated(self, value: Any, like: Tensor, index: int) -> Any:
        """Return a further argument of the sample with as many rows as a batch, if it has those of the sample."""
        rows = len(self.inputs[0])
        if not isinstance(value, Tensor) or value.shape[:1] != (rows,) or rows == 0:
            return value
        if self.of_all and rows > 1:
            raise InvalidValueError(
                f"batch {index} lacks the additional_forward_args, which differ by sample: give batches of all "
                "arguments, or a function that returns the batches of each sample"
            )
        if len(like) % rows:
            raise InvalidValueError(
                f"batch {index} has {len(like)} rows, not a multiple of the sample's {rows}, so that the rows of "
                "additional_forward_args cannot be repeated: give batches of all arguments"
            )
        return value.repeat(len(like) // rows, *(1 for _ in value.shape[1:]))


def _check_like_sample(value: Any, own: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise InvalidTypeError(f"{name} must be a tensor like that of the sample, got {type(value).__name__}")
    if value.dtype != own.dtype:
        raise InvalidTypeError(f"{name} is {value.dtype}, but that of the sample is {own.dtype}")
    if value.dim() != own.dim():
        raise InvalidValueError(
            f"{name} has shape {list(value.shape)}, but that of the sample is {list(own.shape)}: a batch has the same "
            "dimensions, of which the first counts its rows"
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
