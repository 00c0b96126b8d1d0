"""What the commands and batches prune, and from how many images, where nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from spade_fast.pruning.config import PruneConfig
from spade_fast.pruning.layers import find_layers

# Traces of the demo network kept its decision on photos of the demo package up to about these sparsities, if its narrow
# layers (depthwise ones above all, where an output has 9 or 25 weights) were skipped.
_SPARSITY = {"exact": 0.8, "sparsegpt": 0.6}
_LEAST_COLUMNS = 100
# More did not help localisation (docs/evidence.md): 16 to 512 gave the same within the noise.
AUGMENTATIONS = 64


def fill_defaults(config: PruneConfig, model: nn.Module) -> PruneConfig:
    """Return a configuration with the defaults of its solver and of a model where it has None for sparsity or layers.

    The layers are those that a mapping of sparsities names, or else the wide ones (:func:`wide_layers`).
    """
    layers, sparsity = config.layers, config.sparsity
    if layers is None and not isinstance(sparsity, Mapping):
        layers = wide_layers(model)
    return replace(config, layers=layers, sparsity=_SPARSITY[config.solver] if sparsity is None else sparsity)


def wide_layers(model: nn.Module) -> list[str] | None:
    """Return the names of the layers with at least 100 weights per output; None if there are none."""
    return [layer.name for layer in find_layers(model)[0] if layer.columns >= _LEAST_COLUMNS] or None
