"""From a model and calibration data to the traces of samples."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from spade_fast.pruning.calibration import Batches, Calibration
from spade_fast.pruning.config import Sparsity
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.session import FallbackError, FallbackWarning, Progress, Run, library_version
from spade_fast.pruning.solve import LayerReport, solve_layer
from spade_fast.pruning.traces import PrunedLayer, Trace, hash_weights

__all__ = ["FallbackError", "FallbackWarning", "Progress", "trace", "trace_batch"]


def trace(
    model: nn.Module,
    batches: Batches,
    *,
    sparsity: Sparsity,
    solver: str = "exact",
    layers: str | Iterable[str] | None = None,
    block: int | None = None,
    damping: float = 0.01,
    precision: str = "float32",
    memory_limit: int | str | None = None,
    sample_id: str | int = "0",
    seed: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Prune a model for one sample (SPADE, arXiv 2310.04519, algorithm 1).

    The dense model runs over the sample's calibration data once; then every layer is pruned by itself so that its
    outputs on that data change least. The model is left as it was.

    Parameters
    ----------
    model
        The dense model. It runs in evaluation mode, whatever mode it is in.
    batches
        The sample's calibration data, such as ``ImageAugmenter(...)(image)``: images ``[n, C, H, W]``, or an iterable
        of batches. A batch is a tensor, or a sequence of positional or mapping of keyword arguments of the model.
    sparsity : float, mapping or function
        Share of each layer's weights to remove, 0 to 1. A mapping goes from layer names or patterns to shares: a layer
        gets that of the first pattern it matches, and 0 if it matches none. A function is given the layer's name. A
        layer with 0 is left alone.
    solver : "exact" or "sparsegpt"
        Exact OBS (SPADE) or SparseGPT (FastSPADE).
    layers
        Names or patterns (``*``, ``?``, ``[...]``) of the layers to prune; None for all linear and convolutional ones.
    block
        Neighbouring columns that are removed together (exact OBS, in the order (kh, kw, in-channel)) or whose mask is
        chosen together (SparseGPT, in the order (in-channel, kh, kw)), in all layers. None for the published choice:
        ``kh * kw`` for ordinary convolutions, 1 for linear, 1x1 and depthwise layers. 1 is unstructured.
    damping
        Share of the Hessian's mean diagonal that is added to its diagonal. A layer whose Hessian cannot be factorised
        gets more, up to 1.
    precision : "float32" or "bf16"
        ``"bf16"`` calibrates under autocast to bfloat16, with products of layer inputs summed in float32: faster on
        processors with AVX512-BF16, and masks differ in some near-ties. ``"float32"`` keeps the model's own precision.
    memory_limit
        Largest size of all Gram matrices held at a time: bytes, or a string such as ``"2GB"``. Layers that do not fit
        together are calibrated in several passes over the data. Solving needs about three times the Gram matrices of
        the layer at hand besides.
    sample_id, seed
        Kept in the trace, to tell where its calibration data came from.
    strict
        Raise FallbackError instead of doing something else than was asked for.
    progress
        Called as ``progress(stage, done, total)`` for the stages ``"calibrate"`` (batches) and ``"solve"`` (layers);
        `total` is 0 where the number of batches is not known.

    Returns
    -------
    Trace

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong type or range; NaN or infinite weights, data or layer inputs; no data; an iterator as
        `batches` where several passes are needed.
    UnknownLayerError
        A layer name or pattern that matches nothing (a KeyError and a ValueError).
    MemoryError
        A single layer does not fit into `memory_limit`.
    torch.linalg.LinAlgError
        A Hessian cannot be factorised with any damping.
    FallbackError
        Under `strict`: layers not reached by the data, weights used by operations that are no convolution or product
        with the whole weight, more damping than asked for, several passes.

    Warns
    -----
    FallbackWarning
        The same without `strict`: one warning that names all layers concerned. Layers that were not reached or whose
        weight is used otherwise are left alone.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> sample_trace = trace(model, torch.randn(64, 8), sparsity=0.75)
    >>> with sample_trace.applied(model):
    ...     int((model[0].weight == 0).sum())
    96
    """
    run = Run(model, sparsity, solver, layers, block, damping, precision, memory_limit, seed, strict, progress)
    (result,) = _traces(run, [batches], [str(sample_id)])
    run.warn()
    return result


