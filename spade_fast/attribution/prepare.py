"""`prepare_for_attribution`, which makes a network safe for attribution methods that hook its activation modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast.attribution.deep_lift_rules import teach_deep_lift
from spade_fast.attribution.function_kinds import RECTIFIER
from spade_fast.attribution.stand_ins import REDIRECTED, Forward, StandIns
from spade_fast.pruning.computed_weights import computations


def prepare_for_attribution(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | None = None) -> nn.Module:
    """Copy a network such that methods which hook activations (GuidedBackprop, GuidedGradCam, DeepLift) are correct.

    While such a method runs on the copy, every call of an activation in the forward pass has the method's rule: calls
    of modules, however often a module is used, and calls of functions such as `torch.relu`, `F.gelu` or
    `x.clamp(min=0)`, in place or not, on any path that the pass takes. ReLU6 and other functions that are ReLU up to a
    bound count as ReLU. Guided backpropagation has a rule for ReLU only; other activations keep their gradient.
    DeepLIFT's rule applies to all functions of single elements, and products of two activations are divided
    evenly. The class, the submodules and their names, and the outputs (bit for bit) are the same. The copy **shares all
    parameters and buffers** with `model`, which is not modified, and what computes weights from them, such as
    `weight_norm`: a trace applied to either is applied to both. Build the attribution method on the copy.

    Parameters
    ----------
    model : nn.Module
        The network, in evaluation mode.
    example_inputs : Tensor or tuple, optional
        The input or inputs of one forward pass, in which the copy is tried as a method with hooks will run it.

    Returns
    -------
    nn.Module
        The prepared copy. A method on it raises ValueError if it meets a function that it has no rule for, such as
        layer normalisation or an unknown function in DeepLIFT, or one that cannot be given another gradient, such as a
        custom autograd function; the message names the function and, if known, the line of the network's code.

    Warns
    -----
    UserWarning
        In the trial on `example_inputs` there was a function that cannot be given another gradient.

    Raises
    ------
    TypeError
        `model` is not a module, contains TorchScript, whose functions are out of reach, or cannot be copied.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import prepare_for_attribution
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(inplace=True)).eval()
    >>> prepare_for_attribution(model)
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): ReLU(inplace=True)
    )
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidTypeError(f"{name or 'the model'} is a TorchScript module: give the module it was made from")
    teach_deep_lift()
    # Parameters, buffers, and tensors that hooks such as weight_norm's compute again in each forward pass.
    held = [one for module in model.modules() for one in tree_leaves(vars(module)) if isinstance(one, Tensor)]
    computing = computations(model)
    try:
        prepared = copy.deepcopy(model, {id(one): one for one in (*held, *computing)})
    except Exception as error:  # the attributes of a network may be anything
        raise InvalidTypeError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "give it without the attribute that cannot, or with a __deepcopy__ method"
        ) from error
    stand_ins = StandIns(prepared)
    shared = {one for computation in computing if isinstance(computation, nn.Module) for one in computation.modules()}
    for module in set(prepared.modules()) - shared:
        module.__dict__["forward"] = Forward(module, stand_ins)
        module.__dict__["apply"] = partial(_apply, module, stand_ins)
    if example_inputs is not None:
        try:
            rehearse(prepared, example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), [RECTIFIER])
        except InvalidValueError as error:
            warnings.warn(f"GuidedBackprop and DeepLift will refuse {type(model).__name__}: {error}", stacklevel=2)
    return prepared


def rehearse(model: nn.Module, inputs: tuple[Any, ...], kinds: Iterable[str]) -> tuple[set[str], set[str]]:
    """Run a prepared network as a method with hooks on some kinds of functions does.

    Returns
    -------
    (set of str, set of str)
        The kinds of functions that were called, and the names of those without a rule.

    Raises
    ------
    ValueError
        The network was not prepared, or has a custom autograd function.
    """
    forward = vars(model).get("forward")
    if not isinstance(forward, Forward):
        raise InvalidValueError("the network is not a copy made by prepare_for_attribution")
    with undisturbed(model), torch.enable_grad(), forward.stand_ins.rehearsal(kinds) as (met, refused):
        model(*inputs)
    return met, refused


def _apply(module: nn.Module, stand_ins: StandIns, function: Callable[[nn.Module], Any]) -> nn.Module:
    """`nn.Module.apply`, by which methods set their hooks, with stand-ins in place of the activation modules."""
    for one in reversed(list(module.modules())):
        if not isinstance(one, REDIRECTED):
            function(one)
    for stand_in in stand_ins.of_kind.values():
        function(stand_in)
    return module
