"""Which objects are networks whose weights can be pruned, and the names of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.module_names import uncompiled

_FRAMEWORKS = {
    "keras": "Keras",
    "tf_keras": "Keras",
    "tensorflow": "TensorFlow",
    "flax": "Flax",
    "onnx": "ONNX",
    "onnxruntime": "ONNX",
}


def original_module(model: Any) -> nn.Module:
    """Return the module that `torch.compile` was given, or `model` itself if it was not compiled.

    Raises
    ------
    TypeError
        `model` is not a module, or is TorchScript, an exported program, or of another framework.
    """
    if type(model).__module__.startswith("torch._dynamo") and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return original_module(model._orig_mod)
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidTypeError(
            f"model is TorchScript ({type(model).__name__}), whose layers are not accessible: "
            "pass the torch.nn.Module that was scripted or traced"
        )
    modules = [kind.__module__ for kind in type(model).__mro__]
    if any(module.startswith("torch.export") for module in modules):
        raise InvalidTypeError(
            f"model is an exported program ({type(model).__name__}): pass the torch.nn.Module that was exported"
        )
    for package in {module.split(".")[0] for module in modules} & _FRAMEWORKS.keys():
        raise InvalidTypeError(
            f"model is a {_FRAMEWORKS[package]} model ({type(model).__name__}): "
            "pass the same network as a torch.nn.Module made of PyTorch's layers"
        )
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over a model's parameters, under the names they have if no submodule is compiled."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield uncompiled(name), parameter


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError, naming the parameter, if a parameter has no finite values or could not be swapped in place."""
    for name, parameter in named_parameters(model):
        if parameter.is_meta:
            raise InvalidValueError(f"parameter {name!r} is on the meta device and has no values")
        if parameter.is_inference():
            raise InvalidValueError(
                f"parameter {name!r} was made under torch.inference_mode() and cannot be changed outside it: "
                "make the model outside, or pass copy.deepcopy(model)"
            )
        if is_traceable_wrapper_subclass(parameter) or parameter.layout != torch.strided:
            kind = type(parameter).__name__ if parameter.layout == torch.strided else str(parameter.layout)
            raise InvalidValueError(
                f"parameter {name!r} is stored as {kind}: pass the model as it was before its weights were converted"
            )
        values = parameter.detach()
        if values.is_floating_point() and values.itemsize == 1:
            values = values.float()  # in which sums are implemented
        # A non-finite value makes the sum non-finite; a sum that merely overflowed is checked element by element.
        if not (bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())):
            raise InvalidValueError(f"parameter {name!r} of the model has NaN or infinite values")
