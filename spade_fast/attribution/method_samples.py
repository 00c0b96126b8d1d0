"""The samples in the inputs of a Captum method, each with its own arguments' rows, and their results put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.attribution.outputs import network_output

with extra_for("Spade needs"):
    from captum.attr import Attribution, DataLoaderAttribution, LLMAttribution, LLMGradientAttribution


def takes_tensors(method: Attribution) -> bool:
    """Whether a method takes tensors as inputs, not a data loader or a text."""
    return not isinstance(method, DataLoaderAttribution | LLMAttribution | LLMGradientAttribution)


def samples_of(method: Attribution, inputs: Any, arguments: Mapping[str, Any]) -> list[Any]:
    """Return the samples in a method's inputs, in the form of the inputs: one row of each tensor.

    A data loader or a text, for a method that takes one, is a single sample.

    The inputs are one sample as a whole if their tensors have different numbers of rows, or if the method's network
    cannot run a row alone or does not return an entry per row, but a loss of all rows, for example.

    Parameters
    ----------
    inputs : Tensor ``[S, ...]`` or tuple of Tensor
    arguments
        Of the method, by name.

    Raises
    ------
    TypeError, ValueError
        The inputs are not tensors, or have no rows, or no dimensions.
    """
    if not takes_tensors(method):
        return [inputs]
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    wrong = [type(one).__name__ for one in tensors if not isinstance(one, Tensor)]
    if wrong or not tensors:
        given = wrong[0] if wrong else "an empty tuple"
        raise InvalidTypeError(f"inputs must be a tensor or a tuple of tensors, got {given}")
    if any(one.dim() == 0 for one in tensors) or all(len(one) == 0 for one in tensors):
        shapes = ", ".join(str(list(one.shape)) for one in tensors)
        raise InvalidValueError(f"inputs must have shape [samples, ...] with at least one sample, got {shapes}")
    counts = {len(one) for one in tensors}
    if len(counts) > 1 or counts == {1} or not _has_result_per_row(method, inputs, arguments):
        return [inputs]
    return [_rows(inputs, slice(row, row + 1)) for row in range(counts.pop())]


def for_augmenter(sample: Any) -> Any:
    """Return a sample as an augmenter gets it: without gradients, and a single input as a tensor."""
    if isinstance(sample, tuple):
        return tuple(map(for_augmenter, sample)) if len(sample) > 1 else for_augmenter(sample[0])
    return sample.detach() if isinstance(sample, Tensor) else sample


def concatenate(results: list[Any]) -> Any:
    """Return the results of samples as one: tensors, or tuples or lists of them, one below the other."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results) if first.dim() else torch.stack(results)
    if isinstance(first, tuple | list):
        return type(first)(concatenate(list(parts)) for parts in zip(*results, strict=True))
    return first if len(results) == 1 else results


def _has_result_per_row(method: Attribution, inputs: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the network returns one entry for one row and two for two; also if its output does not tell."""
    count = len(inputs[0] if isinstance(inputs, tuple) else inputs)
    more = arguments.get("additional_forward_args")
    for rows in (1, 2):
        own = {"additional_forward_args": _rows(more, slice(rows), count)}
        try:
            output = network_output(method, _rows(inputs, slice(rows)), own)
        except Exception as error:  # of any kind, by the network's own code
            if is_out_of_memory(error):
                raise
            return rows == 2 or not _runs(method, inputs, arguments)
        if isinstance(output, int | float):
            return False
        if isinstance(output, Tensor) and output.shape[:1] != (rows,):
            return False
    return True


def _runs(method: Attribution, inputs: Any, arguments: Mapping[str, Any]) -> bool:
    try:
        network_output(method, inputs, arguments)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _rows(value: Any, rows: slice, count: int | None = None) -> Any:
    """Return some rows of a tensor or of each of a tuple of tensors; of those with `count` rows, if that is given."""
    if isinstance(value, tuple):
        return tuple(_rows(one, rows, count) for one in value)
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == (count or len(value))
    return value[rows] if has_rows else value
