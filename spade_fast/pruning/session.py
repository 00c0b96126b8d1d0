"""One call that calibrates and solves: its checked model, its passes over the data, and what was done otherwise."""

from __future__ import annotations

import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import FallbackError, FallbackWarning, InvalidTypeError, InvalidValueError
from spade_fast._util.progress import Progress, no_progress
from spade_fast.pruning.calibration import Batches, Calibration, calibrate, gram_bytes, split_batches
from spade_fast.pruning.config import PruneConfig, sparsity_by_layer
from spade_fast.pruning.counts import count_zeros
from spade_fast.pruning.layers import Layer, find_layers
from spade_fast.pruning.memory_plan import group_by_memory, samples_per_solve
from spade_fast.pruning.solve import LayerReport, check_block, default_block

logger = logging.getLogger("spade_fast")


@dataclass(frozen=True)
class Plan:
    """Layers that are calibrated in each pass over the data, and samples that are solved together."""

    passes: list[list[Layer]]
    chunks: list[range]


@dataclass(frozen=True)
class Gathered:
    """What one layer of some samples needs to be solved.

    Attributes
    ----------
    reached
        Indices of the samples whose data reached the layer.
    skipped
        Why the layer cannot be pruned for each of the others.
    options
        Arguments of :func:`spade_fast.pruning.solve.solve_layer`, all but the sparsity; empty if no sample reached it.
    """

    reached: list[int]
    skipped: dict[int, str]
    options: dict[str, Any]


