"""Goals of automatic sparsity: the scores of a network's output for one sample that its trace is to keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import AssumptionWarning, InvalidTypeError, InvalidValueError, UserError
from spade_fast._util.nested import moved_to, tensors_in
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.pruning.calibration import device_of
from spade_fast.pruning.decision import probabilities, repeatable
from spade_fast.targets.answers import reading
from spade_fast.targets.class_names import class_names_of
from spade_fast.targets.classification import as_target, class_score
from spade_fast.targets.target import Target, checked_numbers

NOISY_COPIES = 4
LEAST_WITH_NOISE = 0.05  # of the dense network's score on the sample itself


@dataclass(frozen=True)
class Score:
    """What automatic sparsity keeps of a sample: a number of the network with its current weights.

    Attributes
    ----------
    target
        Its name.
    of
        Function of the sample, or a copy of it, that returns the number.
    """

    target: str
    of: Callable[[Any], float]

    def __call__(self, sample: Any) -> float:
        return self.of(sample)


@dataclass(frozen=True)
class Goal:
    """What a trace is to keep: scores of the network with its current weights.

    Attributes
    ----------
    target
        The name of what is scored.
    scores
        Called without arguments. The first of the scores is the one to report.
    """

    target: str
    scores: Callable[[], tuple[float, ...]]

    def __call__(self) -> tuple[float, ...]:
        return self.scores()


def sample_goal(name: str, score: Score, sample: Any, copies: Sequence[Any] = ()) -> Goal:
    """Return the goal of keeping a score on a sample, and the mean score on noisy copies of it.

    If the noise leaves the dense network less than 5 % of its score, the copies do not count.

    Parameters
    ----------
    name
        Of the sample, for messages.
    score
        Called with the sample, or a copy of it.

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
                f"the dense network's score is {dense:g} for target {score.target}, of which no share can be kept: "
                "choose another target, one that says what to keep (Target.keep), or give a sparsity"
            )
    if not copies:
        return Goal(score.target, lambda: (score(sample),))
    noisy = on_copies()
    if noisy < LEAST_WITH_NOISE * dense:
        warnings.warn(
            f"sample {name!r}: with the noise, the dense network's score falls from {dense:.3g} to {noisy:.3g}: its "
            "trace keeps the score without noise only",
            AssumptionWarning,
            stacklevel=3,
        )
        return Goal(score.target, lambda: (score(sample),))
    return Goal(score.target, lambda: (score(sample), on_copies()))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the sample in TypeErrors and ValueErrors of a ``with`` block that a user can cause."""
    try:
        yield
    except (InvalidTypeError, InvalidValueError) as error:
        raise type(error)(f"sample {name!r}: {error}") from error


def output_score(model: nn.Module, inputs: Any, target: Any = None) -> Score:
    """Return what automatic sparsity keeps of a model's output: the probability of a class, or a target's number.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, as whenever the score is called. Random numbers that it draws are the same in each call.
    inputs
        A sample as the model takes it: a tensor, a sequence of positional or a mapping of keyword arguments.
    target
        As in `spade_fast.trace`; None for the class that the model now predicts for the sample.

    Raises
    ------
    TypeError, ValueError
        As `spade_fast.trace` does for `inputs` and `target`.
    """
    output = checked_output(model, inputs)
    asked = _predicted_class(output) if target is None else as_target(target, class_names_of(model))

    def score(sample: Any) -> float:
        with reading(model, asked) as read:
            return kept_number(asked, read(_output(model, sample)))

    return Score(str(asked), score)


def _predicted_class(output: Any) -> Target:
    try:
        return class_score(int(probabilities(output).argmax()))
    except InvalidValueError as error:
        raise InvalidValueError(f"{error}; or give a target, a function of the model's output") from error


def kept_number(target: Target, output: Any) -> float:
    """Return what is kept of a target for one sample, from what the target reads."""
    with torch.no_grad():
        return float(checked_numbers(target, target.kept(output), 1))


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
        given = ", ".join(f"{one.dtype} {list(one.shape)}" for one in tensors_in(inputs))
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
    elif isinstance(inputs, (list, tuple)) and tensors_in(inputs):
        args = tuple(inputs)
    else:
        raise InvalidTypeError(
            "inputs must be the sample as the model takes it: a tensor, a list of its arguments or a mapping of its "
            f"keyword arguments, got {type(inputs).__name__}"
        )
    return moved_to(device_of(model), (args, kwargs))
