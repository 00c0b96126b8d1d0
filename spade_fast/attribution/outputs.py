"""What a Captum method's network returns for one sample, and what automatic sparsity keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.attribution.method_networks import network_with_layers
from spade_fast.attribution.sample_arguments import innermost
from spade_fast.pruning.decision import answer_probabilities, probabilities, repeatable
from spade_fast.pruning.goals import Score, checked_run, kept_number
from spade_fast.targets.answers import reading
from spade_fast.targets.network_outputs import described, logits_of
from spade_fast.targets.target import Target, function_target

if TYPE_CHECKING:
    from captum.attr import Attribution


def network_inputs(inputs: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments with which a method calls its network."""
    more = arguments.get("additional_forward_args")
    more = () if more is None else more if isinstance(more, tuple) else (more,)
    return (*(inputs if isinstance(inputs, tuple) else (inputs,)), *more)


def network_output(method: Attribution, inputs: Any, arguments: Mapping[str, Any]) -> Any:
    """Return what the network of a method returns; random numbers that it draws are the same in each call."""
    network = innermost(method).forward_func
    # Functions around a network may need gradients.
    with torch.no_grad() if isinstance(network, nn.Module) else nullcontext():
        return repeatable(network, *network_inputs(inputs, arguments))


def score_of_target(method: Attribution, model: nn.Module, sample: Any, arguments: Mapping[str, Any]) -> Score:
    """Return what automatic sparsity keeps of a method's network, with its current weights, on a sample or a copy.

    It is what the target keeps if that is a function; the probability of the class that the method explains if the
    network returns logits for it; and otherwise the number in its output that the method explains. A method without a
    target is taken to explain the class that the network now predicts.

    Parameters
    ----------
    model : nn.Module
        The network, of which the target may read a layer.
    sample : Tensor ``[1, ...]``
    arguments
        Of the method, for this sample.

    Raises
    ------
    TypeError, ValueError
        The network cannot run the sample, or the output has no such place. When the score is called: what is kept is
        not a finite number.
    """
    with checked_run(sample):
        output = network_output(method, sample, arguments)
    given = _one(arguments.get("target"))
    asked = function_target(given) if callable(given) else _place(given, output)

    def score(sample: Any) -> float:
        with reading(network_with_layers(model, method), asked) as read:
            return kept_number(asked, read(network_output(method, sample, arguments)))

    return Score(str(asked), score)


def answers_of(method: Attribution, model: nn.Module, sample: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the probabilities of all answers to what a method explains of one sample; None if they are unknown.

    They are those of the classes, unless the target says so.
    """
    given = _one(arguments.get("target"))
    asked = function_target(given) if callable(given) else None
    with suppress(InvalidTypeError, InvalidValueError):
        if asked is None or asked.answers is None:
            return probabilities(network_output(method, sample, arguments))
        with reading(network_with_layers(model, method), asked) as read:
            return answer_probabilities(asked, read(network_output(method, sample, arguments)))
    return None


def _one(target: Any) -> Any:
    """Return the target for one sample: an integer, a tuple, a function, or None."""
    if isinstance(target, Tensor) and target.numel() == 1:
        return int(target)
    return target[0] if isinstance(target, list) and len(target) == 1 else target


def _place(target: Any, output: Any) -> Target:
    """Return what Captum's target for one sample asks of an output such as this."""
    try:
        dense = probabilities(output)
    except InvalidValueError:
        name = "the output" if target is None else f"output {target}"
        return Target(name, lambda output: _selected(output, target))
    chosen = int(dense.argmax()) if target is None else target
    name = f"class {chosen % len(dense) if isinstance(chosen, int) else chosen}"
    return Target(name, lambda output: _selected(probabilities(output)[None], chosen))


def _selected(output: Any, target: Any) -> Tensor:
    """Return the number ``[1]`` at a place in a network's output for one sample."""
    place = () if target is None else target if isinstance(target, tuple) else (target,)
    # A function around the network may return a number.
    tensor = torch.tensor(float(output)) if isinstance(output, int | float) else logits_of(output)
    if tensor is None:
        raise InvalidTypeError(f"the network returns {described(output)}: give a function of that as target")
    try:
        chosen = tensor[(0, *place)] if tensor.dim() else tensor
    except (IndexError, TypeError) as error:
        raise InvalidValueError(f"target {target!r} does not fit the output {list(tensor.shape)}: {error}") from error
    if chosen.numel() != 1:
        raise InvalidValueError(
            f"the network returns {list(tensor.shape)}, where the target {target!r} selects several numbers: give a "
            "target function, such as those of spade_fast.targets, which returns one number per sample"
        )
    return chosen.reshape(1)