class Session:
    """A configuration checked against a model, the layers to prune, and the fallbacks so far.

    Attributes
    ----------
    layers : list of Layer
        Those with a sparsity above 0 that can be pruned.
    sparsity, blocks, zeros
        Of each layer, by name: share to remove, neighbouring columns removed together, zero weights of its columns.
    skipped
        Reports of the layers that were asked for but cannot be pruned.
    """

    def __init__(self, model: nn.Module, config: PruneConfig, progress: Progress | None) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.config = model, config
        self.progress = progress or no_progress
        self._fallbacks: dict[str, dict[str, None]] = defaultdict(dict)

        found, unsupported = find_layers(model, config.layers)
        every, every_unsupported = find_layers(model)
        names = [layer.name for layer in found] + list(unsupported)
        every_name = [layer.name for layer in every] + list(every_unsupported)
        self.sparsity = sparsity_by_layer(config.sparsity, names, every_name)
        self.layers = [layer for layer in found if self.sparsity[layer.name] > 0]
        self.blocks = {
            layer.name: default_block(layer, config.solver) if config.block is None else config.block
            for layer in self.layers
        }
        for layer in self.layers:
            check_block(layer, self.blocks[layer.name])
            dtype = layer.weight(model).dtype
            if config.precision == "bf16" and dtype != torch.float32:
                raise InvalidValueError(f"precision='bf16' needs float32 weights, but layer {layer.name!r} has {dtype}")
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise InvalidValueError(f"parameter {name!r} is on the meta device: it has no values")
            if not _all_finite(parameter.detach()):
                raise InvalidValueError(f"parameter {name!r} of the model has NaN or infinite values")
        self.zeros = {layer.name: count_zeros(layer.matrix(layer.weight(model).detach())) for layer in self.layers}
        self.skipped = {}
        for name, reason in unsupported.items():
            share = self.sparsity[name]
            if share > 0:
                self.fall_back("skipped, as they cannot be pruned", f"{name} ({reason})")
                self.skipped[name] = LayerReport(name, (), share, 0.0, 0, config.solver, 0, note=reason)

    def exact_types(self) -> AbstractContextManager[None]:
        """Return a ``with`` block in which the caller's autocast changes nothing."""
        return torch.autocast(next(self.model.parameters()).device.type, enabled=False)

    def plan(self, samples: Sequence[Batches]) -> Plan:
        """Divide the work so that the Gram matrices held at the same time keep within the memory limit."""
        limit = self.config.memory_bytes
        sizes = {layer.name: gram_bytes(layer, self.model) for layer in self.layers}
        together = samples_per_solve(sizes, limit, len(samples))
        groups = group_by_memory({name: size * together for name, size in sizes.items()}, limit)
        by_name = {layer.name: layer for layer in self.layers}
        passes = [[by_name[name] for name in group] for group in groups]
        starts = range(0, len(samples), together)
        chunks = [range(start, min(start + together, len(samples))) for start in starts]
        if len(passes) > 1 or len(chunks) > 1:
            _check_repeatable(samples, len(passes))
            logger.info("memory_limit: %d passes over the data, %d samples per solve", len(passes), together)
            what = f"{len(passes)} passes over the data"
            if len(chunks) > 1:
                what += f", {together} samples per solve"
            self.fall_back("calibrated in parts to keep within memory_limit", what)
        return Plan(passes, chunks)

    def calibrated(
        self, plan: Plan, samples: Sequence[Batches], ids: Sequence[str]
    ) -> Iterator[tuple[range, list[Layer], list[Calibration]]]:
        """Run the model over the data as planned; yield the samples and layers at hand and what the data gave."""
        counter = _BatchCounter(self.progress, samples, len(plan.passes))
        for chunk in plan.chunks:
            for layers in plan.passes:
                yield chunk, layers, [self._calibrate(samples[s], layers, counter, ids, s) for s in chunk]

    def gather(self, layer: Layer, calibrations: Sequence[Calibration]) -> Gathered:
        """Take a layer's Gram matrices out of the calibrations of some samples."""
        skipped: dict[int, str] = {}
        for s, calibration in enumerate(calibrations):
            if layer.name in calibration.grams:
                continue
            note = calibration.unsupported.get(layer.name)
            if note is None:
                note = "not reached by the calibration data"
                self.fall_back("skipped, as the calibration data did not reach them", layer.name)
            else:
                self.fall_back("skipped, as they cannot be pruned", f"{layer.name} ({note})")
            skipped[s] = note
        reached = [s for s in range(len(calibrations)) if s not in skipped]
        if not reached:
            return Gathered(reached, skipped, {})
        grams = [calibrations[s].grams.pop(layer.name) for s in reached]
        hessians = grams[0][None] if len(grams) == 1 else torch.stack(grams)
        options = {
            "layer": layer,
            "weight": layer.matrix(layer.weight(self.model).detach()).to(hessians),
            "hessians": hessians,
            "solver": self.config.solver,
            "block": self.blocks[layer.name],
            "damping": self.config.damping,
            "zeros": self.zeros[layer.name],
        }
        return Gathered(reached, skipped, options)

    def note_damping(self, report: LayerReport) -> None:
        """Remember a layer that was damped more than asked for."""
        if report.retries:
            self.fall_back("damped more than asked for", f"{report.name} ({report.damping:g})")

    def warn(self) -> None:
        """Give one warning of everything that was done otherwise than asked."""
        if self._fallbacks:
            parts = [f"{what}: {', '.join(details)}" for what, details in self._fallbacks.items()]
            warnings.warn("; ".join(parts), FallbackWarning, stacklevel=3)

    def fall_back(self, what: str, detail: str) -> None:
        """Remember that something was done otherwise than asked, or raise FallbackError under ``strict``."""
        if self.config.strict:
            raise FallbackError(f"{what}: {detail}")
        self._fallbacks[what][detail] = None

    def _calibrate(
        self, batches: Batches, layers: Sequence[Layer], progress: Callable[[int], None], ids: Sequence[str], s: int
    ) -> Calibration:
        try:
            return calibrate(self.model, batches, layers, precision=self.config.precision, progress=progress)
        except (TypeError, ValueError) as error:
            if len(ids) == 1:
                raise
            raise type(error)(f"sample {ids[s]!r}: {error}") from error


def _check_repeatable(samples: Sequence[Batches], passes: int) -> None:
    if passes > 1 and any(isinstance(batches, Iterator) for batches in samples):
        raise InvalidValueError(
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
    # A value that is not finite makes the sum so, too; a sum that only overflows is checked again.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
