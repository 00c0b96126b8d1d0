"""State of one call that traces or tunes: checks against the model, passes over the data, and fallbacks to report."""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import FallbackError, FallbackWarning, InvalidTypeError, InvalidValueError
from spade_fast._util.modes import without_autocast
from spade_fast._util.progress import Progress, no_progress
from spade_fast.pruning.calibration import Batches, Calibration, calibrate, device_of, gram_bytes, split_batches
from spade_fast.pruning.config import AUTO, PruneConfig, sparsity_by_layer
from spade_fast.pruning.counts import count_zeros
from spade_fast.pruning.dense_weights import DenseWeight
from spade_fast.pruning.exchange import weights_held
from spade_fast.pruning.goals import naming
from spade_fast.pruning.layers import Layer, find_layers
from spade_fast.pruning.memory_plan import group_by_memory, samples_per_solve
from spade_fast.pruning.module_kinds import check_parameters, original_module
from spade_fast.pruning.solve import LayerReport, check_block, default_block

if TYPE_CHECKING:
    from spade_fast.pruning.compiled_network import CompiledNetwork

logger = logging.getLogger("spade_fast")


@dataclass(frozen=True)
class Plan:
    """The layers calibrated in each pass over the data, the samples solved together, and the counter of batches."""

    passes: list[list[Layer]]
    chunks: list[range]
    counter: Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """The input of the solver for one layer and the samples whose data reached the same experts, or all groups.

    Attributes
    ----------
    layer
        The layer.
    samples
        Indices of the samples.
    experts
        Groups of the layer that are solved; the others stay dense.
    dense : Tensor ``[G, R, C]``
        The weight.
    options
        Arguments of :func:`spade_fast.pruning.solve.solve_layer` except the sparsity and what the solver decides.
    """

    layer: Layer
    samples: list[int]
    experts: tuple[int, ...]
    dense: Tensor
    options: dict[str, Any]

    def whole(self, solution: Tensor, report: LayerReport) -> tuple[Tensor, LayerReport]:
        """Return the solution and the report of all groups, given those of the groups that were solved."""
        if len(self.experts) == self.layer.groups:
            return solution, report
        every = self.dense.clone()
        every[list(self.experts)] = solution
        reached = 1 - int(every.count_nonzero()) / self.layer.numel
        return every, replace(report, shape=self.layer.shape, reached=reached)


@dataclass(frozen=True)
class Gathered:
    """A layer, what of it is solved together, and for each sample that is left out, why it cannot be pruned.

    Samples that do not use a bare parameter are neither in a part nor left out: for them it is not a layer.
    """

    layer: Layer
    parts: list[Part]
    skipped: dict[int, str]


