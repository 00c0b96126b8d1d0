"""Ladders: each layer of an image pruned to several sparsities, by the package's solvers or by a control."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spade_fast import ImageAugmenter, PruneConfig
from spade_fast.inputs.augment import AugmentedImages
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.config import SOLVERS
from spade_fast.pruning.ladders import LEVELS, Ladder, Level, solve_ladders
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.session import Session
from spade_fast.pruning.solve import LayerReport
from spade_fast.pruning.solve_once import energy

CONTROLS = ("magnitude", "random")
POINTWISE = ("*_expand_conv", "*_project_conv", "_conv_head")  # the 1x1 convolutions of EfficientNets
Ladders = Mapping[str, Ladder]  # by name of the layer


@dataclass(frozen=True)
class Calibration:
    """How a ladder is made.

    Attributes
    ----------
    images, scale, noise, draw
        Number of crops, the range of their share of the image, the noise added to them, and which draw they are.
    layers, block, damping
        Arguments of `spade_fast.trace`.
    """

    images: int = 16
    scale: tuple[float, float] = (0.2, 1.0)
    noise: float = 0.0
    draw: int = 0
    layers: tuple[str, ...] = POINTWISE
    block: int | None = None
    damping: float = 0.01

    def augmenter(self, network: LoadedModel) -> ImageAugmenter:
        """Return what makes the calibration images."""
        return ImageAugmenter(self.images, network.mean, network.std, scale=self.scale, noise=self.noise)

    def augmented(self, network: LoadedModel, image: Tensor, name: str) -> AugmentedImages:
        """Return the calibration images of a sample; its name and the draw seed them."""
        return self.augmenter(network)(image, f"{name}/draw{self.draw}" if self.draw else name)


@dataclass
class Solved:
    """The ladder of each layer, and the seconds of calibrating and solving."""

    ladders: dict[str, Ladder] = field(default_factory=dict)
    seconds: float = 0.0


def make_ladders(
    network: LoadedModel, image: Tensor, name: str, kinds: Iterable[str], calibration: Calibration
) -> dict[str, Solved]:
    """Prune all layers for an image to all of `LEVELS`, from one calibration.

    Parameters
    ----------
    kinds
        Of ``"sparsegpt"`` and ``"exact"`` at most one, which are ladders of traces; and controls: ``"magnitude"`` and
        ``"random"``, with their errors on the calibration data.

    Returns
    -------
    dict
        By kind.
    """
    start = time.perf_counter()
    kinds = set(kinds)
    (solver,) = kinds.intersection(SOLVERS) or {"sparsegpt"}
    config = PruneConfig(
        sparsity=max(LEVELS),
        solver=solver,
        layers=calibration.layers,
        block=calibration.block,
        damping=calibration.damping,
        strict=True,
    )
    session = Session(network.module, config, None)
    samples = [calibration.augmented(network, image, name)]
    found = {kind: Solved() for kind in kinds}
    with session.exact_types():
        plan = session.plan(samples)
        for layers, calibrations in session.calibrated(plan, plan.chunks[0], samples, [name]):
            for layer in layers:
                gram = calibrations[0].grams[layer.name][None]
                for kind in sorted(kinds, key=lambda kind: kind in SOLVERS):  # the solver frees the Gram matrix
                    begin = time.perf_counter()
                    if kind in SOLVERS:
                        ladder = solve_ladders(session, session.gather(layer, calibrations), LEVELS).ladders[0]
                    else:
                        ladder = control_ladder(kind, layer, network.module, name, gram)
                    found[kind].ladders[layer.name] = ladder
                    found[kind].seconds += time.perf_counter() - begin
    calibrating = time.perf_counter() - start - sum(one.seconds for one in found.values())
    for one in found.values():
        one.seconds += calibrating
    return found


def control_ladder(kind: str, layer: Layer, module: nn.Module, seed: str, gram: Tensor) -> Ladder:
    """Remove a layer's smallest weights, or random ones, and measure the error on a Gram matrix ``[1, G, C, C]``."""
    weight = layer.weight(module).detach()
    dense = layer.matrix(weight).to(gram)
    whole = float(energy(dense, gram))
    order = _removal_scores(kind, layer, weight, seed).flatten().argsort(stable=True)
    ladder = [Level(_report(kind, layer, 0.0, 0, 0.0), None)]
    for sparsity in LEVELS:
        removed = round(sparsity * layer.numel)
        left = weight.clone().flatten()
        left[order[:removed]] = 0
        left = left.view(layer.shape)
        change = float(energy(layer.matrix(left).to(gram) - dense, gram))
        error = math.sqrt(max(0.0, change) / whole) if whole > 0 else 0.0
        ladder.append(Level(_report(kind, layer, sparsity, removed, error), PrunedLayer.from_dense(layer, left)))
    return ladder


def _removal_scores(kind: str, layer: Layer, weight: Tensor, seed: str) -> Tensor:
    """Return what orders the removal of weights, the smallest first; for magnitude Han et al., NeurIPS 2015."""
    if kind == "magnitude":
        return weight.abs()
    digest = hashlib.blake2b(f"{seed}/{layer.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.rand(weight.shape, generator=generator)


def _report(kind: str, layer: Layer, sparsity: float, removed: int, error: float) -> LayerReport:
    return LayerReport(layer.name, layer.shape, sparsity, removed / layer.numel, removed, kind, 1, measured_error=error)
