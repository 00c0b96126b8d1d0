"""`Target`, what is asked of a network's output: one number per sample, and what automatic sparsity keeps of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.targets.class_names import class_index
from spade_fast.targets.network_outputs import described

Read = Callable[[Any], Tensor]
TargetLike = int | str | Read  # a class by its index or name, or a function of the output


@dataclass(frozen=True)
class Target:
    """A number per sample, read from a network's output: the question that an explanation answers.

    Any function of the output that returns one number per sample can be a target. A `Target` is such a function with a
    name, which may also say what automatic sparsity keeps of it, and may read a layer in place of the output.

    Attributes
    ----------
    name : str
        What it is called in reports and messages.
    read : callable
        Function of the network's output, whatever that is, that returns a floating-point tensor ``[S]``, one number per
        sample. A method that uses gradients needs theirs.
    keep : callable, optional
        Function of the output that returns what automatic sparsity keeps of each sample ``[S]``, above 0 for the dense
        network; by default what `read` returns.
    layer : str, optional
        Name of a module of the network. The functions get its output instead of the network's.
    answers : callable, optional
        Function of the output that returns the probabilities of all answers to the question ``[S, answers]``, such as
        of the classes or of a position's tokens. The most probable one is the network's *decision*, which a trace
        should keep. By default the decision is among the classes, if the network returns logits ``[S, classes]``, and
        no warning is given if a trace loses it.

    Raises
    ------
    TypeError
        An attribute has another type.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import Target
    >>> entropy = Target("entropy", lambda logits: torch.distributions.Categorical(logits=logits).entropy())
    >>> entropy(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """

    name: str
    read: Read
    keep: Read | None = None
    layer: str | None = None
    answers: Read | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        for name, value in (("read", self.read), ("keep", self.keep or self.read)):
            if not callable(value):
                raise InvalidTypeError(f"{name} must be a function of the network's output, got {value!r}")
        if not isinstance(self.name, str) or not isinstance(self.layer, str | None):
            raise InvalidTypeError(f"name and layer must be text, got {self.name!r} and {self.layer!r}")

    def __call__(self, output: Any) -> Tensor:
        """Return the number of each sample ``[S]``."""
        return self.read(output)

    def kept(self, output: Any) -> Tensor:
        """Return what automatic sparsity keeps of each sample ``[S]``."""
        return (self.keep or self.read)(output)

    def __str__(self) -> str:
        return self.name


def function_target(target: Callable[[Any], Tensor]) -> Target:
    """Return a function of the output as a `Target` that has its name."""
    if isinstance(target, Target):
        return target
    return Target(str(getattr(target, "__qualname__", type(target).__name__)), target)


def class_number(target: Any, names: Sequence[str] = ()) -> int:
    """Return the index of a class that is given by its index or name; TypeError or ValueError if it is neither."""
    if isinstance(target, str):
        return class_index(target, names, "the index of a class")
    try:
        if isinstance(target, bool) or getattr(target, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(target)  # also of integers of numpy, and of tensors of one
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"target must be the index or name of a class, or a function of the network's output, got {target!r}"
        ) from error


def checked_numbers(target: Target, values: Any, rows: int | None) -> Tensor:
    """Return the numbers of a target as ``[rows]``; TypeError or ValueError unless they are finite, one per sample.

    A single number without dimensions is that of a single sample. None: any number of rows.
    """
    if not isinstance(values, Tensor):
        raise InvalidTypeError(f"target {target} must return a tensor [S], one number per sample, got {values!r}")
    if not values.is_floating_point():
        raise InvalidTypeError(
            f"target {target} must return floating-point numbers, got {described(values)}: the index of a class, for "
            "example, is not a number that can be explained"
        )
    if values.dim() == 0 and rows in (1, None):
        values = values.reshape(1)
    if values.dim() != 1 or rows not in (len(values), None):
        samples = "" if rows is None else f" for {rows} sample{'' if rows == 1 else 's'}"
        raise InvalidValueError(
            f"target {target} must return one number per sample, [S], got {list(values.shape)}{samples}"
        )
    wrong = (~torch.isfinite(values.detach())).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise InvalidValueError(
            f"target {target} must be finite, got {float(values.detach()[first])}"
            + (f" in row {first}" if len(values) > 1 else "")
        )
    return values