class Session:
    """A configuration checked against a model, the layers to prune, and the fallbacks so far.

    Attributes
    ----------
    layers : list of Layer
        Layers that can be pruned and have a sparsity above 0.
    auto
        Whether sparsities are to be found automatically.
    sparsity
        By layer name: share of weights to remove (1 for all with automatic sparsity).
    order
        Names of all requested weights, those that cannot be pruned last.
    skipped
        Reports of the requested weights that cannot be pruned, if their use by the model cannot be observed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        progress: Progress | None,
        compiled: CompiledNetwork | None = None,
    ) -> None:
        self.model, self.config = original_module(model), config
        self.progress = progress or no_progress
        self._compiled = compiled if compiled is not None else compiled_network(config)
        self._fallbacks: dict[str, dict[str, None]] = defaultdict(dict)

        every, every_dense = find_layers(self.model)
        found, dense = (every, every_dense) if config.layers is None else find_layers(self.model, config.layers)
        self.order = names = [*(layer.name for layer in found), *dense]
        every_name = [*(layer.name for layer in every), *every_dense]
        self.auto = config.sparsity == AUTO
        given = 1.0 if self.auto else config.sparsity
        self.sparsity = sparsity_by_layer(given, names, every_name)
        asked = any(self.sparsity.values()) if names else config.sparsity != 0
        if asked and not every and all(weight.kind for weight in every_dense.values()):
            raise InvalidValueError(_nothing_to_prune(self.model, every_dense.values()))
        self.layers = [layer for layer in found if self.sparsity[layer.name] > 0]
        for layer in self.layers:
            if layer.bare:
                continue
            check_block(layer, self._block(layer))
            dtype = layer.weight(self.model).dtype
            if config.precision == "bf16" and dtype != torch.float32:
                raise InvalidValueError(f"precision='bf16' needs float32 weights, but layer {layer.name!r} has {dtype}")
        with weights_held(self.model):
            check_parameters(self.model)
            weights = {layer: self._checked_weight(layer) for layer in self.layers}
            self._zeros = {layer: count_zeros(layer.matrix(weights[layer])) for layer in self.layers if not layer.bare}
        self._dense = {name: weight for name, weight in dense.items() if self.sparsity[name] > 0}
        self._watched = {name: weight.parameter for name, weight in self._dense.items() if weight.parameter is not None}
        self.skipped = {name: self.dense_report(name) for name in self._dense if name not in self._watched}
        for name in self.skipped:
            self._fall_back_to_dense(name)

    def with_solver(self, solver: str, progress: Progress | None) -> Session:
        """Return a session for the same layers with another solver; both record their fallbacks in one place."""
        other = copy.copy(self)
        other.config, other.progress = replace(self.config, solver=solver), progress or no_progress
        other.skipped = {name: other.dense_report(name) for name in self.skipped}
        return other

    def solver_options(self, layer: Layer) -> dict[str, Any]:
        """Return the arguments of :func:`spade_fast.pruning.solve.solve_layer` that say how a layer is solved."""
        config = self.config
        return {"solver": config.solver, "block": self._block(layer), "damping": config.damping}

    @property
    def _memory_limit(self) -> int | None:
        limit = self.config.memory_limit
        assert not isinstance(limit, str)  # the configuration holds bytes
        return limit

    def _block(self, layer: Layer) -> int:
        return default_block(layer, self.config.solver) if self.config.block is None else self.config.block

    @contextmanager
    def exact_types(self) -> Iterator[None]:
        """Disable the caller's autocast, and keep traces from being applied to the model, during a ``with`` block."""
        with weights_held(self.model), without_autocast(device_of(self.model)):
            yield

    def plan(self, samples: Sequence[Batches]) -> Plan:
        """Divide the work so that the Gram matrices held at the same time stay within the memory limit."""
        limit = self._memory_limit
        sizes = {layer.name: gram_bytes(layer, self.model) for layer in self.layers}
        if limit is not None:  # a bare parameter that does not fit need not be a layer
            sizes.update((layer.name, min(sizes[layer.name], limit)) for layer in self.layers if layer.bare)
        together = samples_per_solve(sizes, limit, len(samples))
        groups = group_by_memory({name: size * together for name, size in sizes.items()}, limit)
        by_name = {layer.name: layer for layer in self.layers}
        passes = [[by_name[name] for name in group] for group in groups]
        if not passes and self._watched:
            passes = [[]]
        starts = range(0, len(samples), together)
        chunks = [range(start, min(start + together, len(samples))) for start in starts]
        if len(passes) > 1 or len(chunks) > 1:
            _check_repeatable(samples, len(passes))
            logger.info("memory_limit: %d passes over the data, %d samples per solve", len(passes), together)
            what = f"{len(passes)} passes over the data"
            if len(chunks) > 1:
                what += f", {together} samples per solve"
            self.fall_back("calibrated in parts to stay within memory_limit", what)
        return Plan(passes, chunks, _BatchCounter(self.progress, samples, len(passes)))

    def calibrated(
        self, plan: Plan, chunk: range, samples: Sequence[Batches], ids: Sequence[str]
    ) -> Iterator[tuple[list[Layer], list[Calibration]]]:
        """Run the model over the data of some samples as planned; yield the layers and calibrations of each pass."""
        for layers in plan.passes:
            calibrations = [self._calibrate(samples[s], layers, plan.counter, ids, s) for s in chunk]
            for calibration in calibrations:
                for name in calibration.used:
                    self._fall_back_to_dense(name)
            yield layers, calibrations

    def gather(self, layer: Layer, calibrations: Sequence[Calibration]) -> Gathered:
        """Take a layer's Gram matrices out of the calibrations of some samples."""
        used = [calibration.layers[layer.name] for calibration in calibrations if layer.name in calibration.layers]
        layer = used[0] if used else layer
        skipped: dict[int, str] = {}
        reached: dict[tuple[int, ...], list[int]] = defaultdict(list)  # samples by the experts that their data reached
        for s, calibration in enumerate(calibrations):
            note = calibration.unsupported.get(layer.name)
            if calibration.layers.get(layer.name, layer) != layer:
                note = "its weight is used in another way than for other samples"
            if note is not None:
                self.fall_back("skipped because they cannot be pruned", f"{layer.name} ({note})")
                skipped[s] = note
                continue
            experts = _reached_experts(layer, calibration)
            if experts:
                reached[experts].append(s)
            elif not layer.bare:
                skipped[s] = "not reached by the calibration data"
            missing = layer.groups - len(experts)
            if missing and (experts or not layer.bare):
                detail = f" ({missing} of {layer.groups} {'experts' if layer.bare else 'parts'})" if experts else ""
                self.fall_back("skipped because the calibration data did not reach them", f"{layer.name}{detail}")
        parts = [self._part(layer, calibrations, samples, experts) for experts, samples in reached.items()]
        return Gathered(layer, parts, skipped)

    def _part(
        self, layer: Layer, calibrations: Sequence[Calibration], samples: list[int], experts: tuple[int, ...]
    ) -> Part:
        grams = [calibrations[s].grams.pop(layer.name) for s in samples]
        hessians = grams[0][None] if len(grams) == 1 else torch.stack(grams)
        dense = layer.matrix(layer.weight(self.model).detach()).to(hessians)
        zeros = self._zeros.get(layer)
        own, weight = layer, dense
        if len(experts) < layer.groups:
            chosen = torch.tensor(experts, device=hessians.device)
            hessians, weight, zeros = hessians[:, chosen], dense[chosen], None
            own = replace(layer, groups=len(experts), shape=tuple(weight.shape))
        options = {"layer": own, "weight": weight, "hessians": hessians, "zeros": zeros}
        return Part(layer, samples, experts, dense, options)

    def _checked_weight(self, layer: Layer) -> Tensor:
        weight = layer.weight(self.model).detach()
        if layer.computed(self.model) is not None and not bool(torch.isfinite(weight).all()):
            raise InvalidValueError(
                f"the weight of layer {layer.name!r}, computed from other parameters, has NaN or infinite values"
            )
        return weight

    def dense_report(self, name: str) -> LayerReport:
        """Return the report of a requested weight that stays dense because it cannot be pruned."""
        weight = self._dense[name]
        zeros = 0.0
        if weight.parameter is not None:
            zeros = 1 - int(weight.parameter.count_nonzero()) / weight.parameter.numel()
        sparsity = 0.0 if self.auto else self.sparsity[name]
        return LayerReport(name, weight.shape, sparsity, zeros, 0, self.config.solver, 0, note=weight.reason)

    def dense_layer_report(self, layer: Layer, note: str = "") -> LayerReport:
        """Return the report of a layer that stays dense: for the reason in `note`, or since its sparsity is 0."""
        sparsity = self.sparsity[layer.name] if note and not self.auto else 0.0
        zeros = 1 - int(layer.weight(self.model).count_nonzero()) / layer.numel
        solver, block = self.config.solver, self._block(layer)
        return LayerReport(layer.name, layer.shape, sparsity, zeros, 0, solver, block, note=note)

    def note_damping(self, report: LayerReport) -> None:
        """Record a layer that needed more damping than requested."""
        if report.retries:
            self.fall_back("damped more than requested", f"{report.name} ({report.damping:g})")

    def warn(self) -> None:
        """Issue one warning that lists all fallbacks."""
        if self._fallbacks:
            parts = [f"{what}: {', '.join(details)}" for what, details in self._fallbacks.items()]
            warnings.warn("; ".join(parts), FallbackWarning, stacklevel=3)

    def fall_back(self, what: str, detail: str) -> None:
        """Record that something could not be done as requested, or raise FallbackError with ``strict``."""
        if self.config.strict:
            raise FallbackError(f"{what}: {detail}; only strict=False allows this")
        self._fallbacks[what][detail] = None

    def _fall_back_to_dense(self, name: str) -> None:
        self.fall_back("skipped because they cannot be pruned", f"{name} ({self._dense[name].reason})")

    def _calibrate(
        self, batches: Batches, layers: Sequence[Layer], progress: Callable[[int], None], ids: Sequence[str], s: int
    ) -> Calibration:
        precision = self.config.precision
        if self._compiled is not None:
            self._compiled.prepare(self.model, self.layers)
        with naming_sample(ids, s):
            return calibrate(
                self.model,
                batches,
                layers,
                watched=self._watched,
                precision=precision,
                memory_limit=self._memory_limit,
                progress=progress,
                compiled=self._compiled,
            )


