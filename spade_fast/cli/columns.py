"""The columns of an explanation: the maps of the dense network and of each solver's traces, and means of them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spade_fast.attribution.drawing import Column
from spade_fast.attribution.maps import mean_map
from spade_fast.attribution.methods import METHODS
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.config import SOLVERS
from spade_fast.pruning.traces import Trace


@dataclass(frozen=True)
class ExplainedTrace:
    """A trace, what it predicts, and its maps.

    Attributes
    ----------
    name
        The solver, with level and draw where there are several: ``"exact-keep0.5-draw1"``.
    solver, keep, draw
        Of the trace; `keep` is None for a sparsity that is not automatic.
    scores
        Probabilities ``[classes]``.
    maps
        One per method ``[H, W]``.
    """

    name: str
    solver: str
    keep: float | None
    draw: int
    trace: Trace
    scores: Tensor
    maps: Sequence[Tensor]

    @property
    def removed(self) -> float:
        """Share of zeros among the weights of the layers that could be pruned."""
        layers = [layer for layer in self.trace.reports if not layer.note]
        sizes = [math.prod(layer.shape) for layer in layers]
        zeros = math.fsum(layer.reached * size for layer, size in zip(layers, sizes, strict=True))
        return zeros / sum(sizes) if sizes else 0.0

    @property
    def lost(self) -> bool:
        """Whether it predicts another class than the dense network."""
        return self.trace.decision is not None and not self.trace.decision.kept

    @property
    def kept_less(self) -> bool:
        """Whether it is the mildest trace tried and yet keeps less than was asked."""
        return self.trace.auto is not None and not self.trace.auto.kept


def make_columns(
    model: LoadedModel,
    target: int,
    scores: Tensor,
    maps: Sequence[Tensor],
    smooth: Sequence[Tensor] | None,
    traces: Sequence[ExplainedTrace],
) -> list[Column]:
    """Put maps side by side: the dense network's, and for each solver the means over its traces.

    Parameters
    ----------
    model
        The network, which names the classes.
    target
        The explained class.
    scores, maps
        Probabilities ``[classes]`` and maps of the dense network, one per method.
    smooth
        Its SmoothGrad maps, if the traces' are SmoothGrad maps too. They get a column of their own, and one more for
        each solver has the means of the solver's maps and these.
    traces
        All traces.
    """
    caption = _prediction(model, target, scores)
    columns = [Column("Dense network", caption, [one.numpy() for one in maps])]
    if smooth is not None:
        columns.append(Column("Dense network, SmoothGrad", caption, [one.numpy() for one in smooth]))
    for solver in dict.fromkeys(one.solver for one in traces):
        own, title = [one for one in traces if one.solver == solver], SOLVERS[solver]
        means = [mean_map(of_method) for of_method in zip(*(one.maps for one in own), strict=True)]
        heading = title if smooth is None else f"{title}, SmoothGrad"
        warnings = _warnings(own)
        columns.append(Column(heading, _captions(model, target, own), [one.numpy() for one in means], warnings))
        if smooth is not None:
            both = [mean_map(pair).numpy() for pair in zip(means, smooth, strict=True)]
            captions = [f"of the trace{'s' if len(own) > 1 else ''} and the dense network"]
            columns.append(Column(f"Mean of {title} and SmoothGrad", captions, both, warnings))
    return columns


def row_titles(methods: Sequence[str], smooth: bool) -> list[str]:
    """Return the titles of the rows; with SmoothGrad those that do without it are marked."""
    titles = {name: METHODS[name].title for name in methods}
    return [title if METHODS[name].smooth or not smooth else f"{title} (plain)" for name, title in titles.items()]


def _captions(model: LoadedModel, target: int, own: Sequence[ExplainedTrace]) -> list[str]:
    removed = [one.removed for one in own]
    if len(own) == 1:
        return [f"{removed[0]:.0%} removed", *_prediction(model, target, own[0].scores)]
    kept = [float(one.scores[target]) for one in own]
    name = _short(model.class_name(target))
    return [f"mean of {len(own)} traces, {_range(removed)} removed", f"{name} {_range(kept)}"]


def _warnings(own: Sequence[ExplainedTrace]) -> list[str]:
    counts = {
        "lost the decision": sum(one.lost for one in own),
        "kept less than asked": sum(one.kept_less for one in own),
    }
    of = "" if len(own) == 1 else f" of {len(own)} traces "
    return [f"{count}{of}{what}" if of else what for what, count in counts.items() if count]


def _prediction(model: LoadedModel, target: int, scores: Tensor) -> list[str]:
    best = int(scores.argmax())
    captions = [f"{_short(model.class_name(best))} {scores[best]:.1%}"]
    if best != target:
        captions.append(f"({_short(model.class_name(target))} {scores[target]:.1%})")
    return captions


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low} to {high}%"


def _short(name: str) -> str:
    return textwrap.shorten(name, 30, placeholder="…")
