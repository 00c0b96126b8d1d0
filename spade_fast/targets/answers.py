"""`answering`, which lets a network return the numbers of a target, so that any method explains these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.modes import run_uncompiled
from spade_fast._util.module_names import named_module
from spade_fast.targets.class_names import class_names_of
from spade_fast.targets.classification import as_target
from spade_fast.targets.network_outputs import detections_of
from spade_fast.targets.target import Target, TargetLike, checked_numbers

_NO_GRADIENT = ("does not require grad", "appears to not have been used in the graph")
_NO_INTEGERS = "Expected tensor for argument #1 'indices' to have one of the following scalar types"  # of an embedding


@contextmanager
def answering(model: nn.Module, target: TargetLike) -> Iterator[nn.Module]:
    """Let a network return the numbers of a target ``[S]`` instead of its output, during a ``with`` block.

    Any attribution method, of Captum or another library, then explains the target: call it without a target of its own.
    `Spade` does this itself. The network's functions and layers keep the gradients and rules that a method gives them;
    the target's own functions have their plain gradient. So relevance and DeepLIFT's attributions add up for targets
    that are sums or differences of outputs. Captum's `LRP` multiplies by the number in the end, which is right for a
    single output alone: use `spade_fast.attribution.LRP`. No other thread may run the model during the block.

    Parameters
    ----------
    model : nn.Module
        The network on which the method was built. Its hooks are as before after the block.
    target : int, str or callable
        The index of a class, its name if the model has a Hugging Face configuration with names, or a function of the
        model's output that returns one number per sample.

    Yields
    ------
    nn.Module
        The model.

    Raises
    ------
    TypeError, ValueError
        `target` is none of these. When the model runs: the target does not return finite numbers, one for each sample,
        or has no gradient where the method asks for it.

    Examples
    --------
    >>> import torch
    >>> from captum.attr import Saliency
    >>> from spade_fast.targets import answering, class_against
    >>> model = torch.nn.Linear(8, 4)
    >>> with answering(model, class_against(0, 3)):
    ...     Saliency(model).attribute(torch.rand(2, 8)).shape
    torch.Size([2, 8])
    """
    asked = as_target(target, class_names_of(model))
    with reading(model, asked) as read:
        answer = Answer(asked, read)
        with replacing_output(model, answer), naming_missing_gradients(answer.without_gradient):
            yield model


class Answer:
    """Turns a network's arguments and output into the numbers of a target ``[S]``.

    Parameters
    ----------
    read
        Function of the output that returns what the target reads, as :func:`reading` yields it.
    """

    def __init__(self, target: Target, read: Callable[[Any], Any]) -> None:
        self._target, self._read = target, read
        self._lost = False  # whether the target, not the network, has no gradient
        self._arguments: Any = ()

    def __call__(self, arguments: Any, output: Any) -> Tensor:
        self._arguments = arguments
        read = self._read(output)
        numbers = checked_numbers(self._target, self._target(read), _rows(arguments, output))
        given = (one for one in tree_leaves(read) if isinstance(one, Tensor))
        self._lost = not numbers.requires_grad and any(one.requires_grad for one in given)
        return numbers

    def without_gradient(self) -> str:
        """Say what has no gradient."""
        if self._lost:
            return f"target {self._target} has no gradient: it detaches the output, or chooses from it, as argmax does"
        missing = without_gradient(self._arguments) if self._target.layer is None else _LAYER_WITHOUT_GRADIENT
        return f"target {self._target}: {missing}"


def without_gradient(arguments: Any) -> str:
    """Say that a network's output has no gradient, and why that may be, given the network's arguments."""
    message = "the network's output has no gradient with respect to the input: "
    tensors = (one for one in tree_leaves(arguments) if isinstance(one, Tensor))
    if any(not (one.is_floating_point() or one.is_complex()) for one in tensors):
        return message + _INTEGERS
    return message + "it was detached, or computed without gradients or from other numbers"


_INTEGERS = (
    "integers, such as token ids, have none; explain embedded tokens, or an embedding with a layer method, or give the "
    "integers as additional_forward_args"
)
_LAYER_WITHOUT_GRADIENT = (
    "the target's layer has no gradient with respect to the input, or to the layer that the method reads, which must "
    "come before it"
)


@contextmanager
def reading(model: nn.Module, target: Target) -> Iterator[Callable[[Any], Any]]:
    """Yield a function from the network's output in a forward pass to what a target reads: that, or a layer's output.

    Compiled modules run uncompiled if a layer is read, which compiled code may have joined with others.

    Raises
    ------
    ValueError
        The network has no such layer; from the function: the layer did not run once since its last call.
    """
    if target.layer is None:
        yield lambda output: output
        return
    outputs: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output.clone() if isinstance(output, Tensor) else output)  # what follows may change it in place

    def read(output: Any) -> Any:
        found = outputs.copy()
        outputs.clear()
        if len(found) != 1:
            ran = f"runs {len(found)} times" if found else "does not run"
            raise InvalidValueError(f"{target}: the layer must run once in the network's forward pass, but {ran}")
        return found[0]

    hook = named_module(model, target.layer).register_forward_hook(keep)
    try:
        with run_uncompiled():
            yield read
    finally:
        hook.remove()


@contextmanager
def replacing_output(model: nn.Module, change: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Replace a network's output, during a ``with`` block, by a function of its arguments and its output."""

    def answer(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        return change((args, kwargs), output)

    hook = model.register_forward_hook(answer, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def naming_missing_gradients(what: Callable[[], str]) -> Iterator[None]:
    """Turn torch's error for a missing gradient, during a ``with`` block, into a ValueError that says what lacks it.

    So does the error of an embedding whose integers a method replaced by other numbers, to have gradients.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_INTEGERS in str(error):
            raise InvalidValueError(f"the method cannot explain the input: {_INTEGERS}") from error
        if not any(part in str(error) for part in _NO_GRADIENT):
            raise
        raise InvalidValueError(what()) from error


def _rows(arguments: Any, output: Any) -> int | None:
    """Return the number of samples of a forward pass; None if it has no tensors."""
    detections = detections_of(output)
    if detections:
        return len(detections)
    first = next((one for one in tree_leaves(arguments) if isinstance(one, Tensor)), None)
    return None if first is None else len(first) if first.dim() else 1
