"""Goals of automatic sparsity: the scores of a network's output for one sample that its trace is to keep."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from spade_fast._util.checks import is_number
from spade_fast._util.errors import AssumptionWarning, InvalidTypeError, InvalidValueError, UserError
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.pruning.calibration import device_of
from spade_fast.pruning.decision import probabilities, repeatable

# Function of a network's output that returns a number.
Score = Callable[[Any], Any]
# Called without arguments: the scores of the network with its current weights. The first is the one to report.
Goal = Callable[[], tuple[float, ...]]

NOISY_COPIES = 4
LEAST_WITH_NOISE = 0.05  # of the dense network's score on the sample itself


def sample_goal(name: str, score: Callable[[Any], float], sample: Any, copies: Sequence[Any] = ()) -> Goal:
    """Return the goal of keeping a score on a sample, and the mean score on noisy copies of it.

    If the noise leaves the dense network less than 5 % of its score, the copies do not count.

    Parameters
    ----------
    name
        Of the sample, for messages.
    score
        Called with the sample, or a copy of it: the score of the network with its current weights.

    Raises
    ------
    ValueError
        The dense network's score is not above 0.

    Warns
    -----
    AssumptionWarning
        The copies do not count.
    """

    def on_copies() -> float:
        return math.fsum(map(score, copies)) / len(copies)

    with naming(name):
        dense = score(sample)
        if dense <= 0:
            raise InvalidValueError(
                f"the dense network's score is {dense:g}, of which no share can be kept: choose another target or "
                "score, or give a sparsity"
            )
    if not copies:
        return lambda: (score(sample),)
    noisy = on_copies()
    if noisy < LEAST_WITH_NOISE * dense:
        warnings.warn(
            f"sample {name!r}: with the noise, the dense network's score falls from {dense:.3g} to {noisy:.3g}: its "
            "trace keeps the score without noise only",
            AssumptionWarning,
            stacklevel=3,
        )
        return lambda: (score(sample),)
    return lambda: (score(sample), on_copies())


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the sample in TypeErrors and ValueErrors of a ``with`` block that a user can cause."""
    try:
        yield
    except (InvalidTypeError, InvalidValueError) as error:
        raise type(error)(f"sample {name!r}: {error}") from error


def output_score(
    model: nn.Module, inputs: Any, target: int | None = None, score: Score | None = None
) -> Callable[[Any], float]:
    """Return the function of inputs that scores a model: the probability of a class, or a score of its output.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, as whenever the function is called. Random numbers that it draws are the same in each call.
    inputs
        A sample as the model takes it: a tensor, a sequence of positional or a mapping of keyword arguments.
    target
        Index of the class; None for the class that the model now predicts for the sample.
    score
        Function of the model's output that returns a number, instead of the probability of a class.

    Raises
    ------
    TypeError, ValueError
        As `spade_fast.trace` does for `inputs`, `target` and `score`.
    """
    if score is not None and target is not None:
        raise InvalidValueError("give a target or a score to keep, not both")
    if score is not None and not callable(score):
        raise InvalidTypeError(f"score must be a function of the model's output, got {score!r}")
    output = checked_output(model, inputs)
    if score is not None:
        return lambda sample: checked_score(score(_output(model, sample)))
    try:
        dense = probabilities(output)
    except InvalidValueError as error:
        raise InvalidValueError(f"{error}; or give the score to keep, a function of the model's output") from error
    chosen = int(dense.argmax()) if target is None else _checked_class(target, len(dense))
    return lambda sample: float(probabilities(_output(model, sample))[chosen])


def checked_output(model: nn.Module, inputs: Any) -> Any:
    """Return a model's output for a sample; TypeError or ValueError if it is no sample, or the model cannot run it."""
    with checked_run(split_inputs(inputs, model)):
        return _output(model, inputs)


@contextmanager
def checked_run(inputs: Any) -> Iterator[None]:
    """Turn the errors of a model that cannot run a sample, during a ``with`` block, into ValueErrors that show it."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        tensors = [one for one in tree_leaves(inputs) if isinstance(one, Tensor)]
        given = ", ".join(f"{one.dtype} {list(one.shape)}" for one in tensors)
        raise InvalidValueError(f"the model cannot run inputs ({given}): {error}") from error


def _output(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = split_inputs(inputs, model)
    with torch.no_grad():
        return repeatable(model, *args, **kwargs)


def split_inputs(inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that stand for a sample, on the model's device."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, (list, tuple)) and any(isinstance(one, Tensor) for one in inputs):
        args = tuple(inputs)
    else:
        raise InvalidTypeError(
            "inputs must be the sample as the model takes it: a tensor, a list of its arguments or a mapping of its "
            f"keyword arguments, got {type(inputs).__name__}"
        )
    device = device_of(model)
    moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(
        lambda one: one.to(device) if isinstance(one, Tensor) else one, (args, kwargs)
    )
    return moved


def _checked_class(target: Any, classes: int) -> int:
    """Return the index of a class; TypeError or ValueError unless it is one of them."""
    try:
        index = operator.index(target)  # also of integers of numpy, and of tensors of one
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"target must be the index of a class, got {target!r}") from error
    if isinstance(target, bool) or getattr(target, "dtype", None) == torch.bool:
        raise InvalidTypeError(f"target must be the index of a class, got {target!r}")
    if not 0 <= index < classes:
        raise InvalidValueError(f"target must be a class from 0 to {classes - 1}, got {index}")
    return index


def checked_score(value: Any) -> float:
    """Return a score as a number; TypeError or ValueError unless it is a finite one."""
    number = value.item() if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1 else value
    if not is_number(number):
        given = f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InvalidTypeError(f"score must return a number, got {given}")
    if not math.isfinite(number):
        raise InvalidValueError(f"score must return a finite number, got {number}")
    return float(number)
