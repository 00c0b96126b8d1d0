"""Searches for the sparsity of each layer, or of each stage of layers, that maximises a score of the traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from spade_fast._util.checks import integer, nearest
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast._util.progress import Progress
from spade_fast._util.signatures import with_fields_of
from spade_fast._util.versions import library_version
from spade_fast.pruning.calibration import Batches
from spade_fast.pruning.config import PruneConfig, PruneOptions, check_shares
from spade_fast.pruning.exchange import WeightsApplied
from spade_fast.pruning.ladders import solve_ladders
from spade_fast.pruning.layers import Layer, find_layers, match_names
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.session import Session
from spade_fast.pruning.tuning_result import Trial, Tuning

if TYPE_CHECKING:
    from typing_extensions import Unpack

CANDIDATES = (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)

Score = Callable[[nn.Module, int], float]
Stages = str | Mapping[str, str | Sequence[str]]


@with_fields_of(PruneConfig, but="sparsity")
def tune(
    model: nn.Module,
    samples: Sequence[Batches],
    score: Score,
    *,
    candidates: Iterable[float] = CANDIDATES,
    stages: Stages = "blocks",
    rounds: int = 1,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Tuning:
    """Search for the best sparsity of each stage of layers, starting with the last (SPADE, arXiv 2310.04519).

    All layers are dense at the start. Stage by stage, each candidate sparsity is applied to all layers of the stage,
    and the one with the highest mean score over the samples is kept; among equal scores the lowest sparsity. Each
    sample is scored on the model with that sample's pruned weights, those of
    ``trace(model, samples[i], sparsity=...)``.

    All solving is done before the search, because a layer's trace does not depend on the sparsities of other layers;
    trying a candidate then needs no solving. With exact OBS each layer and sample has one path
    (:func:`spade_fast.ops.obs_path`), from which the weights at all candidates follow in one call of
    :func:`spade_fast.ops.obs_solution`. SparseGPT, which has no path, needs one sweep per candidate; the sweeps share
    one factor per sample.

    Parameters
    ----------
    model : nn.Module
        The dense model. It is in evaluation mode throughout and is restored afterwards, also after an exception.
    samples : sequence
        The calibration data of each sample, as `batches` of :func:`spade_fast.trace`.
    score : callable
        Called as ``score(model, i)`` while the pruned weights of sample `i` are applied to the model, and once per
        sample on the dense model. It returns a finite number, where higher is better and equal calls give equal
        results: the probability of the sample's class, for example, or how well an attribution map finds the object. It
        may compute gradients.
    candidates : iterable of float
        Shares of weights to try, between 0 and 1. 0 is always among them.
    stages : "blocks", "layers" or mapping
        Which layers share a sparsity. ``"layers"``: each layer has its own. ``"blocks"``: a stage is an outermost
        module that is not a plain container (Sequential, ModuleList, ModuleDict) and does not contain all layers of the
        model, such as a residual block. A mapping assigns layer names or patterns to names of stages; a layer belongs
        to the first stage whose patterns it matches, and stays dense if there is none. The stage with the model's last
        layer is searched first.
    rounds : int
        Maximum number of passes over all stages. The search ends after a round in which the score did not rise.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` for the stages ``"calibrate"`` (batches), ``"solve"`` (layers) and
        ``"search"`` (scores).
    solver, layers, block, damping, precision, memory_limit, seed, strict
        Fields of :class:`PruneConfig`. Layers outside `layers` stay dense.

    Returns
    -------
    Tuning

    Raises
    ------
    TypeError, ValueError
        An argument is invalid, or a score is not a finite number.
    UserError
        All errors of :func:`spade_fast.trace_batch`.

    Warns
    -----
    FallbackWarning
        As in :func:`spade_fast.trace_batch`. Layers that no sample's data reaches are not tuned.

    Notes
    -----
    Hessians and paths are freed as soon as their layer is solved. The surviving weights and a bit mask of each sample,
    layer and candidate are kept on the CPU until the end: with float32 weights and the default candidates, 7.4 bytes
    per weight and sample. While a layer is being solved, its dense weights at all candidates are also in memory.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace, tune
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> samples, targets = [torch.randn(64, 8), torch.randn(64, 8)], [1, 3]
    >>> def probability(model, i):
    ...     with torch.no_grad():
    ...         return float(model(samples[i][:1]).softmax(1)[0, targets[i]])
    >>> tuning = tune(model, samples, probability)
    >>> sample_trace = trace(model, samples[0], sparsity=tuning.sparsity)
    """
    samples = list(samples)
    if not samples:
        raise InvalidValueError("samples is empty: give the calibration data of at least one sample")
    if not callable(score):
        raise InvalidTypeError(f"score must be a function of the model and a sample's index, got {score!r}")
    shares = checked_candidates(candidates)
    integer("rounds", rounds, 1)
    session = Session(model, PruneConfig(sparsity=shares[-1], **options), progress)
    grouped = group_layers(model, session.layers, stages)
    kept = {name for names in grouped.values() for name in names}
    session.layers = [layer for layer in session.layers if layer.name in kept]

    weights = solve_candidates(session, samples, shares[1:])
    solved = {name for of_sample in weights for name in of_sample}
    grouped = {stage: [name for name in names if name in solved] for stage, names in grouped.items()}
    grouped = {stage: names for stage, names in grouped.items() if names}
    session.warn()
    if not grouped:
        raise InvalidValueError("there is no layer to tune: the calibration data reaches no layer that can be pruned")
    search = _Search(model, score, weights, grouped, shares, session.progress)
    gradients = torch.is_grad_enabled()  # the score may compute gradients
    with undisturbed(model), torch.set_grad_enabled(gradients):
        chosen, before, after = search.run(rounds)
    stage_of = {name: stage for stage, names in grouped.items() for name in names}
    return Tuning(
        sparsity={layer.name: chosen[stage_of[layer.name]] for layer in session.layers if layer.name in solved},
        before=before,
        after=after,
        history=tuple(search.history),
        settings={
            **{name: value for name, value in session.config.record().items() if name not in ("sparsity", "layers")},
            "candidates": shares,
            "rounds": rounds,
            "samples": len(samples),
            "library_version": library_version(),
            "stages": grouped,
        },
    )


def group_layers(model: nn.Module, layers: Sequence[Layer], stages: Stages) -> dict[str, list[str]]:
    """Return the names of the layers of each stage, the stage with the last layer first; see :func:`tune`."""
    check_stages(stages)
    names = [layer.name for layer in layers]
    if isinstance(stages, Mapping):
        pairs = [
            (stage, pattern)
            for stage, patterns in stages.items()
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]
        first = match_names([pattern for _, pattern in pairs], names)
        stage_of = {name: str(pairs[index][0]) for name, index in first.items()}
    elif stages == "layers":
        stage_of = {name: name for name in names}
    else:
        every = [layer.parameter for layer in find_layers(model)[0]]
        stage_of = {layer.name: _block_of(model, layer, every) for layer in layers}
    grouped: dict[str, list[str]] = {}
    for name in reversed(names):
        if name in stage_of:
            grouped.setdefault(stage_of[name], []).insert(0, name)
    return grouped


def check_stages(stages: Stages) -> None:
    """Raise ValueError unless `stages` is a mapping or one of the words that :func:`tune` knows."""
    words = ("blocks", "layers")
    if not isinstance(stages, Mapping) and stages not in words:
        near = nearest(str(stages), words)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise InvalidValueError(
            f"stages must be 'blocks', 'layers' or a mapping of names to patterns, got {stages!r}{hint}"
        )


def _block_of(model: nn.Module, layer: Layer, every: Sequence[str]) -> str:
    """Return the name of the outermost non-container module that contains a layer, but not `every` layer."""
    path = layer.parameter.split(".")[:-1]
    for depth in range(1, len(path)):
        prefix = ".".join(path[:depth])
        plain = isinstance(model.get_submodule(prefix), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if not plain and not all(parameter.startswith(f"{prefix}.") for parameter in every):
            return prefix
    return ".".join(path) or layer.name


def checked_candidates(candidates: Iterable[float]) -> list[float]:
    """Return the sparsities to try, 0 among them, in order; raise TypeError or ValueError if they are invalid."""
    if isinstance(candidates, (str, bytes)) or not isinstance(candidates, Iterable):
        raise InvalidTypeError(f"candidates must be numbers between 0 and 1, got {candidates!r}")
    given = list(candidates)
    check_shares({f"candidates[{index}]": share for index, share in enumerate(given)})
    shares = sorted({0.0, *map(float, given)})
    if len(shares) == 1:
        raise InvalidValueError("candidates must include a sparsity above 0")
    return shares


# The surviving weights of one sample, by layer and by sparsity; sparsities that remove nothing are left out.
Candidates = dict[str, dict[float, PrunedLayer]]


def solve_candidates(session: Session, samples: Sequence[Batches], shares: Sequence[float]) -> list[Candidates]:
    """Solve all layers for all samples at all sparsities."""
    weights: list[Candidates] = [{} for _ in samples]
    ids = [str(s) for s in range(len(samples))]
    with session.exact_types():
        plan = session.plan(samples)
        done, to_do = 0, len(session.layers) * len(plan.chunks)
        for chunk in plan.chunks:
            for layers, calibrations in session.calibrated(plan, chunk, samples, ids):
                for layer in layers:
                    for s, ladder in solve_ladders(session, layer, calibrations, shares).ladders.items():
                        solved = {level.report.sparsity: level.pruned for level in ladder}
                        weights[chunk[s]][layer.name] = {share: one for share, one in solved.items() if one is not None}
                    done += 1
                    session.progress("solve", done, to_do)
    return weights


class _Search:
    """The search over stages and candidates, given the solved weights."""

    def __init__(
        self,
        model: nn.Module,
        score: Score,
        weights: Sequence[Candidates],
        stages: Mapping[str, Sequence[str]],
        candidates: Sequence[float],
        progress: Progress,
    ) -> None:
        self.model, self.score, self.weights = model, score, weights
        self.stages, self.candidates, self.progress = stages, candidates, progress
        self.history: list[Trial] = []
        self._known: dict[tuple[float, ...], float] = {}  # mean score for each tuple of the stages' sparsities
        self._done = self._total = 0

    def run(self, rounds: int) -> tuple[dict[str, float], float, float]:
        """Return the sparsity of each stage, and the mean scores before and after."""
        chosen = dict.fromkeys(self.stages, 0.0)
        before = best = _mean([self._scored(s) for s in range(len(self.weights))])
        self._known[tuple(chosen.values())] = before
        per_stage = (len(self.candidates) - 1) * len(self.weights)
        self._total = rounds * len(self.stages) * per_stage
        for turn in range(1, rounds + 1):
            start = best
            for stage in self.stages:
                done = self._done + per_stage
                scores = self._try(turn, stage, chosen)
                if self._done < done:  # some scores were already known
                    self._progress(done - self._done)
                chosen[stage] = min(self.candidates, key=lambda share: (-scores[share], share))
                best = scores[chosen[stage]]
            if best <= start and self._done < self._total:
                self._total = self._done
                self._progress(0)
                break
        return chosen, before, best

    def _try(self, turn: int, stage: str, chosen: Mapping[str, float]) -> dict[float, float]:
        """Return the mean score of each candidate for a stage, computing those that are not yet known."""
        keys = {share: tuple({**chosen, stage: share}.values()) for share in self.candidates}
        scores: dict[float, list[float]] = {share: [] for share, key in keys.items() if key not in self._known}
        others = {other: share for other, share in chosen.items() if other != stage}
        for s in range(len(self.weights) if scores else 0):
            with WeightsApplied(self.model, self._pruned(s, others)):
                for share, of_share in scores.items():
                    with WeightsApplied(self.model, self._pruned(s, {stage: share})):
                        of_share.append(self._scored(s))
                    self._progress(1)
        for share, of_share in scores.items():
            self._known[keys[share]] = _mean(of_share)
            self.history.append(Trial(turn, stage, share, self._known[keys[share]]))
        return {share: self._known[key] for share, key in keys.items()}

    def _progress(self, more: int) -> None:
        self._done += more
        self.progress("search", self._done, self._total)

    def _pruned(self, s: int, shares: Mapping[str, float]) -> list[PrunedLayer]:
        """Return one sample's pruned layers in these stages; layers that stay dense are left out."""
        layers = [
            (self.weights[s].get(name, {}), share) for stage, share in shares.items() for name in self.stages[stage]
        ]
        return [of_layer[share] for of_layer, share in layers if share in of_layer]

    def _scored(self, s: int) -> float:
        value = self.score(self.model, s)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTypeError(f"score must return a number, got {value!r} for sample {s}") from error
        if not math.isfinite(number):
            raise InvalidValueError(f"score must return a finite number, got {number} for sample {s}")
        return number


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)
