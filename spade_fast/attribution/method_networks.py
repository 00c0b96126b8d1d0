"""The networks that a Captum method runs: which they are, and what Captum leaves on their modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast._util.text import listed
from spade_fast.attribution.sample_arguments import innermost
from spade_fast.pruning.computed_weights import computations, computed_weights

with extra_for("Spade needs"):
    from captum.attr import LRP, Attribution


def find_network(method: Attribution) -> nn.Module:
    """Return the network that a method was built on; raise TypeError if it was built on a function."""
    for candidate in (method.forward_func, getattr(method, "model", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise InvalidTypeError(
        f"{type(method).__name__} was built on a function, {method.forward_func!r}, not on a module: "
        "pass the network whose weights it uses as Spade(..., model=...)"
    )


def checked_network(model: nn.Module, method: Attribution) -> nn.Module:
    """Return the given network, or raise ValueError if the method runs on another, which traces would not change."""
    network = innermost(method).forward_func
    if isinstance(network, nn.Module) and isinstance(model, nn.Module):
        own = set(map(id, model.parameters()))
        if own and own.isdisjoint(map(id, network.parameters())):
            raise InvalidValueError(
                f"model shares no parameters with the {type(network).__name__} that {type(method).__name__} was built "
                "on, so traces would change nothing: build the method on the model or on a prepared copy of it"
            )
        apart = _computed_apart(model, network)
        if apart:
            raise InvalidValueError(
                f"model and the {type(network).__name__} that {type(method).__name__} was built on each compute "
                f"{listed(apart)} from the same parameters, so traces of one would not change the other: build the "
                "method on the model or on prepare_for_attribution(model)"
            )
    return model


def _computed_apart(model: nn.Module, network: nn.Module) -> list[str]:
    """Return the weights that two networks compute from shared parameters, but not by a shared object."""
    shared = {id(source) for _, weight in computed_weights(model) for source in weight.sources()}
    own = set(map(id, computations(model)))
    return [
        name
        for name, weight in computed_weights(network)
        if id(weight.computation) not in own and not shared.isdisjoint(map(id, weight.sources()))
    ]


def network_with_layers(model: nn.Module, method: Attribution) -> nn.Module:
    """Return the network whose layers run: the model, or a copy with the same names on which the method was built."""
    network = innermost(method).forward_func
    if not isinstance(network, nn.Module) or any(one is model for one in network.modules()):
        return model
    return network


def networks_of(model: nn.Module, method: Attribution) -> list[nn.Module]:
    """Return the networks whose modules run: the model, and that on which the method was built."""
    method = innermost(method)
    found = [model, method.forward_func, getattr(method, "model", None)]
    return [one for index, one in enumerate(found) if isinstance(one, nn.Module) and one not in found[:index]]


@contextmanager
def undone(method: Attribution, inputs: Any) -> Iterator[None]:
    """Undo what Captum leaves: its LRP deletes the rules of modules, and after an error inputs require gradients."""
    method = innermost(method)
    modules = list(method.model.modules()) if isinstance(method, LRP) else []
    names = ("rule", "activations")
    before = [{name: vars(module)[name] for name in names if name in vars(module)} for module in modules]
    leaves = [one for one in tree_leaves(inputs) if isinstance(one, Tensor) and one.is_leaf]
    required = [one.requires_grad for one in leaves]
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(kept)
        for leaf, requires in zip(leaves, required, strict=True):
            if leaf.requires_grad != requires:
                leaf.requires_grad_(requires)
