"""The networks that are compared on a case: its traces, and controls from which equally many weights are removed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spade_fast import ImageAugmenter, PruneConfig
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.session import Session
from spade_fast.pruning.tuning import Candidates, solve_candidates

LAYERS = ("*_expand_conv", "*_project_conv", "_conv_head")  # the 1x1 convolutions
EQUAL = 0.5  # the sparsity of the comparison at equal sparsity
Sparsity = float | Mapping[str, float]
Scores = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Calibration:
    """How traces are made: the augmentations, and arguments of `spade_fast.trace`."""

    augmentations: int = 32
    scale: tuple[float, float] = (0.2, 1.0)
    layers: Sequence[str] = LAYERS
    block: int | None = None
    damping: float = 0.01

    def augmented(self, network: LoadedModel, image: Tensor, name: str):
        """Return the calibration images of a sample; its name seeds them."""
        augmenter = ImageAugmenter(self.augmentations, network.mean, network.std, scale=self.scale)
        return augmenter(image, name)


def solve(
    network: LoadedModel, image: Tensor, name: str, solver: str, shares: Sequence[float], calibration: Calibration
) -> Candidates:
    """Prune all layers for an image to each of the shares, from one calibration."""
    config = PruneConfig(
        sparsity=max(shares),
        solver=solver,
        layers=calibration.layers,
        block=calibration.block,
        damping=calibration.damping,
        strict=True,
    )
    session = Session(network.module, config, None)
    (weights,) = solve_candidates(session, [calibration.augmented(network, image, name)], sorted(set(shares) - {0.0}))
    return weights


def shares_of(sparsity: Sparsity) -> list[float]:
    """Return the shares that occur in a sparsity."""
    return sorted(set(sparsity.values())) if isinstance(sparsity, Mapping) else [sparsity]


def share_of(sparsity: Sparsity, layer: str) -> float:
    """Return the share of a layer."""
    return sparsity.get(layer, 0.0) if isinstance(sparsity, Mapping) else sparsity


def chosen(weights: Candidates, sparsity: Sparsity) -> list[PrunedLayer]:
    """Return the weights at a sparsity: one share, or one per layer."""
    shares = {name: share_of(sparsity, name) for name in weights}
    return [weights[name][share] for name, share in shares.items() if share > 0]


def magnitude(module: nn.Module, sparsity: Sparsity, layers: Sequence[str] = LAYERS) -> list[PrunedLayer]:
    """Remove each layer's smallest weights (Han et al., Learning both Weights and Connections, NeurIPS 2015)."""
    return _remove_lowest(module, sparsity, layers, lambda name, weight: weight.abs())


def at_random(module: nn.Module, sparsity: Sparsity, seed: str, layers: Sequence[str] = LAYERS) -> list[PrunedLayer]:
    """Remove weights of each layer at random."""

    def scores(name: str, weight: Tensor) -> Tensor:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        return torch.rand(weight.shape, generator=generator)

    return _remove_lowest(module, sparsity, layers, scores)


def _remove_lowest(module: nn.Module, sparsity: Sparsity, layers: Sequence[str], scores: Scores) -> list[PrunedLayer]:
    pruned = []
    for layer in find_layers(module, list(layers))[0]:
        weight = layer.weight(module).detach().clone().flatten()
        order = scores(layer.name, weight).argsort(stable=True)
        weight[order[: round(share_of(sparsity, layer.name) * len(order))]] = 0
        pruned.append(PrunedLayer.from_dense(layer, weight.view(layer.shape)))
    return pruned
