"""Logits of one class each, which everything downstream expects, from the outputs of classifiers that return others."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError, UserError
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.targets.network_outputs import logits_of

# Backward functions of the ops that may stand between the last activation and the output.
_VIEWS = ("View", "Reshape", "Squeeze", "Unsqueeze", "Slice", "ToCopy", "Clone", "Alias")
_PROBABILITIES = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}


def two_classes(model: nn.Module) -> nn.Module:
    """Return a binary classifier with one logit as a classifier with two classes.

    Where `model` returns a logit z, the result returns ``[-z / 2, z / 2]``: the softmax probability of class 1 is
    ``sigmoid(z)``, that of class 0 is ``1 - sigmoid(z)``, and the evidence for either can be explained.

    Parameters
    ----------
    model : nn.Module
        Images ``[N, C, H, W]`` to logits ``[N, 1]``.

    Returns
    -------
    nn.Module
        Images ``[N, C, H, W]`` to logits ``[N, 2]``. It shares submodules, parameters and buffers with `model`, under
        the same names; `model` is not modified.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        When it runs: the output of `model` is not ``[N, 1]``.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.inputs import predict, two_classes
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1))
    >>> predict(two_classes(model), torch.zeros(1, 1, 2, 2)).shape
    torch.Size([2])
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _hooked(model, _split)


def class_logits(name: str, module: nn.Module, image: Tensor, notes: Sequence[str] = ()) -> tuple[nn.Module, Any]:
    """Run a network on one image; return it as a network that returns logits, and its output before that change.

    A structured output is replaced by its ``logits``, and one logit by two classes. Other outputs stay as they are.
    What was assumed about the input, `notes`, is part of the message if the network cannot run it.

    Raises
    ------
    ValueError
        The network cannot run the image, or returns probabilities.
    """
    try:
        with torch.enable_grad():
            output = module(image.requires_grad_())
    except UserError:
        raise
    except Exception as error:  # the network's own code may fail in any way
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InvalidValueError(
            "; ".join([f"{name} cannot run an image {list(image.shape)} of {image.dtype} ({reason})", *notes])
        ) from error
    if not isinstance(output, Tensor) and (logits := logits_of(output)) is not None:
        module, output = _hooked(module, _take_logits), logits
    if isinstance(output, Tensor):
        activation = _last_activation(output)
        if activation is not None:
            raise InvalidValueError(
                f"{name} ends in a {activation}, so that it returns probabilities: give it without that, so that it "
                "returns logits"
            )
        if output.shape == (1, 1):
            module = two_classes(module)
        output = output.detach()
    return module, output


def _hooked(model: nn.Module, change: Callable[[nn.Module, Any, Any], Any]) -> nn.Module:
    """Return `model` with another output. A hook, unlike a module around it, leaves the names of layers as they are."""
    changed = copy.copy(model)
    changed._forward_hooks = OrderedDict(model._forward_hooks)
    changed.register_forward_hook(change)
    return changed


def _split(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != 1:
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidValueError(f"two_classes needs a model that returns one logit per image, [N, 1], got {given}")
    return torch.cat([-output, output], 1) / 2


def _take_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    return logits_of(output)


def _last_activation(output: Tensor) -> str | None:
    """Return the name of the function that makes probabilities if the network ends in one."""
    step = output.grad_fn
    while step is not None and step.name().startswith(_VIEWS) and step.next_functions:
        step = step.next_functions[0][0]
    return None if step is None else _PROBABILITIES.get(step.name())
