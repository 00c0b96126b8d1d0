"""From a model and calibration data to the traces of samples."""

from __future__ import annotations

import logging
import math
import operator
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import NoneType
from typing import Any

import torch
from torch import nn

from spade_fast.calibration import PRECISIONS, Batches, Calibration, calibrate, gram_bytes, split_batches
from spade_fast.layers import Layer, find_layers
from spade_fast.removals import count_zeros
from spade_fast.settings import (
    Sparsity,
    group_by_memory,
    is_number,
    parse_bytes,
    samples_together,
    sparsity_by_layer,
)
from spade_fast.solvers import SOLVERS, LayerReport, check_block, default_block, solve_layer
from spade_fast.trace import PrunedLayer, Trace, hash_weights

Progress = Callable[[str, int, int], None]

logger = logging.getLogger("spade_fast")


class FallbackError(RuntimeError):
    """Something could not be done as asked, and ``strict=True`` forbids doing otherwise."""


class FallbackWarning(UserWarning):
    """Something could not be done as asked for the layers that the message names."""


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
    run = _Run(model, sparsity, solver, layers, block, damping, precision, memory_limit, seed, strict, progress)
    (result,) = run.traces([batches], [str(sample_id)])
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
    run = _Run(model, sparsity, solver, layers, block, damping, precision, memory_limit, seed, strict, progress)
    results = run.traces(samples, ids)
    run.warn()
    return results


