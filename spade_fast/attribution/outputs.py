"""What a Captum method's network returns for one sample: predictions, and the score that automatic sparsity keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.attribution.sample_arguments import innermost
from spade_fast.pruning.decision import probabilities, repeatable
from spade_fast.pruning.goals import Score, checked_run, checked_score

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


def score_of_target(
    method: Attribution, sample: Any, arguments: Mapping[str, Any], score: Score | None
) -> Callable[[Any], float]:
    """Return the function that scores a method's network, with its current weights, on a sample or a copy of it.

    The score is the probability of the class that the method explains if the network returns logits for it, and
    otherwise the number in its output that the method explains. A method without a target is taken to explain the class
    that the network now predicts.

    Parameters
    ----------
    sample : Tensor ``[1, ...]``
    arguments
        Of the method, for this sample.
    score
        Function of the output that replaces all that.

    Raises
    ------
    TypeError, ValueError
        The network cannot run the sample, the output has no such place, or `score` does not return a finite number.
    """
    with checked_run(sample):
        output = network_output(method, sample, arguments)
    if score is not None:
        return lambda given: checked_score(score(network_output(method, given, arguments)))
    target = _index(arguments.get("target"))
    try:
        dense = probabilities(output)
    except InvalidValueError:
        return lambda given: _selected(network_output(method, given, arguments), target)
    chosen = int(dense.argmax()) if target is None else target
    return lambda given: _selected(probabilities(network_output(method, given, arguments))[None], chosen)


def _index(target: Any) -> Any:
    """Return the place in the output, an integer or a tuple, that Captum's target for one sample stands for."""
    if isinstance(target, (np.generic, np.ndarray)):
        raise InvalidTypeError(f"Captum takes a target as an integer, list, tensor or tuple, got {target!r}")
    if isinstance(target, Tensor) and target.numel() == 1:
        return int(target)
    return target[0] if isinstance(target, list) and len(target) == 1 else target


def _selected(output: Any, target: Any) -> float:
    """Return the number at a place in a network's output for one sample."""
    place = () if target is None else target if isinstance(target, tuple) else (target,)
    if isinstance(output, int | float):  # a function around the network may return a number
        return checked_score(output)
    if not isinstance(output, Tensor):
        raise InvalidTypeError(f"the network returns {type(output).__name__}: give Spade(score=...), a function of it")
    try:
        chosen = output[(0, *place)] if output.dim() else output
    except (IndexError, TypeError) as error:
        raise InvalidValueError(f"target {target!r} does not fit the output {list(output.shape)}: {error}") from error
    if chosen.numel() != 1:
        raise InvalidValueError(
            f"the network returns {list(output.shape)}, where the target {target!r} selects several numbers: give "
            "Spade(score=...), a function of the output that returns what is to be kept"
        )
    if not bool(torch.isfinite(chosen).all()):
        raise InvalidValueError(f"the network's output for the target {target!r} must be finite, got {float(chosen)}")
    return checked_score(chosen)
