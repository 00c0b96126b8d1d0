"""The common targets: scores and probabilities of classes, neurons, pixels, boxes, tokens and similarities."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import finite_floats, integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.targets.network_outputs import (
    class_log_probabilities,
    class_probabilities,
    described,
    detections_of,
    embedding_of,
    floating,
    logits_of,
)
from spade_fast.targets.target import Target, class_number, function_target


def class_score(index: int) -> Target:
    """Ask for the score (logit) of a class, as the integer `index` as a target does.

    Automatic sparsity keeps the class's probability; with a single logit, the logit.

    Parameters
    ----------
    index : int
        A class of a network that returns logits ``[S, classes]``: as a tensor, as the entry or attribute ``logits`` or
        ``out`` of its output, or as the first tensor of a tuple.

    Raises
    ------
    TypeError, ValueError
        `index` is not an integer of at least 0. When the target is read: the output has no logits ``[S, classes]``, or
        no such class.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import class_score
    >>> class_score(2)(torch.tensor([[0.0, 1.0, 3.0]]))
    tensor([3.])
    """
    name = f"class {integer('index', index, 0)}"

    def keep(output: Any) -> Tensor:
        logits = _logits(name, output)
        return _class(name, class_probabilities(logits) if logits.shape[1] > 1 else logits, index)

    return Target(name, lambda output: _class(name, _logits(name, output), index), keep)


def log_probability(index: int) -> Target:
    """Ask for the logarithm of the probability of a class, which falls where other classes gain.

    Automatic sparsity keeps the probability.

    Parameters
    ----------
    index : int
        As in :func:`class_score`, of two or more classes. A network that ends in a softmax is recognised.

    Raises
    ------
    TypeError, ValueError
        As in :func:`class_score`.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import log_probability
    >>> log_probability(0)(torch.zeros(1, 4)).exp()
    tensor([0.2500])
    """
    name = f"log-probability of class {integer('index', index, 0)}"

    def read(output: Any) -> Tensor:
        return _class(name, class_log_probabilities(_logits(name, output, several=True)), index)

    return Target(name, read, lambda output: read(output).exp())


def class_against(index: int, other: int) -> Target:
    """Ask for the score of a class minus that of another: why the one rather than the other?

    Automatic sparsity keeps the probability of the class among these two, the sigmoid of the difference.

    Parameters
    ----------
    index, other : int
        Two classes, as in :func:`class_score`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`class_score`; or both are the same class.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import class_against
    >>> class_against(2, 1)(torch.tensor([[0.0, 1.0, 3.0]]))
    tensor([2.])
    """
    name = f"class {integer('index', index, 0)} against class {integer('other', other, 0)}"
    if index == other:
        raise InvalidValueError(f"index and other must be two classes, got {index} twice")

    def difference(values: Tensor) -> Tensor:
        return _class(name, values, index) - _class(name, values, other)

    return Target(
        name,
        lambda output: difference(_logits(name, output, several=True)),
        lambda output: difference(class_log_probabilities(_logits(name, output, several=True))).sigmoid(),
    )


def neuron(layer: str, index: int | tuple[int | EllipsisType, ...]) -> Target:
    """Ask for the activation of a neuron or channel of a layer.

    Automatic sparsity keeps the activation.

    Parameters
    ----------
    layer : str
        Name of a module that runs once in a forward pass. If it returns a tuple, its first tensor is read.
    index : int or tuple
        Its place in the layer's output for one sample, such as ``(5, 2, 3)`` in maps ``[S, C, h, w]``. If several
        numbers are there, their mean is taken: ``5`` is channel 5 of these maps, and ``(..., 5)`` feature 5 of tokens
        ``[S, T, D]`` or of maps with their channels last.

    Raises
    ------
    TypeError
        An argument has the wrong type.
    ValueError
        When the target is read: there is no such layer, it does not run or runs several times, or its output has no
        such place.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace
    >>> from spade_fast.targets import neuron
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Sigmoid(), torch.nn.Linear(16, 4))
    >>> sample = torch.randn(1, 8)
    >>> trace(model, sample + 0.1 * torch.randn(64, 8), inputs=sample, target=neuron("1", 3)).target
    "neuron 3 of layer '1'"
    """
    if not isinstance(layer, str):
        raise InvalidTypeError(f"layer must be the name of a module, got {layer!r}")
    place = index if isinstance(index, tuple) else (index,)
    for one in place:
        if one is not ...:
            integer("index", one)
    shown = ", ".join("..." if one is ... else str(one) for one in place)
    name = f"neuron {shown if len(place) == 1 else f'({shown})'} of layer {layer!r}"

    def read(output: Any) -> Tensor:
        values = floating(f"{name}: the layer's output", logits_of(output))
        try:
            found = values[(slice(None), *place)]
        except IndexError as error:
            raise InvalidValueError(f"{name}: the layer returns {list(values.shape)}, with no such place") from error
        return found.flatten(1).mean(1) if found.dim() > 1 else found

    return Target(name, read, layer=layer)


def pixels(mask: Tensor | np.ndarray, index: int) -> Target:
    """Ask for the mean score of a class over some pixels of a segmentation.

    Automatic sparsity keeps the mean probability of the class over these pixels.

    Parameters
    ----------
    mask : Tensor or ndarray ``[H, W]``, bool
        The pixels, such as those where the network sees the class, at the resolution of its output.
    index : int
        A class of a network that returns logits ``[S, classes, H, W]``; where as in :func:`class_score`.

    Raises
    ------
    TypeError, ValueError
        The mask is not boolean or is empty, or `index` is not an integer of at least 0. When the target is read: the
        output has no such logits or class, or they have another resolution.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import pixels
    >>> maps = torch.tensor([[[[1.0, 2.0, 6.0]]]])
    >>> pixels(torch.tensor([[True, True, False]]), 0)({"out": maps})
    tensor([1.5000])
    """
    where = torch.as_tensor(mask)
    if where.dtype != torch.bool:
        raise InvalidTypeError(f"mask must be boolean, got {where.dtype}")
    if where.dim() != 2 or not bool(where.any()):
        raise InvalidValueError(f"mask must be [H, W] with at least one pixel, got {list(where.shape)}")
    name = f"class {integer('index', index, 0)} in {int(where.sum())} pixels"

    def logits(output: Any) -> Tensor:
        values = _with_dimensions(name, output, 4, "[S, classes, H, W]")
        if values.shape[2:] != where.shape:
            raise InvalidValueError(
                f"{name}: mask must have the size of the network's output, {list(values.shape[2:])}, got "
                f"{list(where.shape)}"
            )
        return values

    def mean(values: Tensor) -> Tensor:
        return _class(name, values, index)[:, where.to(values.device)].mean(1)

    def keep(output: Any) -> Tensor:
        values = logits(output)
        return mean(class_probabilities(values) if values.shape[1] > 1 else values.sigmoid())

    return Target(name, lambda output: mean(logits(output)), keep)


def box(index: int) -> Target:
    """Ask for the score of a detected box.

    Automatic sparsity keeps the score.

    Parameters
    ----------
    index : int
        Its rank in the output of a detector: a list of one dict per image, with the entry ``scores`` in descending
        order, as in torchvision. A method that alters the image needs a detector that finds as many boxes in each
        altered image: give it a low threshold of scores.

    Raises
    ------
    TypeError, ValueError
        `index` is not an integer of at least 0. When the target is read: the output is not a list of detections, or the
        detector found fewer boxes.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import box
    >>> box(1)([{"scores": torch.tensor([0.9, 0.4])}])
    tensor([0.4000])
    """
    name = f"box {integer('index', index, 0)}"

    def read(output: Any) -> Tensor:
        detections = detections_of(output)
        if not detections:
            raise InvalidTypeError(
                f"{name}: the network must return detections, a list of dicts with the entry 'scores', got "
                f"{described(output)}"
            )
        for row, scores in enumerate(detections):
            if len(scores) <= index:
                where = f" in image {row}" if len(detections) > 1 else ""
                found = f"{len(scores)} box{'' if len(scores) == 1 else 'es'}"
                raise InvalidValueError(f"{name}: the detector found {found}{where}, which are counted from 0")
        return torch.stack([scores[index] for scores in detections])

    return Target(name, read)


def token(position: int, id: int) -> Target:
    """Ask for the score (logit) of a token at a position, of a language model or tagger.

    Automatic sparsity keeps its probability.

    Parameters
    ----------
    position : int
        In the sequence; -1 is the last one, after which a causal language model predicts the next token.
    id : int
        A token of the vocabulary, or a tag, of a network that returns logits ``[S, positions, vocabulary]``; where as
        in :func:`class_score`.

    Raises
    ------
    TypeError, ValueError
        `position` is not an integer, or `id` not one of at least 0. When the target is read: the output has no such
        logits, position or token.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import token
    >>> token(-1, 1)((torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), None))
    tensor([3.])
    """
    name = f"token {integer('id', id, 0)} at position {integer('position', position)}"

    def logits(output: Any) -> Tensor:
        values = _with_dimensions(name, output, 3, "[S, positions, vocabulary]")
        if not -values.shape[1] <= position < values.shape[1]:
            raise InvalidValueError(f"{name}: the network returns {values.shape[1]} positions, {list(values.shape)}")
        return values[:, position]

    return Target(
        name,
        lambda output: _class(name, logits(output), id),
        lambda output: _class(name, class_probabilities(logits(output)), id),
    )


def similarity(embedding: Tensor | np.ndarray | Sequence[float]) -> Target:
    """Ask for the cosine similarity of a network's embedding to another, such as that of a sentence or picture.

    Automatic sparsity keeps the similarity.

    Parameters
    ----------
    embedding : Tensor, ndarray or sequence ``[D]`` or ``[1, D]``
        What is compared with the network's own embedding ``[S, D]``. That is its output, or the first that exists of
        the output's entries or attributes ``sentence_embedding``, ``image_embeds``, ``text_embeds``, ``pooler_output``
        and ``last_hidden_state``, or the first tensor of a tuple. Of tokens ``[S, T, D]`` it is the mean over all of
        them; a network whose inputs are padded should return the mean over the others itself.

    Raises
    ------
    TypeError, ValueError
        `embedding` is not a finite vector, or is 0. When the target is read: the output has no embedding, or one of
        another length.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import similarity
    >>> similarity([1.0, 0.0])(torch.tensor([[3.0, 4.0]]))
    tensor([0.6000])
    """
    other = finite_floats("embedding", torch.as_tensor(embedding))
    if other.numel() != other.shape[-1] or not bool(other.any()):
        raise InvalidValueError(f"embedding must be [D] or [1, D] and not 0, got {list(other.shape)}")
    other = F.normalize(other.reshape(-1).clone(), dim=0)
    name = f"similarity to an embedding of {len(other)} numbers"

    def read(output: Any) -> Tensor:
        own = embedding_of(output)
        if own is None:
            raise InvalidTypeError(
                f"{name}: the network must return embeddings [S, D] or [S, T, D], got {described(output)}"
            )
        own = floating(f"{name}: the network's embedding", own)
        if own.shape[1] != len(other):
            raise InvalidValueError(f"{name}: the network's embedding has {own.shape[1]}, {list(own.shape)}")
        return F.normalize(own, dim=1) @ other.to(own)

    return Target(name, read)


def as_target(given: Any, names: Sequence[str] = ()) -> Target:
    """Return a class, by its index or name, or a function of the output as a `Target`.

    Parameters
    ----------
    names
        Names of the network's classes; empty if they are unknown.

    Raises
    ------
    TypeError, ValueError
        It is neither, or no class has this name.
    """
    return function_target(given) if callable(given) else class_score(_from_zero(class_number(given, names)))


def _from_zero(index: int) -> int:
    if index < 0:
        raise InvalidValueError(f"target must be a class of at least 0, got {index}")
    return index


def _logits(name: str, output: Any, several: bool = False) -> Tensor:
    """Return the logits ``[S, classes]`` in a network's output."""
    logits = _with_dimensions(name, output, 2, "[S, classes]")
    if several and logits.shape[1] == 1:
        raise InvalidValueError(
            f"{name}: the network returns a single logit: give spade_fast.inputs.two_classes(model)"
        )
    return logits


def _with_dimensions(name: str, output: Any, dimensions: int, shape: str) -> Tensor:
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


def _class(name: str, values: Tensor, index: int) -> Tensor:
    """Return what belongs to a class, or token, in the second dimension."""
    if index >= values.shape[1]:
        raise InvalidValueError(f"{name}: target must be a class from 0 to {values.shape[1] - 1}, got {index}")
    return values[:, index]