class _Run:
    """One call: its checked arguments, the layers at work and the fallbacks so far."""

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        solver: str,
        layers: str | Iterable[str] | None,
        block: int | None,
        damping: float,
        precision: str,
        memory_limit: int | str | None,
        seed: int | None,
        strict: bool,
        progress: Progress | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
        if block is not None and (isinstance(block, bool) or not isinstance(block, int)):
            raise TypeError(f"block must be a whole number or None, got {block!r}")
        if block is not None and block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        if not (is_number(damping) and 0 <= damping < math.inf):
            raise ValueError(f"damping must be a number of at least 0, got {damping!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
        if isinstance(seed, bool) or not isinstance(seed, (int, NoneType)):
            raise TypeError(f"seed must be a whole number or None, got {seed!r}")
        self.model, self.solver, self.seed, self.damping = model, solver, seed, float(damping)
        self.precision = precision
        self.limit = None if memory_limit is None else parse_bytes(memory_limit)
        self.strict, self.progress = strict, progress or (lambda stage, done, total: None)
        self.fallbacks: dict[str, dict[str, None]] = defaultdict(dict)

        patterns = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        found, unsupported = find_layers(model, patterns)
        every, every_unsupported = find_layers(model)
        names = [layer.name for layer in found] + list(unsupported)
        self.sparsity = sparsity_by_layer(sparsity, names, [layer.name for layer in every] + list(every_unsupported))
        self.layers = [layer for layer in found if self.sparsity[layer.name] > 0]
        self.blocks = {layer.name: default_block(layer, solver) if block is None else block for layer in self.layers}
        for layer in self.layers:
            check_block(layer, self.blocks[layer.name])
            dtype = layer.weight(model).dtype
            if precision == "bf16" and dtype != torch.float32:
                raise ValueError(f"precision='bf16' needs float32 weights, but layer {layer.name!r} has {dtype}")
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device: it has no values")
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"parameter {name!r} of the model has NaN or infinite values")
        self.zeros = {layer.name: count_zeros(layer.matrix(layer.weight(model).detach())) for layer in self.layers}
        self.left_alone = {}
        for name, reason in unsupported.items():
            share = self.sparsity[name]
            if share > 0:
                self._fall_back("left alone, as they cannot be pruned", f"{name} ({reason})")
                self.left_alone[name] = LayerReport(name, (), share, 0.0, 0, solver, 0, note=reason)
        self.settings: dict[str, Any] = {
            "solver": solver,
            "sparsity": _recordable(sparsity),
            "layers": patterns,
            "block": block,
            "damping": self.damping,
            "precision": precision,
            "memory_limit": memory_limit,
        }

    def traces(self, samples: Sequence[Batches], ids: Sequence[str]) -> list[Trace]:
        """Calibrate and solve, as many samples at a time as the memory limit allows."""
        with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
            return self._traces(samples, ids)

    def _traces(self, samples: Sequence[Batches], ids: Sequence[str]) -> list[Trace]:
        sizes = {layer.name: gram_bytes(layer, self.model) for layer in self.layers}
        together = samples_together(sizes, self.limit, len(samples))
        groups = group_by_memory({name: size * together for name, size in sizes.items()}, self.limit)
        by_name = {layer.name: layer for layer in self.layers}
        passes = [[by_name[name] for name in group] for group in groups]
        chunks = -(-len(samples) // together)
        if len(passes) > 1 or chunks > 1:
            self._check_repeatable(samples, len(passes))
            logger.info("memory_limit: %d passes over the data, %d samples together", len(passes), together)
            what = f"{len(passes)} passes over the data" + (f", {together} samples together" if chunks > 1 else "")
            self._fall_back("calibrated in parts to keep within memory_limit", what)

        weights = hash_weights(self.model)
        counter = _BatchCounter(self.progress, samples, len(passes))
        builders = [_Builder(self.left_alone) for _ in samples]
        solved = 0
        for start in range(0, len(samples), together):
            chunk = range(start, min(start + together, len(samples)))
            for layers in passes:
                calibrations = [self._calibrate(samples[s], layers, counter, ids[s], len(samples)) for s in chunk]
                for s, calibration in zip(chunk, calibrations, strict=True):
                    builders[s].count(calibration)
                for layer in layers:
                    self._prune(layer, calibrations, [builders[s] for s in chunk])
                    solved += 1
                    self.progress("solve", solved, len(self.layers) * chunks)
        header = {
            "seed": self.seed,
            "settings": self.settings,
            "passes": len(passes),
            "library_version": _library_version(),
            "weights": weights,
        }
        order = [*self.left_alone, *by_name]
        named = zip(builders, ids, strict=True)
        return [builder.trace(order, {"sample_id": name, **header}) for builder, name in named]

    def warn(self) -> None:
        """Give one warning of everything that was done otherwise than asked."""
        if self.fallbacks:
            parts = [f"{what}: {', '.join(details)}" for what, details in self.fallbacks.items()]
            warnings.warn("; ".join(parts), FallbackWarning, stacklevel=3)

    def _fall_back(self, what: str, detail: str) -> None:
        if self.strict:
            raise FallbackError(f"{what}: {detail}")
        self.fallbacks[what][detail] = None

    def _calibrate(
        self, batches: Batches, layers: Sequence[Layer], progress: Callable[[int], None], sample_id: str, samples: int
    ) -> Calibration:
        try:
            return calibrate(self.model, batches, layers, precision=self.precision, progress=progress)
        except (TypeError, ValueError) as error:
            if samples == 1:
                raise
            raise type(error)(f"sample {sample_id!r}: {error}") from error

    def _prune(self, layer: Layer, calibrations: Sequence[Calibration], builders: Sequence[_Builder]) -> None:
        """Solve one layer for all samples that reached it, and free its Gram matrices."""
        start = time.perf_counter()
        weight = layer.weight(self.model).detach()
        block, sparsity = self.blocks[layer.name], self.sparsity[layer.name]
        reached: list[_Builder] = []
        for calibration, builder in zip(calibrations, builders, strict=True):
            if layer.name in calibration.grams:
                reached.append(builder)
                continue
            note = calibration.unsupported.get(layer.name)
            if note is None:
                note = "not reached by the calibration data"
                self._fall_back("left alone, as the calibration data did not reach them", layer.name)
            else:
                self._fall_back("left alone, as they cannot be pruned", f"{layer.name} ({note})")
            zeros = int(self.zeros[layer.name].sum()) / layer.numel
            builder.reports[layer.name] = LayerReport(
                layer.name, layer.shape, sparsity, zeros, 0, self.solver, block, note=note
            )
        if not reached:
            return
        grams = [c.grams.pop(layer.name) for c in calibrations if layer.name in c.grams]
        hessians = grams[0][None] if len(grams) == 1 else torch.stack(grams)
        del grams
        matrix = layer.matrix(weight).to(hessians)
        pruned, reports = solve_layer(
            layer,
            matrix,
            hessians,
            solver=self.solver,
            sparsity=sparsity,
            block=block,
            damping=self.damping,
            zeros=self.zeros[layer.name],
        )
        for builder, solution, report in zip(reached, pruned, reports, strict=True):
            if report.retries:
                self._fall_back("damped more than asked for", f"{layer.name} ({report.damping:g})")
            if report.removed:
                packed = PrunedLayer.from_dense(layer, layer.restore(solution).to(weight.dtype))
                builder.pruned[layer.name] = packed
            builder.reports[layer.name] = report
        spent = (time.perf_counter() - start) / len(reached)
        for builder in reached:
            builder.seconds["solve"] += spent

    def _check_repeatable(self, samples: Sequence[Batches], passes: int) -> None:
        if passes > 1 and any(isinstance(batches, Iterator) for batches in samples):
            raise ValueError(
                f"batches is an iterator, which can be run over once, but memory_limit asks for {passes} passes; "
                "give something that can be run over again, such as a list or an ImageAugmenter's result"
            )


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


class _BatchCounter:
    """Reports batches done, over all samples and passes."""

    def __init__(self, progress: Progress, samples: Sequence[Batches], passes: int) -> None:
        self.progress, self.done = progress, 0
        lengths = [operator.length_hint(split_batches(batches)) for batches in samples]
        self.total = sum(lengths) * passes if all(lengths) else 0

    def __call__(self, images: int) -> None:
        self.done += 1
        self.progress("calibrate", self.done, self.total)


def _recordable(sparsity: Sparsity) -> float | str | dict[str, float]:
    if isinstance(sparsity, Mapping):
        return {pattern: float(share) for pattern, share in sparsity.items()}
    return "function" if callable(sparsity) else float(sparsity)


def _library_version() -> str:
    try:
        return version("spade_fast")
    except PackageNotFoundError:
        return "unknown"