def compiled_network(config: PruneConfig) -> CompiledNetwork | None:
    """Return what keeps the compiled network for all samples, if the configuration asks for one."""
    if not config.compile:
        return None
    from spade_fast.pruning.compiled_network import CompiledNetwork  # registers an op, which others need not

    return CompiledNetwork(config.precision)


def naming_sample(ids: Sequence[str], s: int) -> AbstractContextManager[None]:
    """Name the sample in the errors about its data that a ``with`` block raises, if there are several samples."""
    return naming(ids[s]) if len(ids) > 1 else nullcontext()


def _reached_experts(layer: Layer, calibration: Calibration) -> tuple[int, ...]:
    """Return the groups that are solved: all of a layer that the data reached, or the experts that they reached."""
    gram = calibration.grams.get(layer.name)
    if gram is None:
        return ()
    if not layer.experts:
        return tuple(range(layer.groups))
    return tuple(gram.diagonal(dim1=1, dim2=2).any(1).nonzero().flatten().tolist())


def _check_repeatable(samples: Sequence[Batches], passes: int) -> None:
    if passes > 1 and any(isinstance(batches, Iterator) for batches in samples):
        raise InvalidValueError(
            f"batches is an iterator, which can be read only once, but memory_limit requires {passes} passes; "
            "give something that can be iterated repeatedly, such as a list or the result of an ImageAugmenter"
        )


