"""`trace` and `trace_batch`: from a model and the calibration data of samples to one `Trace` per sample."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.hashes import hash_tensors
from spade_fast._util.modes import evaluation_mode, undisturbed
from spade_fast._util.progress import Progress
from spade_fast._util.ranges import stage
from spade_fast._util.signatures import with_fields_of
from spade_fast._util.versions import library_version
from spade_fast.pruning.auto_sparsity import Search
from spade_fast.pruning.calibration import Batches, Calibration
from spade_fast.pruning.config import AUTO, PruneConfig, PruneOptions, Sparsity
from spade_fast.pruning.decision import Decision, answer_probabilities
from spade_fast.pruning.dense_weights import count_weights
from spade_fast.pruning.exchange import WeightsApplied, weights_held
from spade_fast.pruning.goals import Goal, checked_output, naming, output_score, sample_goal, split_inputs
from spade_fast.pruning.ladders import LEVELS, Ladder, solve_ladders
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.module_kinds import named_parameters
from spade_fast.pruning.session import Session, naming_sample, per_sample
from spade_fast.pruning.solve import LayerReport
from spade_fast.pruning.traces import Trace
from spade_fast.targets.answers import reading
from spade_fast.targets.class_names import class_names_of
from spade_fast.targets.classification import as_target
from spade_fast.targets.target import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_fields_of(PruneConfig)
def trace(
    model: nn.Module,
    batches: Batches,
    *,
    sparsity: Sparsity = AUTO,
    inputs: Any = None,
    target: TargetLike | None = None,
    sample_id: str | int = "0",
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Trace:
    """Prune a model for one sample (SPADE, arXiv 2310.04519, algorithm 1).

    The dense model runs over the sample's calibration data once; then each layer is pruned independently so that its
    outputs on that data change as little as possible. With automatic sparsity, the default, every layer is then pruned
    up to the same relative error of its output, the largest at which the trace keeps the decision. The search applies
    the traces that it tries to the model, so no other thread may use it meanwhile; afterwards the model is as it was.

    Parameters
    ----------
    model : nn.Module
        The dense model. It runs in evaluation mode, whatever its current mode, and uncompiled.
    batches : Tensor or iterable
        The sample's calibration data, such as ``ImageAugmenter(...)(image)`` or that of another augmenter: images
        ``[N, C, H, W]``, or an iterable of batches. A batch is a tensor, a sequence of positional arguments of the
        model, or a mapping of its keyword arguments.
    sparsity : "auto", float, mapping or function
        Share of each layer's weights to remove, between 0 and 1; see :class:`PruneConfig`.
    inputs : Tensor, sequence or mapping, optional
        The sample itself, in the same forms as a batch, such as an image ``[1, C, H, W]``. Automatic sparsity needs it.
        If it is given and the model returns logits, the trace's `decision` is recorded.
    target : int, str or callable, optional
        What automatic sparsity keeps. A class keeps its probability; it is given by its index, or by its name if the
        model has a Hugging Face configuration with names. A function of the model's output that returns one number per
        sample, a tensor ``[S]``, keeps this number, which must be above 0 for the dense model; those of
        :mod:`spade_fast.targets` say what of it is kept. By default it is the class that the model predicts.
    sample_id : str or int
        Recorded in the trace to identify the sample.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` for the stages ``"calibrate"`` (batches), ``"solve"`` (layers) and
        ``"search"`` (samples, with automatic sparsity); `total` is 0 if the number of batches is unknown.
    keep, solver, layers, block, damping, precision, compile, memory_limit, seed, strict
        The other fields of :class:`PruneConfig`.

    Returns
    -------
    Trace

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of range; weights, data or layer inputs are NaN or infinite; there is
        no data; `batches` is an iterator, but several passes are needed; automatic sparsity lacks `inputs`; the target
        does not return one finite number, or keeps one that is not above 0 for the dense model; `keep` has several
        shares, which would make several traces; the model is TorchScript, exported, quantised or of another framework,
        has no layer that can be pruned, or was made under `torch.inference_mode()`.
    UnknownLayerError
        A layer name or pattern matches no layer (also a KeyError and a ValueError).
    TraceAppliedError
        A trace is applied to the model, or another thread prunes it during the search (also a RuntimeError).
    MemoryLimitError
        A single layer does not fit into `memory_limit` (also a MemoryError).
    NotPositiveDefiniteError
        A Hessian cannot be factorised even with the largest damping (also a torch.linalg.LinAlgError).
    FallbackError
        With `strict`: the data does not reach a layer, a weight cannot be pruned because of its kind (see `layers` of
        :class:`PruneConfig`) or because it is used by an operation other than a convolution or a matrix product with
        the whole weight, a layer needs more damping than requested, several passes are needed, or no sparsity keeps the
        score.

    Warns
    -----
    FallbackWarning
        In the same cases without `strict`: one warning that names all layers concerned. Layers that the data does not
        reach, and weights that cannot be pruned, stay dense; if no sparsity keeps the score, the mildest is used.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> sample = torch.randn(1, 8)
    >>> sample_trace = trace(model, sample + 0.1 * torch.randn(64, 8), inputs=sample)
    >>> with sample_trace.applied(model):
    ...     logits = model(sample)

    With a sparsity of one's choice:

    >>> trace(model, torch.randn(64, 8), sparsity=0.75).sparsity
    0.75
    """
    session = Session(model, PruneConfig(sparsity=sparsity, **options), progress)
    (result,) = _one_each(session, [batches], [str(sample_id)], [inputs], [target])
    session.warn()
    return result


@with_fields_of(PruneConfig)
def trace_batch(
    model: nn.Module,
    samples: Sequence[Batches],
    *,
    sparsity: Sparsity = AUTO,
    inputs: Sequence[Any] | None = None,
    targets: Sequence[TargetLike | None] | None = None,
    sample_ids: Sequence[str | int] | None = None,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> list[Trace]:
    """Prune a model for several samples, with one solver call per layer for all of them.

    Each sample's trace equals that of :func:`trace` up to rounding. The Gram matrices of all samples are held at the
    same time; if `memory_limit` does not allow that for the largest layer, fewer samples are solved together. With
    automatic sparsity, so are the surviving weights of each sample and layer at all sparsities that are tried.

    Parameters
    ----------
    samples : sequence
        The calibration data of each sample, as `batches` of :func:`trace`.
    inputs, targets : sequence, optional
        One entry per sample, as `inputs` and `target` of :func:`trace`.
    sample_ids : sequence of str or int, optional
        One name per sample; default: its index.
    model, sparsity, progress, keep, solver, layers, block, damping, precision, compile, memory_limit, seed, strict
        As in :func:`trace`.

    Returns
    -------
    list of Trace
        One per sample, in the order of `samples`.

    Raises
    ------
    TypeError, ValueError, UnknownLayerError, MemoryLimitError, NotPositiveDefiniteError, FallbackError
        As in :func:`trace`; also ValueError if there are no samples, or not one id, input and target per sample.

    Warns
    -----
    FallbackWarning
        As in :func:`trace`.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace_batch
    >>> model = torch.nn.Linear(8, 4)
    >>> traces = trace_batch(model, [torch.randn(64, 8), torch.randn(64, 8)], sparsity=0.5)
    >>> [each.sparsity for each in traces]
    [0.5, 0.5]
    """
    samples = list(samples)
    if not samples:
        raise InvalidValueError("samples is empty: there is nothing to trace")
    ids = [str(name) for name in per_sample("sample_ids", sample_ids, range(len(samples)))]
    nothing = [None] * len(samples)
    session = Session(model, PruneConfig(sparsity=sparsity, **options), progress)
    given = per_sample("inputs", inputs, nothing), per_sample("targets", targets, nothing)
    results = _one_each(session, samples, ids, *given)
    session.warn()
    return results


def _one_each(
    session: Session,
    samples: Sequence[Batches],
    ids: Sequence[str],
    inputs: Sequence[Any],
    targets: Sequence[TargetLike | None],
) -> list[Trace]:
    """Make one trace per sample, and record the decisions for the inputs that are given."""
    missing = [name for name, one in zip(ids, inputs, strict=True) if one is None]
    if session.auto and missing:
        which = f" (sample {missing[0]!r} lacks them)" if len(missing) < len(ids) else ""
        raise InvalidTypeError(
            f"sparsity={AUTO!r} needs the sample itself, as the model takes it: give inputs, or a number as sparsity"
            f"{which}"
        )
    if not session.auto and any(target is not None for target in targets):
        raise InvalidValueError(f"a target is what sparsity={AUTO!r} keeps; it has no effect on other ones")
    if len(session.config.keeps) > 1:
        raise InvalidValueError(
            f"keep must be one number, got {session.config.keeps}: trace once for each, or use Spade or explain, which "
            "take several"
        )
    goals: list[Goal | None] = [None] * len(samples)
    with weights_held(session.model), undisturbed(session.model):
        for s, given in enumerate(inputs):
            if session.auto:
                with naming_sample(ids, s):
                    scored = output_score(session.model, given, targets[s])
                goals[s] = sample_goal(ids[s], scored, given)
            elif given is not None:
                with naming_sample(ids, s):
                    checked_output(session.model, given)
    results = [made for (made,) in traces_by_level(session, samples, ids, goals)]
    for made, given, target in zip(results, inputs, targets, strict=True):
        if given is not None:
            _record_decision(made, session.model, given, target)
    return results


def _record_decision(made: Trace, model: nn.Module, inputs: Any, target: TargetLike | None) -> None:
    """Record what the model decides on a sample, dense and with its trace, if the target tells what the answers are."""
    asked = None if target is None else as_target(target, class_names_of(model))
    with suppress(InvalidValueError):  # the model does not return logits of several classes
        if asked is None or asked.answers is None:
            args, kwargs = split_inputs(inputs, model)
            made.record_decision(model, *args, **kwargs)
            return
        with evaluation_mode(model), reading(model, asked) as read:
            dense = answer_probabilities(asked, read(checked_output(model, inputs)))
            with made.applied(model):
                pruned = answer_probabilities(asked, read(checked_output(model, inputs)))
        made.decision = Decision.between(dense, pruned)


def traces_by_level(
    session: Session, samples: Sequence[Batches], ids: Sequence[str], goals: Sequence[Goal | None]
) -> list[list[Trace]]:
    """Trace samples, as many at a time as the memory limit allows, each for all levels from one calibration.

    Parameters
    ----------
    goals
        For each sample what its traces are to keep, if the sparsity is automatic, and otherwise None.

    Returns
    -------
    list of list of Trace
        For each sample, a trace for each share to keep; one trace if the sparsity is not automatic.
    """
    (results,) = traces_by_solver([session], samples, ids, goals)
    return results


def traces_by_solver(
    sessions: Sequence[Session], samples: Sequence[Batches], ids: Sequence[str], goals: Sequence[Goal | None]
) -> list[list[list[Trace]]]:
    """Trace samples with several solvers, all from one calibration.

    Each solver's traces are what :func:`traces_by_level` returns for it. The seconds of the calibration, which each of
    them needs, are in the headers of all; the first session reports its progress.

    Parameters
    ----------
    sessions
        A session, and what its :meth:`Session.with_solver` returns.
    """
    first = sessions[0]
    with first.exact_types():
        plan = first.plan(samples)
        facts = {
            "passes": len(plan.passes),
            "library_version": library_version(),
            "weights": hash_tensors(named_parameters(first.model)),
            "network_weights": count_weights(first.model),
        }
    results: list[list[list[Trace]]] = [[] for _ in sessions]
    solved, to_solve = 0, len(first.layers) * len(plan.chunks)
    for chunk in plan.chunks:
        builders = [[_Builder(session, facts, ids[s]) for s in chunk] for session in sessions]
        with first.exact_types():
            for layers, calibrations in first.calibrated(plan, chunk, samples, ids):
                for of_session in builders:
                    for builder, calibration in zip(of_session, calibrations, strict=True):
                        builder.count(calibration)
                for layer in layers:
                    _solve(sessions, layer, calibrations, builders)
                    solved += 1
                    for session in sessions:
                        session.progress("solve", solved, to_solve)
        for session, of_session, made in zip(sessions, builders, results, strict=True):
            for s, builder in zip(chunk, of_session, strict=True):
                goal = goals[s]
                with naming_sample(ids, s):
                    made.append([builder.trace()] if goal is None else builder.search(goal))
                if goal is not None:
                    session.progress("search", len(made), len(samples))
    return results


def _solve(
    sessions: Sequence[Session],
    layer: Layer,
    calibrations: Sequence[Calibration],
    builders: Sequence[Sequence[_Builder]],
) -> None:
    """Solve one layer for all samples whose data reached it, with each solver, and free its Gram matrices."""
    start = time.perf_counter()
    given = sessions[0].gather(layer, calibrations)
    for session, of_session in zip(sessions, builders, strict=True):
        levels = LEVELS if session.auto else [session.sparsity[layer.name]]
        solved = solve_ladders(session, given, levels)
        end = time.perf_counter()
        for s, report in solved.skipped.items():
            of_session[s].reports[layer.name] = report
        for s, ladder in solved.ladders.items():
            of_session[s].ladders[layer.name] = ladder
            of_session[s].seconds["solve"] += (end - start) / len(solved.ladders)
        start = end


class _Builder:
    """Collects the ladders, reports and times of one sample, and makes its traces."""

    def __init__(self, session: Session, facts: Mapping[str, Any], sample_id: str) -> None:
        self.session = session
        self.header = {"settings": session.config.record(), **facts, "sample_id": sample_id}
        self.ladders: dict[str, Ladder] = {}
        self.reports: dict[str, LayerReport] = dict(session.skipped)
        self.seconds: dict[str, float] = defaultdict(float)
        self.images = 0

    def count(self, calibration: Calibration) -> None:
        self.images = calibration.images
        self.reports.update((name, self.session.dense_report(name)) for name in calibration.used)
        for name, spent in calibration.seconds.items():
            self.seconds[name] += spent

    def trace(self, levels: Mapping[str, int] | None = None, **entries: Any) -> Trace:
        """Return the trace with each layer at a level of its ladder, by default at the last one."""
        chosen = {name: ladder[-1 if levels is None else levels[name]] for name, ladder in self.ladders.items()}
        reports = {**self.reports, **{name: level.report for name, level in chosen.items()}}
        order = self.session.order
        pruned = [chosen[name].pruned for name in order if name in chosen]
        return Trace(
            [one for one in pruned if one is not None],
            [reports[name] for name in order if name in reports],
            {**self.header, "images": self.images, "seconds": dict(self.seconds), **entries},
        )

    def search(self, goal: Goal) -> list[Trace]:
        """Return the traces that keep the shares asked for of a goal's scores."""
        if not self.ladders:
            return [self.trace() for _ in self.session.config.keeps]
        start = time.perf_counter()
        model, name = self.session.model, self.header["sample_id"]
        gradients = torch.is_grad_enabled()  # functions around a network may need them
        with naming(name), stage("search"), undisturbed(model), torch.set_grad_enabled(gradients):
            with weights_held(model):
                search = Search(self.ladders, goal, lambda pruned: WeightsApplied(model, pruned))
            found = search.run(self.session.config.keeps)
        for one in found:
            if not one.auto.kept:
                self.session.fall_back("kept less than asked for", f"sample {name!r} ({one.auto})")
        self.seconds["search"] = time.perf_counter() - start
        return [self.trace(one.levels, auto=one.auto.entries(), target=goal.target) for one in found]
