"""Targets of the samples of a metric that are functions or names, and what automatic sparsity would keep of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError
from spade_fast.targets.answers import reading
from spade_fast.targets.class_names import class_names_of
from spade_fast.targets.classification import as_target
from spade_fast.targets.target import Target, checked_numbers


def targets_of_each(targets: Any, samples: int, model: nn.Module | None = None) -> list[Target]:
    """Return the target of each sample if one of them is a function or name; otherwise an empty list.

    Raises
    ------
    TypeError, ValueError
        One of them is not a target, or there is not one for each sample.
    """
    names = class_names_of(model)
    if _is_question(targets):
        return [as_target(targets, names)] * samples
    if isinstance(targets, Tensor) or not isinstance(targets, Sequence) or not any(map(_is_question, targets)):
        return []
    given = [as_target(one, names) for one in targets]
    if len(given) != samples:
        raise InvalidValueError(f"targets must be one for all samples or one for each of {samples}, got {len(given)}")
    return given


def kept_by_network(model: nn.Module, inputs: Tensor, targets: Sequence[Target]) -> Tensor:
    """Return what is kept of the target of each of a network's inputs, as float64 ``[N]``."""
    with ExitStack() as stack:
        readers = {target: stack.enter_context(reading(model, target)) for target in dict.fromkeys(targets)}
        output = model(inputs)
        return kept_of_each(targets, lambda target: readers[target](output))


def kept_of_each(targets: Sequence[Target], read: Callable[[Target], Any]) -> Tensor:
    """Return what is kept of the target of each sample, as float64 ``[S]``.

    Parameters
    ----------
    read
        Returns what a target reads of all samples.
    """
    kept = {
        target: checked_numbers(target, target.kept(read(target)), len(targets)).double()
        for target in dict.fromkeys(targets)
    }
    return torch.stack([kept[target][row] for row, target in enumerate(targets)])


def _is_question(target: Any) -> bool:
    return callable(target) or isinstance(target, str)
