"""Searches the sparsity of each layer, or of each stage of layers, that makes a score of the traces best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast._util.progress import Progress
from spade_fast._util.signatures import with_fields_of
from spade_fast._util.versions import library_version
from spade_fast.pruning.calibration import Batches
from spade_fast.pruning.config import PruneConfig, PruneOptions, check_shares
from spade_fast.pruning.layers import Layer, find_layers, match_names
from spade_fast.pruning.session import Session
from spade_fast.pruning.solve import solve_sparsities
from spade_fast.pruning.traces import PrunedLayer, weights_applied
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
    """Search the sparsity of each stage of layers, the last stage first (SPADE, arXiv 2310.04519).

    All layers are dense at the start. Stage by stage, each candidate is given to all layers of the stage, and the one
    with the highest mean score over the samples is kept; of equal ones the lowest. In each sample's score the model has
    that sample's pruned weights, those of ``trace(model, samples[i], sparsity=...)``.

    Trying a candidate needs no solving. With exact OBS each layer and sample has one path
    (:func:`spade_fast.ops.obs_path`), from which the weights at all candidates follow
    (:func:`spade_fast.ops.obs_solution`, in one call); SparseGPT, which has no path, takes a sweep for each candidate,
    from the sample's one factor. All is solved before the search,
    since a layer's trace does not depend on the sparsity of others.

    Parameters
    ----------
    model
        The dense model. It is in evaluation mode throughout and is left as it was, also after exceptions.
    samples
        The calibration data of each sample, as `batches` of :func:`spade_fast.trace`.
    score
        Called as ``score(model, i)`` while the pruned weights of sample ``i`` are applied to the model, and once per
        sample for the dense model. It returns a finite number, higher is better, and the same one each time: the
        probability of the sample's class, or how well a map of importance finds the object. It may compute gradients.
    candidates
        Shares of weights to try, between 0 and 1. 0 is always one of them.
    stages : "blocks", "layers" or mapping
        Which layers share one sparsity. ``"layers"``: each has its own. ``"blocks"``: those of an outermost module that
        is neither a plain container (Sequential, ModuleList, ModuleDict) nor holds all the model's layers, such as a
        residual block. A mapping goes from names of stages to layer names or patterns; a layer belongs to the first one
        it matches, or stays dense. The stage of the layer that comes last in the model is searched first.
    rounds
        How often to go through all stages. The search ends after a round in which the score did not rise.
    progress
        Called as ``progress(stage, done, total)`` for the stages ``"calibrate"`` (batches), ``"solve"`` (layers) and
        ``"search"`` (scores).
    solver, layers, block, damping, precision, memory_limit, seed, strict
        Fields of :class:`PruneConfig`; layers that are not asked for stay dense.

    Returns
    -------
    Tuning

    Raises
    ------
    TypeError, ValueError
        Bad arguments, or a score that is not a finite number; and all errors of :func:`spade_fast.trace_batch`.

    Warns
    -----
    FallbackWarning
        As :func:`spade_fast.trace_batch`. A layer that no sample's data reaches is not tuned.

    Notes
    -----
    Neither Hessians nor paths outlive the solving of their layer. Until the end are kept, on the CPU, the surviving
    weights and a bit mask of each sample, layer and candidate: for float32 weights and the default candidates 7.4 bytes
    a weight and sample. While a layer is solved, its weights at all candidates also exist as dense ones.

    Examples
    --------
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
        raise InvalidValueError("samples is empty: there is nothing to tune on")
    if not callable(score):
        raise InvalidTypeError(f"score must be a function of the model and a sample's index, got {score!r}")
    shares = _checked_candidates(candidates)
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
        raise InvalidValueError("there is no layer to tune: none can be pruned or is reached by the calibration data")
    search = _Search(model, score, weights, grouped, shares, session.progress)
    gradients = torch.is_grad_enabled()  # which scores may need
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
    """Return the names of the layers of each stage, the stage of the last layer first; see :func:`tune`."""
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
    elif stages == "blocks":
        every = [layer.parameter for layer in find_layers(model)[0]]
        stage_of = {layer.name: _block_of(model, layer, every) for layer in layers}
    else:
        raise InvalidValueError(f"stages must be 'blocks', 'layers' or a mapping of names to patterns, got {stages!r}")
    grouped: dict[str, list[str]] = {}
    for name in reversed(names):
        if name in stage_of:
            grouped.setdefault(stage_of[name], []).insert(0, name)
    return grouped


