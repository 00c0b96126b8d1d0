"""What every call that calibrates and solves has in common: checked arguments, passes over the data, fallbacks."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast.pruning.calibration import PRECISIONS, Batches, Calibration, calibrate, gram_bytes, split_batches
from spade_fast.pruning.config import (
    Sparsity,
    group_by_memory,
    is_number,
    parse_bytes,
    samples_together,
    sparsity_by_layer,
)
from spade_fast.pruning.counts import count_zeros
from spade_fast.pruning.layers import Layer, find_layers
from spade_fast.pruning.solve import SOLVERS, LayerReport, check_block, default_block

Progress = Callable[[str, int, int], None]

logger = logging.getLogger("spade_fast")


class FallbackError(RuntimeError):
    """Something could not be done as asked, and ``strict=True`` forbids doing otherwise."""


class FallbackWarning(UserWarning):
    """Something could not be done as asked for the layers that the message names."""


@dataclass(frozen=True)
class Plan:
    """Layers that are calibrated in each pass over the data, and samples that are treated together."""

    passes: list[list[Layer]]
    chunks: list[range]


@dataclass(frozen=True)
class Gathered:
    """What is there to solve one layer for some samples.

    Attributes
    ----------
    reached
        Indices of the samples whose data reached the layer.
    left_alone
        Why the layer cannot be pruned for each of the others.
    options
        Arguments of :func:`spade_fast.pruning.solve.solve_layer`, all but the sparsity; empty if no sample reached it.
    """

    reached: list[int]
    left_alone: dict[int, str]
    options: dict[str, Any]


class Run:
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
            if not _all_finite(parameter.detach()):
                raise ValueError(f"parameter {name!r} of the model has NaN or infinite values")
        self.zeros = {layer.name: count_zeros(layer.matrix(layer.weight(model).detach())) for layer in self.layers}
        self.left_alone = {}
        for name, reason in unsupported.items():
            share = self.sparsity[name]
            if share > 0:
                self.fall_back("left alone, as they cannot be pruned", f"{name} ({reason})")
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

    def exact_types(self) -> AbstractContextManager[None]:
        """Return a ``with`` block in which the caller's autocast changes nothing."""
        return torch.autocast(next(self.model.parameters()).device.type, enabled=False)

    def plan(self, samples: Sequence[Batches]) -> Plan:
        """Divide the work so that Gram matrices held at a time keep within the memory limit."""
        sizes = {layer.name: gram_bytes(layer, self.model) for layer in self.layers}
        together = samples_together(sizes, self.limit, len(samples))
        groups = group_by_memory({name: size * together for name, size in sizes.items()}, self.limit)
        by_name = {layer.name: layer for layer in self.layers}
        passes = [[by_name[name] for name in group] for group in groups]
        starts = range(0, len(samples), together)
        chunks = [range(start, min(start + together, len(samples))) for start in starts]
        if len(passes) > 1 or len(chunks) > 1:
            _check_repeatable(samples, len(passes))
            logger.info("memory_limit: %d passes over the data, %d samples together", len(passes), together)
            what = f"{len(passes)} passes over the data" + (f", {together} samples together" if len(chunks) > 1 else "")
            self.fall_back("calibrated in parts to keep within memory_limit", what)
        return Plan(passes, chunks)

    def calibrated(
        self, plan: Plan, samples: Sequence[Batches], ids: Sequence[str]
    ) -> Iterator[tuple[range, list[Layer], list[Calibration]]]:
        """Run the model over the data as planned: samples at hand, layers at hand, what the data gave."""
        counter = _BatchCounter(self.progress, samples, len(plan.passes))
        for chunk in plan.chunks:
            for layers in plan.passes:
                yield chunk, layers, [self._calibrate(samples[s], layers, counter, ids, s) for s in chunk]

    def gather(self, layer: Layer, calibrations: Sequence[Calibration]) -> Gathered:
        """Take a layer's Gram matrices out of the calibrations of some samples."""
        left_alone: dict[int, str] = {}
        for s, calibration in enumerate(calibrations):
            if layer.name in calibration.grams:
                continue
            note = calibration.unsupported.get(layer.name)
            if note is None:
                note = "not reached by the calibration data"
                self.fall_back("left alone, as the calibration data did not reach them", layer.name)
            else:
                self.fall_back("left alone, as they cannot be pruned", f"{layer.name} ({note})")
            left_alone[s] = note
        reached = [s for s in range(len(calibrations)) if s not in left_alone]
        if not reached:
            return Gathered(reached, left_alone, {})
        grams = [calibrations[s].grams.pop(layer.name) for s in reached]
        hessians = grams[0][None] if len(grams) == 1 else torch.stack(grams)
        options = {
            "layer": layer,
            "weight": layer.matrix(layer.weight(self.model).detach()).to(hessians),
            "hessians": hessians,
            "solver": self.solver,
            "block": self.blocks[layer.name],
            "damping": self.damping,
            "zeros": self.zeros[layer.name],
        }
        return Gathered(reached, left_alone, options)

    def note_damping(self, report: LayerReport) -> None:
        """Remember a layer that was damped more than asked for."""
        if report.retries:
            self.fall_back("damped more than asked for", f"{report.name} ({report.damping:g})")

    def warn(self) -> None:
        """Give one warning of everything that was done otherwise than asked."""
        if self.fallbacks:
            parts = [f"{what}: {', '.join(details)}" for what, details in self.fallbacks.items()]
            warnings.warn("; ".join(parts), FallbackWarning, stacklevel=3)

    def fall_back(self, what: str, detail: str) -> None:
        """Remember that something was done otherwise than asked, or raise FallbackError under ``strict``."""
        if self.strict:
            raise FallbackError(f"{what}: {detail}")
        self.fallbacks[what][detail] = None

    def _calibrate(
        self, batches: Batches, layers: Sequence[Layer], progress: Callable[[int], None], ids: Sequence[str], s: int
    ) -> Calibration:
        try:
            return calibrate(self.model, batches, layers, precision=self.precision, progress=progress)
        except (TypeError, ValueError) as error:
            if len(ids) == 1:
                raise
            raise type(error)(f"sample {ids[s]!r}: {error}") from error


def _check_repeatable(samples: Sequence[Batches], passes: int) -> None:
    if passes > 1 and any(isinstance(batches, Iterator) for batches in samples):
        raise ValueError(
            f"batches is an iterator, which can be run over once, but memory_limit asks for {passes} passes; "
            "give something that can be run over again, such as a list or an ImageAugmenter's result"
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


def _all_finite(values: Tensor) -> bool:
    # A value that is not finite makes the sum so, too; the sum reads memory once, and may only overflow besides.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _recordable(sparsity: Sparsity) -> float | str | dict[str, float]:
    if isinstance(sparsity, Mapping):
        return {pattern: float(share) for pattern, share in sparsity.items()}
    return "function" if callable(sparsity) else float(sparsity)


def library_version() -> str:
    """Return the version of this package."""
    try:
        return version("spade_fast")
    except PackageNotFoundError:
        return "unknown"
