"""Targets that are classes: scores, probabilities and differences of scores, and what is taken as a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.targets.network_outputs import (
    checked_logits,
    class_log_probabilities,
    class_probabilities,
    of_class,
)
from spade_fast.targets.target import Read, Target, class_number, function_target


def class_score(index: int) -> Target:
    """Ask for the score (logit) of a class, as the integer `index` as a target does.

    Automatic sparsity keeps the class's probability; with a single logit, the logit.

    Parameters
    ----------
    index : int
        A class of a network that returns logits ``[S, classes]``: as a tensor, as the entry or attribute ``logits`` or
        ``out`` of its output, or as the first tensor of a tuple.

    Raises
    ------
    TypeError, ValueError
        `index` is not an integer of at least 0. When the target is read: the output has no logits ``[S, classes]``, or
        no such class.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import class_score
    >>> class_score(2)(torch.tensor([[0.0, 1.0, 3.0]]))
    tensor([3.])
    """
    name = f"class {integer('index', index, 0)}"

    def keep(output: Any) -> Tensor:
        logits = _logits(name, output)
        return of_class(name, class_probabilities(logits) if logits.shape[1] > 1 else logits, index)

    return Target(name, lambda output: of_class(name, _logits(name, output), index), keep, answers=_probabilities(name))


def log_probability(index: int) -> Target:
    """Ask for the logarithm of the probability of a class, which falls where other classes gain.

    Automatic sparsity keeps the probability.

    Parameters
    ----------
    index : int
        As in :func:`class_score`, of two or more classes. A network that ends in a softmax is recognised.

    Raises
    ------
    TypeError, ValueError
        As in :func:`class_score`.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import log_probability
    >>> log_probability(0)(torch.zeros(1, 4)).exp()
    tensor([0.2500])
    """
    name = f"log-probability of class {integer('index', index, 0)}"

    def read(output: Any) -> Tensor:
        return of_class(name, class_log_probabilities(_logits(name, output, several=True)), index)

    return Target(name, read, lambda output: read(output).exp(), answers=_probabilities(name))


def class_against(index: int, other: int) -> Target:
    """Ask for the score of a class minus that of another: why the one rather than the other?

    Automatic sparsity keeps the probability of the class among these two, the sigmoid of the difference. The decision
    is between them.

    Parameters
    ----------
    index, other : int
        Two classes, as in :func:`class_score`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`class_score`; or both are the same class.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import class_against
    >>> class_against(2, 1)(torch.tensor([[0.0, 1.0, 3.0]]))
    tensor([2.])
    """
    name = f"class {integer('index', index, 0)} against class {integer('other', other, 0)}"
    if index == other:
        raise InvalidValueError(f"index and other must be two classes, got {index} twice")

    def difference(values: Tensor) -> Tensor:
        return of_class(name, values, index) - of_class(name, values, other)

    def keep(output: Any) -> Tensor:
        return difference(class_log_probabilities(_logits(name, output, several=True))).sigmoid()

    def answers(output: Any) -> Tensor:
        kept, found = keep(output), torch.zeros_like(_logits(name, output), dtype=torch.float64)
        found[:, index], found[:, other] = kept, 1 - kept
        return found

    return Target(name, lambda output: difference(_logits(name, output, several=True)), keep, answers=answers)


def as_target(given: Any, names: Sequence[str] = ()) -> Target:
    """Return a class, by its index or name, or a function of the output as a `Target`.

    Parameters
    ----------
    names
        Names of the network's classes; empty if they are unknown.

    Raises
    ------
    TypeError, ValueError
        It is neither, or no class has this name.
    """
    return function_target(given) if callable(given) else class_score(_from_zero(class_number(given, names)))


def checked_target(given: Any, names: Sequence[str] = ()) -> Any:
    """Return a target as Captum takes it, or a function: names of classes and numbers of numpy become integers.

    Parameters
    ----------
    given
        A class, the place of a number in the output, or a function; a list, tensor or array of them, one per sample; or
        None.
    names
        As for :func:`as_target`.

    Raises
    ------
    TypeError, ValueError
        It, or an entry of a list, is nothing that can be a target; no class has this name.
    """
    if isinstance(given, list):
        return [_checked_one(one, names) for one in given]
    if isinstance(given, np.ndarray):
        given = torch.as_tensor(given)
    if isinstance(given, Tensor) and given.numel() != 1:
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise InvalidTypeError(f"target must be integers, the indices of classes, got {given.dtype}")
        return given.long()
    return None if given is None else _checked_one(given, names)


def _checked_one(given: Any, names: Sequence[str]) -> Any:
    if callable(given):
        return given
    return tuple(map(class_number, given)) if isinstance(given, tuple) else class_number(given, names)


def _from_zero(index: int) -> int:
    if index < 0:
        raise InvalidValueError(f"target must be a class of at least 0, got {index}")
    return index


def _probabilities(name: str) -> Read:
    return lambda output: class_probabilities(_logits(name, output, several=True))


def _logits(name: str, output: Any, several: bool = False) -> Tensor:
    """Return the logits ``[S, classes]`` in a network's output."""
    logits = checked_logits(name, output, 2, "[S, classes]")
    if several and logits.shape[1] == 1:
        raise InvalidValueError(
            f"{name}: the network returns a single logit: give spade_fast.inputs.two_classes(model)"
        )
    return logits
