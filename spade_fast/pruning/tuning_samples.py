"""What a search for sparsities measures: scores of its samples, and the shares of the dense scores that they keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.pruning.exchange import WeightsApplied
from spade_fast.pruning.goals import Goal
from spade_fast.pruning.ladders import Ladder, pruned_at, sparsity_at
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.tuning_result import Trial

TraceScore = Callable[[nn.Module, int], float]


class Choice(NamedTuple):
    """What a search chose.

    Attributes
    ----------
    options
        `sparsity`, and with automatic sparsity also `keep`.
    score, kept
        The mean score, and the mean share that is kept of the dense scores; None if nothing is to be kept.
    history
        All that was tried.
    """

    options: dict[str, object]
    score: float
    kept: float | None
    history: tuple[Trial, ...]


class Samples:
    """The samples of a search, all measured on one model to which their weights are applied in turn.

    Parameters
    ----------
    ladders
        For each sample, by layer name.
    goals
        For each sample what is to be kept; None if nothing is.
    score
        What to maximise; None for the sparsity.
    """

    def __init__(
        self,
        model: nn.Module,
        ladders: Sequence[Mapping[str, Ladder]],
        goals: Sequence[Goal] | None,
        score: TraceScore | None,
    ) -> None:
        self.ladders, self.goals, self.has_score = ladders, goals, score is not None
        self._model, self._score = model, score
        self._dense = [] if goals is None else [goal()[0] for goal in goals]

    def __len__(self) -> int:
        return len(self.ladders)

    def applied(self, s: int, levels: Mapping[str, int]) -> WeightsApplied:
        """Return a context manager that applies layers of a sample at some levels to the model."""
        return self.with_weights(pruned_at(self.ladders[s], levels))

    def with_weights(self, pruned: Sequence[PrunedLayer]) -> WeightsApplied:
        """Return a context manager that applies pruned layers to the model."""
        return WeightsApplied(self._model, pruned)

    def kept(self, s: int) -> float:
        """Return the share of the dense model's score that the current weights keep, at most 1."""
        assert self.goals is not None
        return min(1.0, self.goals[s]()[0] / self._dense[s])

    def score(self, s: int) -> float:
        """Return the score with the current weights; TypeError or ValueError unless it is a finite number."""
        assert self._score is not None
        value = self._score(self._model, s)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTypeError(f"score must return a number, got {value!r} for sample {s}") from error
        if not math.isfinite(number):
            raise InvalidValueError(f"score must return a finite number, got {number} for sample {s}")
        return number

    def sparsity(self, levels: Sequence[Mapping[str, int]]) -> float:
        """Return the mean share of zeros in the samples' layers at some levels."""
        return mean([sparsity_at(*one) for one in zip(self.ladders, levels, strict=True) if one[0]])

    def dense_score(self) -> float:
        """Return the mean score of the dense model, whose weights must be the current ones."""
        if self.has_score:
            return mean([self.score(s) for s in range(len(self))])
        return self.sparsity([dict.fromkeys(ladders, 0) for ladders in self.ladders])


def mean(values: Sequence[float]) -> float:
    """Return the mean, exactly rounded."""
    return math.fsum(values) / len(values)