def _block_of(model: nn.Module, layer: Layer, every: Sequence[str]) -> str:
    """Name of the outermost module around a layer that divides the parameters of `every` layer."""
    path = layer.parameter.split(".")[:-1]
    for depth in range(1, len(path)):
        prefix = ".".join(path[:depth])
        plain = isinstance(model.get_submodule(prefix), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if not plain and not all(parameter.startswith(f"{prefix}.") for parameter in every):
            return prefix
    return ".".join(path) or layer.name


def _checked_candidates(candidates: Iterable[float]) -> list[float]:
    if isinstance(candidates, (str, bytes)) or not isinstance(candidates, Iterable):
        raise InvalidTypeError(f"candidates must be numbers between 0 and 1, got {candidates!r}")
    given = list(candidates)
    check_shares({f"candidates[{index}]": share for index, share in enumerate(given)})
    shares = sorted({0.0, *map(float, given)})
    if len(shares) == 1:
        raise InvalidValueError("candidates must have a sparsity above 0")
    return shares


# The surviving weights of one sample: of each layer at each sparsity at which some are removed.
Candidates = dict[str, dict[float, PrunedLayer]]


def solve_candidates(session: Session, samples: Sequence[Batches], shares: Sequence[float]) -> list[Candidates]:
    """Solve all layers for all samples at all sparsities."""
    weights: list[Candidates] = [{} for _ in samples]
    with session.exact_types():
        plan = session.plan(samples)
        done = 0
        for chunk, layers, calibrations in session.calibrated(plan, samples, [str(s) for s in range(len(samples))]):
            for layer in layers:
                given = session.gather(layer, calibrations)
                solutions = solve_sparsities(**given.options, sparsities=shares) if given.reached else []
                dtype = layer.weight(session.model).dtype
                for s in given.reached:
                    weights[chunk[s]][layer.name] = {}
                for share, (pruned, reports) in zip(shares, solutions, strict=bool(solutions)):
                    for s, solution, report in zip(given.reached, pruned, reports, strict=True):
                        session.note_damping(report)
                        if report.removed:
                            packed = PrunedLayer.from_solution(layer, solution, dtype)
                            weights[chunk[s]][layer.name][share] = packed
                done += 1
                session.progress("solve", done, len(session.layers) * len(plan.chunks))
    return weights


class _Search:
    """The search itself, for weights that are solved."""

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
        self._known: dict[tuple[float, ...], float] = {}  # mean score by the sparsities of all stages
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
                if self._done < done:  # some were known
                    self._progress(done - self._done)
                chosen[stage] = min(self.candidates, key=lambda share: (-scores[share], share))
                best = scores[chosen[stage]]
            if best <= start and self._done < self._total:
                self._total = self._done
                self._progress(0)
                break
        return chosen, before, best

    def _try(self, turn: int, stage: str, chosen: Mapping[str, float]) -> dict[float, float]:
        """Mean score of each candidate for a stage; those that are not known yet are tried."""
        keys = {share: tuple({**chosen, stage: share}.values()) for share in self.candidates}
        scores: dict[float, list[float]] = {share: [] for share, key in keys.items() if key not in self._known}
        others = {other: share for other, share in chosen.items() if other != stage}
        for s in range(len(self.weights) if scores else 0):
            with weights_applied(self.model, self._pruned(s, others)):
                for share, of_share in scores.items():
                    with weights_applied(self.model, self._pruned(s, {stage: share})):
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
        """One sample's weights of these stages; what is dense is left out."""
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
