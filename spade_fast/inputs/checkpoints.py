"""Files of weights: which of their tensors belong to a network, and what differs if they do not fit it."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.files import read_bytes
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast._util.text import first_line, listed

_COMPILED = "_orig_mod."  # torch.compile puts it into names


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a file of weights into a new network, which is of no use after an error.

    The file is a state dict in PyTorch's format or a ``.safetensors`` file. A checkpoint that holds one state dict
    among other things, under whatever key, is understood, and so is a prefix that all names have in addition, such as
    ``module.`` of `torch.nn.DataParallel`.

    Raises
    ------
    ValueError
        The file holds something else, or the names or shapes differ from the network's; the first of them are named.
    FileNotFoundError, OSError
        The file does not exist or cannot be read.
    """
    own = module.state_dict()
    try:
        given = _renamed(_state_dict(path), own)
        _check_shapes(given, own)
        # Some modules translate the names of older versions while they load: only loading tells which are missing.
        result = module.load_state_dict(given, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(_differences({"missing": result.missing_keys, "unexpected": result.unexpected_keys}))
    except (ValueError, RuntimeError) as error:
        raise InvalidValueError(f"{path} does not contain weights of {type(module).__name__}: {error}") from error


def _check_shapes(given: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    shapes = [
        f"{name} is {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and isinstance(tensor, Tensor) and given[name].shape != tensor.shape
    ]
    if shapes:
        raise ValueError(_differences({"of another shape": shapes}))


def _state_dict(path: Path) -> dict[str, Tensor]:
    contents = read_bytes(path)
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_safetensors(contents)
        else:
            loaded = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        if is_out_of_memory(error):
            raise
        raise ValueError(_reason(error)) from error
    if _is_state_dict(loaded):
        return loaded
    found = {key: part for key, part in loaded.items() if _is_state_dict(part)} if isinstance(loaded, Mapping) else {}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        keys = ", ".join(map(repr, found))
        raise ValueError(f"it holds several sets of weights ({keys}); save the one to load by itself")
    held = f"a dict with {listed(list(map(repr, loaded)))}" if isinstance(loaded, Mapping) else type(loaded).__name__
    raise ValueError(f"it holds {held}; save model.state_dict()")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _renamed(given: Mapping[str, Tensor], own: Collection[str]) -> Mapping[str, Tensor]:
    """Take away what wrappers of the network added to all names, if that makes them names of the network."""
    found = OrderedDict((name.replace(_COMPILED, ""), tensor) for name, tensor in given.items())
    dropped = ""
    while not any(name in own for name in found):
        prefix = next(iter(found)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in found):
            return given
        found, dropped = OrderedDict((name.removeprefix(prefix), one) for name, one in found.items()), dropped + prefix
    # Versions of modules, by their names, which torch keeps beside the tensors; a wrapper's own come before.
    versions = getattr(given, "_metadata", {}).items()
    own_names = {f"{name}.".replace(_COMPILED, "").removeprefix(dropped).rstrip("."): one for name, one in versions}
    vars(found)["_metadata"] = own_names or None
    return found


def _differences(found: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in found.items() if names)


def _reason(error: Exception) -> str:
    pickled = re.search(r"GLOBAL (\S+)", str(error))
    if pickled:
        return f"it holds a pickled {pickled[1]}, whose loading would run code; save model.state_dict() alone"
    if isinstance(error, UnpicklingError):
        return "it is damaged, or not a file of torch.save"
    return first_line(error)
