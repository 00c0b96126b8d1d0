"""Stages of a search for sparsities: which layers share one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from spade_fast._util.checks import nearest
from spade_fast._util.errors import InvalidValueError
from spade_fast.pruning.config import AUTO
from spade_fast.pruning.layers import Layer, find_layers, match_names

Stages = str | Mapping[str, str | Sequence[str]]


def group_layers(model: nn.Module, layers: Sequence[Layer], stages: Stages) -> dict[str, list[str]]:
    """Return the names of the layers of each stage, the stage with the last layer first; see :func:`tune`."""
    names = [layer.name for layer in layers]
    if isinstance(stages, Mapping):
        pairs = [
            (stage, pattern)
            for stage, patterns in stages.items()
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]
        first = match_names([pattern for _, pattern in pairs], names)
        stage_of = {name: str(pairs[index][0]) for name, index in first.items()}
    elif stages == "layers":
        stage_of = {name: name for name in names}
    else:
        every = [layer.parameter for layer in find_layers(model)[0]]
        stage_of = {layer.name: _block_of(model, layer, every) for layer in layers}
    grouped: dict[str, list[str]] = {}
    for name in reversed(names):
        if name in stage_of:
            grouped.setdefault(stage_of[name], []).insert(0, name)
    return grouped


def check_stages(stages: Stages) -> Stages:
    """Return `stages`, or raise ValueError unless it is a mapping or one of the words that :func:`tune` knows."""
    words = (AUTO, "blocks", "layers")
    if not isinstance(stages, Mapping) and stages not in words:
        near = nearest(str(stages), words)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise InvalidValueError(
            f"stages must be 'auto', 'blocks', 'layers' or a mapping of names to patterns, got {stages!r}{hint}"
        )
    return stages


def _block_of(model: nn.Module, layer: Layer, every: Sequence[str]) -> str:
    """Return the name of the outermost non-container module that contains a layer, but not `every` layer."""
    path = layer.parameter.split(".")[:-1]
    for depth in range(1, len(path)):
        prefix = ".".join(path[:depth])
        plain = isinstance(model.get_submodule(prefix), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if not plain and not all(parameter.startswith(f"{prefix}.") for parameter in every):
            return prefix
    return ".".join(path) or layer.name
