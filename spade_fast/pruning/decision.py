"""`Decision`: the classes, or other answers, that the dense network and a trace give for the trace's sample."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from spade_fast._util.checks import is_number
from spade_fast._util.errors import InvalidValueError
from spade_fast.targets.network_outputs import class_probabilities, described, logits_of
from spade_fast.targets.target import Target

_lock = threading.RLock()  # the global random state is set by one thread at a time


@dataclass(frozen=True)
class Decision:
    """The classes that the dense network and a trace predict for the trace's sample.

    If a target asks for something else, its answers take the place of the classes: the two of `class_against`, the
    tokens of a position, the classes of some pixels.

    Attributes
    ----------
    class_before, class_after : int
        Class that the dense network and the trace predict.
    probability_before, probability_after : float
        Probability that each gives to its own class.
    probability_after_of_class_before : float
        Probability that the trace gives to the dense network's class.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import Decision
    >>> decision = Decision.between(torch.tensor([0.1, 0.9]), torch.tensor([0.7, 0.3]))
    >>> decision.class_before, decision.class_after, decision.kept
    (1, 0, False)
    """

    class_before: int
    probability_before: float
    class_after: int
    probability_after: float
    probability_after_of_class_before: float

    @classmethod
    def between(cls, dense: Tensor, pruned: Tensor) -> Decision:
        """Compare the probabilities ``[classes]`` that the dense network and the trace give for the sample.

        If several classes tie, the first of them is the prediction.
        """
        before, after = int(dense.argmax()), int(pruned.argmax())
        return cls(before, float(dense[before]), after, float(pruned[after]), float(pruned[before]))

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> Decision:
        """Make a decision of the entries of a trace's file; ValueError if they are not those of one."""
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, Mapping) or sorted(entries) != sorted(names):
            raise InvalidValueError(f"a decision has the entries {', '.join(names)}")
        for name, value in entries.items():
            is_class = name in ("class_before", "class_after")
            fits = isinstance(value, int) and value >= 0 if is_class else is_number(value) and math.isfinite(value)
            if isinstance(value, bool) or not fits:
                raise InvalidValueError(f"a decision has {name} {value!r}")
        return cls(**entries)

    @property
    def kept(self) -> bool:
        """Whether the trace predicts the class that the dense network predicts."""
        return self.class_before == self.class_after

    def __str__(self) -> str:
        before = f"class {self.class_before} ({self.probability_before:.1%})"
        if self.kept:
            return f"{before}, kept ({self.probability_after:.1%})"
        left = f"class {self.class_before}: {self.probability_after_of_class_before:.1%}"
        return f"{before}, lost to class {self.class_after} ({self.probability_after:.1%}; {left})"


def predict(network: Callable[..., Any], *inputs: Any, **named_inputs: Any) -> Tensor:
    """Return the :func:`probabilities` that a network predicts for one sample.

    Random numbers that it draws are the same in each call, and the global random state is restored.
    """
    return probabilities(repeatable(network, *inputs, **named_inputs))


def repeatable(network: Callable[..., Any], *inputs: Any, **named_inputs: Any) -> Any:
    """Return a network's output; random numbers are as in :func:`predict`."""
    tensors = (one for one in tree_leaves((inputs, named_inputs)) if isinstance(one, Tensor))
    with _lock, torch.random.fork_rng({one.device for one in tensors if one.is_cuda}):
        torch.manual_seed(0)
        return network(*inputs, **named_inputs)


def answer_probabilities(target: Target | None, output: Any) -> Tensor:
    """Return the probabilities of all answers to what a target asks of an output: of the classes, unless it says so.

    Raises
    ------
    ValueError
        As :func:`probabilities`, or the target's answers are not finite numbers ``[1, answers]``.
    """
    if target is None or target.answers is None:
        return probabilities(output)
    found = target.answers(output)
    if found.dim() != 2 or len(found) != 1 or not bool(torch.isfinite(found).all()):
        raise InvalidValueError(
            f"target {target}: answers must be finite numbers [1, answers], got {list(found.shape)}"
        )
    return found.detach()[0].cpu()


def probabilities(output: Any) -> Tensor:
    """Return the probabilities ``[classes]`` in a network's output for one sample, on the CPU, in at least float32.

    They are the softmax of the output's logits, or these themselves if the network ends in a softmax.

    Raises
    ------
    ValueError
        The output has no row of finite logits ``[1, classes]`` of two or more classes.
    """
    logits = logits_of(output)
    if logits is None or not logits.is_floating_point() or logits.dim() != 2 or len(logits) != 1:
        given = described(output) if logits is None else list(logits.shape)
        raise InvalidValueError(f"the model must return one row of logits for one image, got {given}")
    if logits.shape[1] < 2:
        raise InvalidValueError("the model returns a single logit: give spade_fast.inputs.two_classes(model)")
    if not bool(torch.isfinite(logits).all()):
        raise InvalidValueError(f"the model returns NaN or infinite logits in {logits.dtype}")
    return class_probabilities(logits.detach())[0].cpu()