def trace_batch(
    model: nn.Module,
    samples: Sequence[Batches],
    *,
    sparsity: Sparsity,
    sample_ids: Sequence[str | int] | None = None,
    solver: str = "exact",
    layers: str | Iterable[str] | None = None,
    block: int | None = None,
    damping: float = 0.01,
    precision: str = "float32",
    memory_limit: int | str | None = None,
    seed: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> list[Trace]:
    """Prune a model for several samples, with one solver call a layer for all of them.

    Each sample's trace is that of :func:`trace`, up to rounding. The Gram matrices of all samples are held at a time;
    where `memory_limit` does not allow that for the largest layer, fewer samples are solved together.

    Parameters
    ----------
    samples
        The calibration data of each sample.
    sample_ids
        A name for each sample; default: its index.

    Returns
    -------
    list of Trace

    Other parameters, errors and warnings are those of :func:`trace`.
    """
    samples = list(samples)
    ids = [str(name) for name in (range(len(samples)) if sample_ids is None else sample_ids)]
    if not samples:
        raise ValueError("samples is empty: there is nothing to trace")
    if len(ids) != len(samples):
        raise ValueError(f"sample_ids must name each of the {len(samples)} samples, got {len(ids)} names")
    run = Run(model, sparsity, solver, layers, block, damping, precision, memory_limit, seed, strict, progress)
    results = _traces(run, samples, ids)
    run.warn()
    return results


def _traces(run: Run, samples: Sequence[Batches], ids: Sequence[str]) -> list[Trace]:
    """Calibrate and solve, as many samples at a time as the memory limit allows."""
    with run.exact_types():
        plan = run.plan(samples)
        weights = hash_weights(run.model)
        builders = [_Builder(run.left_alone) for _ in samples]
        solved = 0
        for chunk, layers, calibrations in run.calibrated(plan, samples, ids):
            for s, calibration in zip(chunk, calibrations, strict=True):
                builders[s].count(calibration)
            for layer in layers:
                _prune(run, layer, calibrations, [builders[s] for s in chunk])
                solved += 1
                run.progress("solve", solved, len(run.layers) * len(plan.chunks))
    header = {
        "seed": run.seed,
        "settings": run.settings,
        "passes": len(plan.passes),
        "library_version": library_version(),
        "weights": weights,
    }
    order = [*run.left_alone, *(layer.name for layer in run.layers)]
    named = zip(builders, ids, strict=True)
    return [builder.trace(order, {"sample_id": name, **header}) for builder, name in named]


def _prune(run: Run, layer: Layer, calibrations: Sequence[Calibration], builders: Sequence[_Builder]) -> None:
    """Solve one layer for all samples that reached it, and free its Gram matrices."""
    start = time.perf_counter()
    sparsity = run.sparsity[layer.name]
    given = run.gather(layer, calibrations)
    for s, note in given.left_alone.items():
        zeros = int(run.zeros[layer.name].sum()) / layer.numel
        builders[s].reports[layer.name] = LayerReport(
            layer.name, layer.shape, sparsity, zeros, 0, run.solver, run.blocks[layer.name], note=note
        )
    if not given.reached:
        return
    pruned, reports = solve_layer(**given.options, sparsity=sparsity)
    reached = [builders[s] for s in given.reached]
    for builder, solution, report in zip(reached, pruned, reports, strict=True):
        run.note_damping(report)
        if report.removed:
            builder.pruned[layer.name] = PrunedLayer.from_solution(layer, solution, layer.weight(run.model).dtype)
        builder.reports[layer.name] = report
    spent = (time.perf_counter() - start) / len(reached)
    for builder in reached:
        builder.seconds["solve"] += spent


class _Builder:
    """Gathers one sample's trace."""

    def __init__(self, left_alone: Mapping[str, LayerReport]) -> None:
        self.pruned: dict[str, PrunedLayer] = {}
        self.reports: dict[str, LayerReport] = dict(left_alone)
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
