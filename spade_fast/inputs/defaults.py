"""Defaults of the commands and batches: layers, sparsity and number of calibration images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from spade_fast.pruning.config import PruneConfig
from spade_fast.pruning.layers import find_layers

_LEAST_COLUMNS = 100
# More images do not improve localisation (docs/evidence.md): 16 to 512 gave the same result within the noise.
AUGMENTATIONS = 64


def fill_defaults(config: PruneConfig, model: nn.Module) -> PruneConfig:
    """Replace None for the layers in a configuration by the defaults of the model.

    The default layers are all layers if `sparsity` is a mapping, which then selects among them, and otherwise the wide
    ones (:func:`wide_layers`).
    """
    if config.layers is not None or isinstance(config.sparsity, Mapping):
        return config
    return replace(config, layers=wide_layers(model))


def wide_layers(model: nn.Module) -> list[str] | None:
    """Return the names of the layers with at least 100 weights per output, or None if there are none.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.inputs import wide_layers
    >>> wide_layers(torch.nn.Sequential(torch.nn.Linear(128, 16), torch.nn.Linear(16, 10)))
    ['0']
    """
    return [layer.name for layer in find_layers(model)[0] if layer.columns >= _LEAST_COLUMNS] or None
