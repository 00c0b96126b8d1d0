"""Lets a Captum method explain a target function: its network, or the function around that, returns the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast.attribution.method_networks import find_network, network_with_layers
from spade_fast.attribution.sample_arguments import innermost
from spade_fast.targets.answers import (
    Answer,
    naming_missing_gradients,
    reading,
    replacing_output,
    without_gradient,
)
from spade_fast.targets.network_outputs import described, logits_of
from spade_fast.targets.target import function_target

with extra_for("Spade needs"):
    from captum.attr import LRP, LLMAttribution, LLMGradientAttribution

if TYPE_CHECKING:
    from captum.attr import Attribution


def check_one_function(target: Any) -> None:
    """Raise ValueError for a target function per sample, where one call of a method explains all samples."""
    if isinstance(target, list) and len(target) > 1 and any(map(callable, target)):
        raise InvalidValueError(
            "a target function for each sample needs an augmenter as calibration: with batches given directly, one "
            "call of the method explains all samples, so give one function for all of them"
        )


@contextmanager
def asking(method: Attribution, model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Let a method explain its target, whatever that is, during a ``with`` block; yield the arguments to call it with.

    For a target function, the network on which the method was built returns the function's numbers, and the method has
    no target. Otherwise the network returns its logits, where these are an entry of its output.

    Parameters
    ----------
    model : nn.Module
        The network, of which the target may read a layer.
    """
    target = arguments.get("target")
    if isinstance(target, list) and len(target) == 1 and callable(target[0]):
        target = target[0]
    if isinstance(method, LLMAttribution | LLMGradientAttribution):  # whose targets are texts
        yield dict(arguments)
        return
    if not callable(target):
        called_with: list[Any] = []

        def logits(given: Any, output: Any) -> Any:
            called_with[:] = given
            return _logits(target, output)

        with _answers(method, logits), naming_missing_gradients(lambda: without_gradient(called_with)):
            yield dict(arguments)
        return
    _check_takes_functions(method)
    asked = function_target(target)
    with reading(network_with_layers(model, method), asked) as read:
        answer = Answer(asked, read)
        with _answers(method, answer), naming_missing_gradients(answer.without_gradient):
            yield {**arguments, "target": None}


@contextmanager
def answering_functions(method: Attribution, target: Any) -> Iterator[Any]:
    """Let a method explain a target function outside of `Spade` too, during a ``with`` block; yield Captum's target."""
    if not callable(target):
        yield target
        return
    with asking(method, find_network(method), {"target": target}) as asked:
        yield asked["target"]


def _check_takes_functions(method: Attribution) -> None:
    """Raise ValueError for Captum's LRP, which multiplies what it finds by the number that is explained.

    That is the relevance of one output, but not of a difference of outputs, which begin with values of their own.
    """
    if isinstance(innermost(method), LRP):  # LayerLRP is one, too
        raise InvalidValueError(
            "Captum's LRP begins with one output: give a class as target, or use spade_fast.attribution.LRP, which "
            "explains target functions"
        )


@contextmanager
def _answers(method: Attribution, change: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Change what the network of a method returns, or the function on which it was built."""
    network = innermost(method).forward_func
    if isinstance(network, nn.Module):
        with replacing_output(network, change):
            yield
        return

    @wraps(network)  # whose signature Captum reads
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change((args, kwargs), network(*args, **kwargs))

    built = [one for one in _with_those_inside(method) if one.forward_func is network]
    try:
        for one in built:
            one.forward_func = changed
        yield
    finally:
        for one in built:
            one.forward_func = network


def _with_those_inside(method: Attribution) -> list[Attribution]:
    inner = getattr(method, "attribution_method", None)
    return [method, *(_with_those_inside(inner) if inner is not None else ())]


def _logits(target: Any, output: Any) -> Any:
    """Return the logits in an output, or the output itself without; TypeError or ValueError if they lack the target."""
    logits = logits_of(output)
    if logits is None and isinstance(target, int | tuple | list | Tensor) and not isinstance(output, int | float):
        raise InvalidTypeError(f"the network returns {described(output)}: give a function of that as target")
    if logits is None:
        return output
    asked = target.flatten().tolist() if isinstance(target, Tensor) else target
    for one in asked if isinstance(asked, list) else [asked]:
        _check_place(one, logits, negative=not isinstance(asked, list))
    return logits


def _check_place(target: Any, logits: Tensor, *, negative: bool) -> None:
    """Raise ValueError if logits have no such class, or no such place, counted from the end only if `negative`."""
    if isinstance(target, int) and logits.dim() == 2:
        classes = logits.shape[1]
        if not (-classes if negative else 0) <= target < classes:
            raise InvalidValueError(f"target must be a class from 0 to {classes - 1}, got {target}")
    elif isinstance(target, int | tuple):
        try:
            logits[(slice(None), *(target if isinstance(target, tuple) else (target,)))]
        except IndexError as error:
            raise InvalidValueError(f"target {target} does not fit the output {list(logits.shape)}: {error}") from error
