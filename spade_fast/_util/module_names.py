"""Names of modules: finding a module by its name, and names in compiled networks."""

from __future__ import annotations

from torch import nn

from spade_fast._util.checks import nearest
from spade_fast._util.errors import InvalidValueError

_LAYERS_NAMED = 5  # in messages


def named_module(model: nn.Module, layer: str) -> nn.Module:
    """Return the module of this name, :func:`uncompiled` or not.

    Raises
    ------
    ValueError
        There is none; the message names similar ones, or some with weights.
    """
    modules = {uncompiled(name): module for name, module in model.named_modules()}
    if uncompiled(layer) in modules:
        return modules[uncompiled(layer)]
    near = nearest(layer, filter(None, modules))
    weighted = [
        name for name, one in modules.items() if name and any(own.dim() > 1 for own in one.parameters(recurse=False))
    ]
    hint = ""
    if near:
        hint = f": did you mean {' or '.join(map(repr, near))}?"
    elif weighted:
        hint = f": it has, for example, {', '.join(weighted[:: -(-len(weighted) // _LAYERS_NAMED)])}"
    raise InvalidValueError(f"the model has no layer {layer!r}{hint}")


def uncompiled(name: str) -> str:
    """Return the name that a module or parameter has if no submodule is compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
