"""Goals of automatic sparsity: the scores of a network's output for one sample that its trace is to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from spade_fast._util.checks import is_number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.pruning.calibration import device_of
from spade_fast.pruning.decision import predict, probabilities, repeatable

Score = Callable[[Any], Any]
# Called without arguments: the scores of the network with its current weights. The first is the one to report.
Goal = Callable[[], tuple[float, ...]]


def output_goal(model: nn.Module, inputs: Any, target: int | None = None, score: Score | None = None) -> Goal:
    """Return the goal of keeping the probability of a class, or a score of the output, for a sample.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode without gradients, each time with the same random numbers.
    inputs
        The sample as the model takes it: a tensor, a sequence of positional or a mapping of keyword arguments.
    target
        Index of the class; None for the class that the model now predicts.
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
    args, kwargs = split_inputs(inputs, model)

    def scores() -> tuple[float, ...]:
        with undisturbed(model):
            if score is not None:
                return (checked_score(score(repeatable(model, *args, **kwargs))),)
            return (float(predict(model, *args, **kwargs)[target]),)

    with undisturbed(model):
        try:
            output = repeatable(model, *args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            given = ", ".join(
                f"{one.dtype} {list(one.shape)}" for one in tree_leaves(inputs) if isinstance(one, Tensor)
            )
            raise InvalidValueError(f"the model cannot run inputs ({given}): {error}") from error
    if score is None:
        try:
            dense = probabilities(output)
        except InvalidValueError as error:
            raise InvalidValueError(f"{error}; or give the score to keep, a function of the model's output") from error
        target = int(dense.argmax()) if target is None else checked_class(target, len(dense))
    return scores


def split_inputs(inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that stand for a sample, on the model's device."""
    device = device_of(model)
    inputs = tree_map(lambda one: one.to(device) if isinstance(one, Tensor) else one, inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (list, tuple)) and any(isinstance(one, Tensor) for one in inputs):
        return tuple(inputs), {}
    raise InvalidTypeError(
        "inputs must be the sample as the model takes it: a tensor, a list of its arguments or a mapping of its "
        f"keyword arguments, got {type(inputs).__name__}"
    )


def checked_class(target: Any, classes: int) -> int:
    """Return the index of a class; TypeError or ValueError unless it is one of them."""
    if isinstance(target, bool) or not isinstance(target, int):
        raise InvalidTypeError(f"target must be the index of a class, got {target!r}")
    if not 0 <= target < classes:
        raise InvalidValueError(f"target must be a class from 0 to {classes - 1}, got {target}")
    return target


def checked_score(value: Any) -> float:
    """Return a score as a number; TypeError or ValueError unless it is a finite one."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not is_number(number):
        given = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InvalidTypeError(f"score must return a number, got {given}")
    if not math.isfinite(number):
        raise InvalidValueError(f"score must return a finite number, got {number}")
    return float(number)


def check_dense_score(score: float, sample: str) -> None:
    """Raise ValueError if a dense network's score is not above 0, so that no share of it can be kept."""
    if score <= 0:
        raise InvalidValueError(
            f"sample {sample!r}: the dense network's score is {score:g}, of which no share can be kept: choose another "
            "target or score, or give a sparsity"
        )
