"""Automatic sparsity: the layers of a trace get equal relative errors, the largest at which the trace keeps a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from spade_fast._util.checks import is_number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.pruning.goals import Goal
from spade_fast.pruning.ladders import Ladder, level_within, pruned_at, sparsity_at
from spade_fast.pruning.pruned_layer import PrunedLayer

# Error limits that are tried: relative output errors of a layer. A layer at .7 has lost half of its output's energy.
LIMITS = tuple(np.geomspace(0.01, 0.7, 40).tolist())
_BEYOND = 2  # limits above the first that fails which are tried too, since scores need not fall steadily


class CurvePoint(NamedTuple):
    """One trace that the search tried.

    Attributes
    ----------
    error
        Its limit: the largest relative output error allowed in a layer.
    score
        Its score on the sample.
    sparsity
        Its share of zeros among the weights of the layers that can be pruned.
    """

    error: float
    score: float
    sparsity: float


@dataclass(frozen=True)
class AutoSparsity:
    """How the sparsities of one trace were found.

    Attributes
    ----------
    keep
        Share of the dense network's score that was to be kept.
    error
        The limit found: the largest relative output error ``‖ΔW X‖ / ‖W X‖`` allowed in a layer. Each layer has the
        largest of the tried sparsities whose error does not exceed it.
    dense, score
        Scores of the dense network and of the trace on the sample: the probability of the target, unless another score
        was given.
    kept
        Whether the trace keeps that share, also on noisy copies of the sample where they count. If no limit does, the
        trace is the mildest one.
    curve
        The traces that were tried, as tuples ``(error, score, sparsity)`` in the order of their limits; the sparsity is
        that of all layers that can be pruned.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace
    >>> model, sample = torch.nn.Linear(64, 4), torch.randn(1, 64)
    >>> sample_trace = trace(model, sample + 0.1 * torch.randn(64, 64), inputs=sample, keep=0.5)
    >>> found = sample_trace.auto
    >>> found.score >= 0.5 * found.dense
    True
    """

    keep: float
    error: float
    dense: float
    score: float
    kept: bool
    curve: tuple[CurvePoint, ...]

    @property
    def share(self) -> float:
        """The share of the dense network's score that the trace keeps; above 1 where the score rises."""
        return self.score / self.dense

    def entries(self) -> dict[str, Any]:
        """Return the fields in a form that JSON can represent."""
        return {**asdict(self), "curve": [list(point) for point in self.curve]}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> AutoSparsity:
        """Make it of what :meth:`entries` returns; ValueError if the entries are not those."""
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, Mapping) or sorted(entries) != sorted(names):
            raise InvalidValueError(f"an automatic sparsity has the entries {', '.join(names)}")
        if not isinstance(entries["curve"], list) or not all(_is_point(one) for one in entries["curve"]):
            raise InvalidValueError("the curve of an automatic sparsity must be lists of three numbers")
        numbers = [entries[name] for name in ("keep", "error", "dense", "score")]
        if not all(map(_is_finite, numbers)) or entries["dense"] <= 0 or not isinstance(entries["kept"], bool):
            raise InvalidValueError("an automatic sparsity has a value of the wrong type or range")
        return cls(**{**entries, "curve": tuple(CurvePoint(*one) for one in entries["curve"])})

    def __str__(self) -> str:
        found = f"error limit {self.error:.3f} keeps {self.share:.1%} of the dense score"
        if self.kept:
            return found
        asked = f"less than the {100 * self.keep:g}% asked for"
        return f"{found}, {asked}" if self.share < self.keep else f"{found}, but {asked} on noisy copies of the sample"


class Found(NamedTuple):
    """The result of a search: what was found, and the level of each layer's ladder."""

    auto: AutoSparsity
    levels: dict[str, int]


class Search:
    """Searches one sample's ladders for the largest error limit that keeps a share of the dense network's scores.

    Parameters
    ----------
    ladders
        By layer name.
    goal
        Returns the scores of the network with its current weights, all of which are to be kept.
    applied
        Returns a context manager that applies pruned layers to the network.

    Attributes
    ----------
    dense : tuple of float
        The scores of the dense network.
    """

    def __init__(
        self,
        ladders: Mapping[str, Ladder],
        goal: Goal,
        applied: Callable[[Sequence[PrunedLayer]], AbstractContextManager[object]],
    ) -> None:
        self._ladders, self._goal, self._applied = ladders, goal, applied
        self._limits = _pruning_limits(ladders)
        self._scores: dict[tuple[int, ...], tuple[float, ...] | InvalidValueError] = {}
        self._curve: dict[int, CurvePoint] = {}  # by index of the limit
        self.dense = goal()

    def run(self, keeps: Sequence[float]) -> list[Found]:
        """Return what was found for each share to keep."""
        chosen = [self._largest(keep) for keep in keeps]
        curve = tuple(self._curve[index] for index in sorted(self._curve))
        found = []
        for keep, index in zip(keeps, chosen, strict=True):
            limit, scores = self._limits[index], self._scored(index)
            if isinstance(scores, InvalidValueError):
                raise scores
            auto = AutoSparsity(keep, limit, self.dense[0], scores[0], self._holds(index, keep), curve)
            found.append(Found(auto, self._levels(limit)))
        return found

    def _largest(self, keep: float) -> int:
        """Return the index of the largest limit that holds; that of the smallest one if none does."""
        held, failed = -1, len(self._limits)
        while True:
            while failed - held > 1:
                middle = (held + failed) // 2
                held, failed = (middle, failed) if self._holds(middle, keep) else (held, middle)
            above = range(failed + 1, min(failed + 1 + _BEYOND, len(self._limits)))
            again = [index for index in above if self._holds(index, keep)]
            if not again:
                return max(held, 0)
            held, failed = again[-1], len(self._limits)

    def _levels(self, limit: float) -> dict[str, int]:
        return {name: level_within(ladder, limit) for name, ladder in self._ladders.items()}

    def _scored(self, index: int) -> tuple[float, ...] | InvalidValueError:
        """Return the scores at a limit, or why it has none; limits that give the same levels are scored once."""
        levels = self._levels(self._limits[index])
        key = tuple(levels.values())
        if key not in self._scores:
            with self._applied(pruned_at(self._ladders, levels)):
                try:
                    self._scores[key] = self._goal()
                except InvalidValueError as error:  # the trace's output is not finite, although the dense one is
                    self._scores[key] = InvalidValueError(f"in the mildest trace: {error}")
                except InvalidTypeError as error:
                    raise InvalidTypeError(
                        f"in the trace with error limit {self._limits[index]:.3g}: {error}"
                    ) from error
        scores = self._scores[key]
        if not isinstance(scores, InvalidValueError):
            self._curve[index] = CurvePoint(self._limits[index], scores[0], sparsity_at(self._ladders, levels))
        return scores

    def _holds(self, index: int, keep: float) -> bool:
        scores = self._scored(index)
        if isinstance(scores, InvalidValueError):
            return False
        return all(score >= keep * dense for score, dense in zip(scores, self.dense, strict=True))


def _pruning_limits(ladders: Mapping[str, Ladder]) -> list[float]:
    """Return the limits at which something is pruned; if there are none, the smallest error of all levels."""
    least = min(level.report.measured_error for ladder in ladders.values() for level in ladder[1:])
    return [limit for limit in LIMITS if limit >= least] or [least]


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == len(CurvePoint._fields) and all(map(_is_finite, value))
