"""`trace` and `trace_batch`: from a model and the calibration data of samples to one `Trace` per sample."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.hashes import hash_tensors
from spade_fast._util.progress import Progress
from spade_fast._util.signatures import with_fields_of
from spade_fast._util.versions import library_version
from spade_fast.pruning.calibration import Batches, Calibration
from spade_fast.pruning.config import PruneConfig, PruneOptions, Sparsity
from spade_fast.pruning.dense_weights import count_weights
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.module_kinds import named_parameters
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.session import Session
from spade_fast.pruning.solve import LayerReport, solve_layer
from spade_fast.pruning.traces import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_fields_of(PruneConfig)
def trace(
    model: nn.Module,
    batches: Batches,
    *,
    sparsity: Sparsity,
    sample_id: str | int = "0",
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Trace:
    """Prune a model for one sample (SPADE, arXiv 2310.04519, algorithm 1).

    The dense model runs over the sample's calibration data once; then each layer is pruned independently so that its
    outputs on that data change as little as possible. The model itself is not modified.

    Parameters
    ----------
    model : nn.Module
        The dense model. It runs in evaluation mode, whatever its current mode, and uncompiled.
    batches : Tensor or iterable
        The sample's calibration data, such as ``ImageAugmenter(...)(image)``: images ``[N, C, H, W]``, or an iterable
        of batches. A batch is a tensor, a sequence of positional arguments of the model, or a mapping of its keyword
        arguments.
    sparsity : float, mapping or function
        Share of each layer's weights to remove, between 0 and 1; see :class:`PruneConfig`.
    sample_id : str or int
        Recorded in the trace to identify the sample.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` for the stages ``"calibrate"`` (batches) and ``"solve"`` (layers);
        `total` is 0 if the number of batches is unknown.
    solver, layers, block, damping, precision, memory_limit, seed, strict
        The other fields of :class:`PruneConfig`.

    Returns
    -------
    Trace

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or is out of range; weights, data or layer inputs are NaN or infinite; there is
        no data; `batches` is an iterator, but several passes are needed; the model is TorchScript, exported, quantised
        or of another framework, has no layer that can be pruned, or was made under `torch.inference_mode()`.
    UnknownLayerError
        A layer name or pattern matches no layer (also a KeyError and a ValueError).
    MemoryLimitError
        A single layer does not fit into `memory_limit` (also a MemoryError).
    NotPositiveDefiniteError
        A Hessian cannot be factorised even with the largest damping (also a torch.linalg.LinAlgError).
    FallbackError
        With `strict`: the data does not reach a layer, a weight cannot be pruned because of its kind (see `layers` of
        :class:`PruneConfig`) or because it is used by an operation other than a convolution or a matrix product with
        the whole weight, a layer needs more damping than requested, or several passes are needed.

    Warns
    -----
    FallbackWarning
        In the same cases without `strict`: one warning that names all layers concerned. Layers that the data does not
        reach, and weights that cannot be pruned, stay dense.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> sample_trace = trace(model, torch.randn(64, 8), sparsity=0.75)
    >>> with sample_trace.applied(model):
    ...     int((model[0].weight == 0).sum())
    96
    """
    session = Session(model, PruneConfig(sparsity=sparsity, **options), progress)
    (result,) = _traces(session, [batches], [str(sample_id)])
    session.warn()
    return result


@with_fields_of(PruneConfig)
def trace_batch(
    model: nn.Module,
    samples: Sequence[Batches],
    *,
    sparsity: Sparsity,
    sample_ids: Sequence[str | int] | None = None,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> list[Trace]:
    """Prune a model for several samples, with one solver call per layer for all of them.

    Each sample's trace equals that of :func:`trace` up to rounding. The Gram matrices of all samples are held at the
    same time; if `memory_limit` does not allow that for the largest layer, fewer samples are solved together.

    Parameters
    ----------
    samples : sequence
        The calibration data of each sample, as `batches` of :func:`trace`.
    sample_ids : sequence of str or int, optional
        One name per sample; default: its index.
    model, sparsity, progress, solver, layers, block, damping, precision, memory_limit, seed, strict
        As in :func:`trace`.

    Returns
    -------
    list of Trace
        One per sample, in the order of `samples`.

    Raises
    ------
    TypeError, ValueError, UnknownLayerError, MemoryLimitError, NotPositiveDefiniteError, FallbackError
        As in :func:`trace`; also ValueError if there are no samples, or not one id per sample.

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
    ids = [str(name) for name in (range(len(samples)) if sample_ids is None else sample_ids)]
    if not samples:
        raise InvalidValueError("samples is empty: there is nothing to trace")
    if len(ids) != len(samples):
        raise InvalidValueError(f"sample_ids must have one name for each of the {len(samples)} samples, got {len(ids)}")
    session = Session(model, PruneConfig(sparsity=sparsity, **options), progress)
    results = _traces(session, samples, ids)
    session.warn()
    return results


def _traces(session: Session, samples: Sequence[Batches], ids: Sequence[str]) -> list[Trace]:
    """Calibrate and solve as many samples at a time as the memory limit allows."""
    with session.exact_types():
        plan = session.plan(samples)
        weights = hash_tensors(named_parameters(session.model))
        builders = [_Builder(session.skipped) for _ in samples]
        solved = 0
        for chunk, layers, calibrations in session.calibrated(plan, samples, ids):
            for s, calibration in zip(chunk, calibrations, strict=True):
                builders[s].count(calibration)
                builders[s].reports.update((name, session.dense_report(name)) for name in calibration.used)
            for layer in layers:
                _prune(session, layer, calibrations, [builders[s] for s in chunk])
                solved += 1
                session.progress("solve", solved, len(session.layers) * len(plan.chunks))
    header = {
        "settings": session.config.record(),
        "passes": len(plan.passes),
        "library_version": library_version(),
        "weights": weights,
        "network_weights": count_weights(session.model),
    }
    named = zip(builders, ids, strict=True)
    return [builder.trace(session.order, {"sample_id": name, **header}) for builder, name in named]


def _prune(session: Session, layer: Layer, calibrations: Sequence[Calibration], builders: Sequence[_Builder]) -> None:
    """Solve one layer for all samples whose data reached it, and free its Gram matrices."""
    start = time.perf_counter()
    sparsity = session.sparsity[layer.name]
    given = session.gather(layer, calibrations)
    for s, note in given.skipped.items():
        zeros = int(session.zeros[layer.name].sum()) / layer.numel
        builders[s].reports[layer.name] = LayerReport(
            layer.name, layer.shape, sparsity, zeros, 0, session.config.solver, session.blocks[layer.name], note=note
        )
    if not given.reached:
        return
    pruned, reports = solve_layer(**given.options, sparsity=sparsity)
    reached = [builders[s] for s in given.reached]
    for builder, solution, report in zip(reached, pruned, reports, strict=True):
        session.note_damping(report)
        if report.removed:
            builder.pruned[layer.name] = PrunedLayer.from_solution(layer, solution, layer.weight(session.model).dtype)
        builder.reports[layer.name] = report
    spent = (time.perf_counter() - start) / len(reached)
    for builder in reached:
        builder.seconds["solve"] += spent


class _Builder:
    """Collects the layers, reports and times of one sample's trace."""

    def __init__(self, skipped: Mapping[str, LayerReport]) -> None:
        self.pruned: dict[str, PrunedLayer] = {}
        self.reports: dict[str, LayerReport] = dict(skipped)
        self.seconds: dict[str, float] = defaultdict(float)
        self.images = 0

    def count(self, calibration: Calibration) -> None:
        self.images = calibration.images
        for stage, spent in calibration.seconds.items():
            self.seconds[stage] += spent

    def trace(self, order: Sequence[str], header: Mapping[str, Any]) -> Trace:
        return Trace(
            [self.pruned[name] for name in order if name in self.pruned],
            [self.reports[name] for name in order if name in self.reports],
            {**header, "images": self.images, "seconds": dict(self.seconds)},
        )
