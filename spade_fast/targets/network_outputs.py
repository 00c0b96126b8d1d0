"""Reads logits, probabilities, embeddings and detections from what networks return: tensors, tuples, mappings, objects.

Mappings include the outputs of Hugging Face's models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError

_LOGITS = ("logits", "out")  # of Hugging Face; of torchvision's segmentation
_EMBEDDINGS = ("sentence_embedding", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state")


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in a network's output, or None if it has none.

    They are the output itself if it is a tensor, its entry or attribute ``logits`` or ``out``, or the first tensor of a
    tuple.
    """
    return _tensor(output, _LOGITS)


def embedding_of(output: Any) -> Tensor | None:
    """Return the embedding ``[S, D]`` in a network's output, or None if it has none.

    It is the output itself if it is a tensor, its entry or attribute ``sentence_embedding``, ``image_embeds``,
    ``text_embeds``, ``pooler_output`` or ``last_hidden_state``, the first of these that exists, or the first tensor of
    a tuple. Of tokens ``[S, T, D]`` it is the mean.
    """
    found = _tensor(output, _EMBEDDINGS)
    if found is not None and found.dim() == 3:
        found = found.mean(1)
    return found if found is not None and found.dim() == 2 else None


def tokens_of(output: Any) -> Tensor | None:
    """Return the tokens ``[S, T, D]`` in a network's output, or None if it has none.

    They are the output itself if it is a tensor, its entry or attribute ``last_hidden_state``, or the first tensor of a
    tuple.
    """
    found = _tensor(output, ("last_hidden_state",))
    return found if found is not None and found.dim() == 3 else None


def detections_of(output: Any) -> list[Tensor] | None:
    """Return the scores ``[boxes]`` of each image's detections, or None unless they are what torchvision returns."""
    if not isinstance(output, list | tuple) or not all(isinstance(one, Mapping) and "scores" in one for one in output):
        return None
    return [one["scores"] for one in output]


def described(output: Any) -> str:
    """Describe a network's output in messages."""
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor {list(output.shape)}"
    name = type(output).__name__
    return f"{name} with the entries {', '.join(map(str, output))}" if isinstance(output, Mapping) else name


def class_probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of classes, the second dimension of ``[S, classes, ...]``, in at least float32.

    They are the softmax, or the logits themselves if the network ends in a softmax.
    """
    values = _promoted(logits)
    return values if _are_probabilities(logits) else values.softmax(1)


def class_log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms of :func:`class_probabilities`."""
    values = _promoted(logits)
    return values.log() if _are_probabilities(logits) else values.log_softmax(1)


def floating(what: str, values: Any) -> Tensor:
    """Return values if they are a floating-point tensor; otherwise raise TypeError that says what they are."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise InvalidTypeError(f"{what} must be a floating-point tensor, got {described(values)}")
    return values


def checked_logits(name: str, output: Any, dimensions: int, shape: str) -> Tensor:
    """Return the logits in a network's output; TypeError or ValueError unless they have so many dimensions."""
    logits = logits_of(output)
    if logits is None:
        raise InvalidTypeError(
            f"{name}: the network returns {described(output)}, without logits: give a function of that as target"
        )
    logits = floating(f"{name}: the network's logits", logits)
    if logits.dim() != dimensions:
        others = {2: "class_score", 3: "token", 4: "pixels"}
        hint = f": use spade_fast.targets.{others[logits.dim()]}" if logits.dim() in others else ""
        raise InvalidValueError(f"{name}: the network must return {shape}, got {list(logits.shape)}{hint}")
    return logits


def of_class(name: str, values: Tensor, index: int) -> Tensor:
    """Return what belongs to a class, or token, in the second dimension."""
    if index >= values.shape[1]:
        raise InvalidValueError(f"{name}: target must be a class from 0 to {values.shape[1] - 1}, got {index}")
    return values[:, index]


def _tensor(output: Any, names: Sequence[str]) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in names:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    first = output[0] if isinstance(output, list | tuple) and output else None
    return first if isinstance(first, Tensor) else None


def _promoted(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _are_probabilities(logits: Tensor) -> bool:
    rounding = torch.finfo(logits.dtype).eps * logits.shape[1]
    values = _promoted(logits.detach())
    return bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() <= rounding).all())