class _BatchCounter:
    """Reports the number of batches done over all samples and passes."""

    def __init__(self, progress: Progress, samples: Sequence[Batches], passes: int) -> None:
        self.progress, self.done = progress, 0
        lengths = [operator.length_hint(split_batches(batches)) for batches in samples]
        self.total = sum(lengths) * passes if all(lengths) else 0

    def __call__(self, images: int) -> None:
        self.done += 1
        self.progress("calibrate", self.done, self.total)


def _nothing_to_prune(model: nn.Module, dense: Iterable[DenseWeight]) -> str:
    kinds = sorted({weight.kind for weight in dense})
    message = f"{type(model).__name__} has no layer that can be pruned; "
    message += f"its weights belong to: {', '.join(kinds)}" if kinds else "it has no weights"
    if any(kind.startswith("quantised") for kind in kinds):
        message += ". Pass the model as it was before quantisation"
    return message


def per_sample(name: str, given: Sequence[Any] | None, default: Sequence[Any]) -> list[Any]:
    """Return what is given for each sample, or the default; TypeError or ValueError unless it is one entry for each."""
    one = isinstance(given, str | bytes) or getattr(given, "ndim", None) == 0
    if given is not None and (one or not isinstance(given, Iterable)):
        raise InvalidTypeError(f"{name} must have one entry for each of the samples, got {given!r}")
    entries = list(default if given is None else given)
    if len(entries) != len(default):
        what = "name" if name == "sample_ids" else "entry"
        raise InvalidValueError(
            f"{name} must have one {what} for each of the {len(default)} samples, got {len(entries)}"
        )
    return entries
