"""Whether two networks predict the same: agreement of the outputs of a dense and a pruned network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spade_fast._util.checks import class_indices, finite_floats
from spade_fast._util.errors import InvalidValueError
from spade_fast.attribution.metrics.function_targets import kept_of_each, targets_of_each
from spade_fast.targets.target import Target, TargetLike

LOGITS = "samples, classes"


@dataclass(frozen=True)
class Agreement:
    """Agreement of the outputs of a pruned network with those of the dense network.

    Attributes
    ----------
    same_top : Tensor ``[S]``, float64
        1 where both have the same top class, otherwise 0.
    probability_difference : Tensor ``[S]``, float64
        Absolute difference of the target's softmax probabilities, or of what automatic sparsity would keep of a target
        function.
    logit_distance : Tensor ``[S]``, float64
        ``‖dense - pruned‖ / ‖dense‖``, Euclidean; NaN where the dense logits are all zero.
    """

    same_top: Tensor
    probability_difference: Tensor
    logit_distance: Tensor


def agreement(
    dense: Tensor, pruned: Tensor, targets: TargetLike | Sequence[TargetLike] | Tensor | None = None
) -> Agreement:
    """Compare the outputs of a pruned network with those of the dense network on the same samples.

    Parameters
    ----------
    dense, pruned : Tensor ``[S, classes]``
        Finite logits.
    targets : int, callable, sequence, Tensor ``[S]`` or None
        Index of the class, or a function of the logits that returns one number per sample, such as those of
        :mod:`spade_fast.targets`: one for all samples, or one per sample. None for the dense network's top class.

    Returns
    -------
    Agreement
        If several classes tie, the first of them is the top class.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape or is out of range, logits are NaN or infinite, or a target reads a
        layer, not the logits.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.agreement(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])).same_top
    tensor([1.], dtype=torch.float64)
    """
    dense = finite_floats("dense", dense, LOGITS).double()
    pruned = finite_floats("pruned", pruned, LOGITS).to(dense)
    if dense.shape != pruned.shape:
        raise InvalidValueError(
            f"dense and pruned must have the same shape, got {list(dense.shape)} and {list(pruned.shape)}"
        )
    top = dense.argmax(1)
    functions = targets_of_each(targets, len(dense))
    for one in functions:
        if one.layer is not None:
            raise InvalidValueError(f"agreement compares logits, but target {one} reads a layer")
    if functions:
        kept, kept_pruned = (_kept(functions, given) for given in (dense, pruned))
    else:
        classes = top if targets is None else class_indices("targets", targets, len(dense), dense.device)
        kept, kept_pruned = (class_probabilities(given, classes) for given in (dense, pruned))
    norm = dense.norm(dim=1)
    return Agreement(
        (pruned.argmax(1) == top).double(),
        (kept - kept_pruned).abs(),
        ((dense - pruned).norm(dim=1) / norm).masked_fill(norm == 0, math.nan),
    )


def _kept(functions: Sequence[Target], logits: Tensor) -> Tensor:
    return kept_of_each(functions, lambda _: logits)


def class_probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the probability ``[S]`` of one class per sample; ValueError for a class beyond ``[S, classes]``."""
    if logits.shape[1] == 1:
        raise InvalidValueError("a single logit has no softmax: give those of spade_fast.inputs.two_classes(model)")
    if bool(((classes < 0) | (classes >= logits.shape[1])).any()):
        raise InvalidValueError(f"targets must be classes from 0 to {logits.shape[1] - 1}, got {classes.tolist()}")
    return logits.double().softmax(1).gather(1, classes[:, None])[:, 0]
