"""Finds the weights of a model that are known not to be layers, such as embeddings, and counts all weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spade_fast._util.module_names import uncompiled
from spade_fast.pruning.computed_weights import computed_weights
from spade_fast.pruning.module_kinds import named_parameters

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that can be pruned


@dataclass(frozen=True)
class DenseWeight:
    """A weight of two or more dimensions that cannot be pruned.

    Attributes
    ----------
    name
        Name of the module if the weight is its `weight`, otherwise that of the parameter.
    shape
        Shape of the weight; empty if it is computed from other parameters.
    reason
        Why it cannot be pruned.
    kind
        Type of the module it belongs to; empty for a layer.
    parameter : Tensor or None
        The parameter, if its use in the forward pass can be observed. Other weights are taken to be used.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    kind: str = ""
    parameter: Tensor | None = field(default=None, compare=False)


def other_weights(model: nn.Module, known: Iterable[object]) -> Iterator[DenseWeight]:
    """Find the weights of a model that are not layers, in the order of the modules.

    Parameters
    ----------
    known
        Storage keys of the parameters that are layers, or may be.
    """
    seen = set(known)
    for prefix, module in model.named_modules():
        prefix = uncompiled(prefix)
        if (weights := _quantised_weights(module)) is not None:
            kind = f"quantised {type(module).__name__}"
            for name, weight in weights.items():
                reason = "quantised: pass the model as it was before quantisation"
                yield DenseWeight(weight_name(prefix, name), tuple(weight.shape), reason, kind)
        for name, parameter in module.named_parameters(recurse=False):
            key = storage_key(parameter)
            if parameter.dim() > 1 and parameter.numel() > 0 and key not in seen and not is_bias(name):
                seen.add(key)
                kind, reason = _kind_and_reason(module, parameter)
                yield DenseWeight(weight_name(prefix, name), tuple(parameter.shape), reason, kind, parameter)


def count_weights(model: nn.Module) -> int:
    """Return the number of weights of the whole network: the elements of all parameters of two or more dimensions.

    Weights that are computed from other parameters count in place of these.
    """
    parameters = {storage_key(p): p.numel() for _, p in named_parameters(model) if p.dim() > 1}
    for _, computed in computed_weights(model):
        value = computed.value()
        for source in computed.sources():
            parameters.pop(storage_key(source), None)
        parameters[id(computed.module), computed.name] = value.numel() if value.dim() > 1 else 0
    quantised = (weights for module in model.modules() if (weights := _quantised_weights(module)) is not None)
    return sum(parameters.values()) + sum(weight.numel() for weights in quantised for weight in weights.values())


def is_bias(name: str) -> bool:
    """Whether a parameter is called a bias; those of experts and of norms may have several dimensions."""
    return name == "bias" or name.endswith("_bias")


def weight_name(prefix: str, parameter: str) -> str:
    """Return the name under which a module's parameter is reported: the module's own for its `weight`."""
    return (prefix or parameter) if parameter == "weight" else f"{prefix}.{parameter}".lstrip(".")


def obstacle(weight: Tensor) -> str:
    """Return why no weight of this type and memory can be pruned; empty if it can."""
    if weight.dtype not in DTYPES:
        return f"its weight is of type {weight.dtype}"
    strides = weight.stride() if weight.layout == torch.strided else weight.shape
    if any(size > 1 and stride == 0 for size, stride in zip(weight.shape, strides, strict=True)):
        return "elements of its weight share memory"  # it is expanded, so that it could not be changed in place
    return ""


def storage_key(parameter: Tensor) -> tuple[object, ...]:
    """Return a key that is the same for parameters that are one tensor under several names."""
    if parameter.is_meta or parameter.layout != torch.strided or is_traceable_wrapper_subclass(parameter):
        return (id(parameter),)
    return parameter.device, parameter.data_ptr(), parameter.shape, parameter.stride()


def _kind_and_reason(module: nn.Module, parameter: Tensor) -> tuple[str, str]:
    if isinstance(module, torch.jit.ScriptModule):
        kind = f"TorchScript {module.original_name}"
        return kind, f"{kind}: pass the model as it was before that module was scripted or traced"
    kind = type(module).__name__
    return kind, obstacle(parameter) or f"{kind} parameter: no solver prunes it"


def _quantised_weights(module: nn.Module) -> dict[str, Tensor] | None:
    """Return the packed weights of a module of `torch.ao.nn.quantized`, or None if it is not one."""
    path = type(module).__module__.split(".")
    if "quantized" not in path or "reference" in path:  # reference modules have parameters
        return None
    if callable(packed := getattr(module, "weight", None)):
        return {"weight": packed()}
    if callable(packed := getattr(module, "get_weight", None)):
        return dict(packed())
    return None
