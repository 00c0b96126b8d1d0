"""Targets within outputs and layers: neurons, pixels, boxes, tokens and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import finite_floats, integer, kind
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.targets.network_outputs import (
    checked_logits,
    class_probabilities,
    described,
    detections_of,
    embedding_of,
    floating,
    logits_of,
    of_class,
    tokens_of,
)
from spade_fast.targets.target import Target


def neuron(layer: str, index: int | tuple[int | EllipsisType, ...]) -> Target:
    """Ask for the activation of a neuron or channel of a layer.

    Automatic sparsity keeps the activation.

    Parameters
    ----------
    layer : str
        Name of a module that runs once in a forward pass. If it returns a tuple, its first tensor is read; of an output
        of Hugging Face, ``last_hidden_state``.
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
        found = logits_of(output)
        found = tokens_of(output) if found is None else found
        values = floating(f"{name}: the layer's output", output if found is None else found)
        try:
            chosen = values[(slice(None), *place)]
        except IndexError as error:
            raise InvalidValueError(f"{name}: the layer returns {list(values.shape)}, with no such place") from error
        return chosen.flatten(1).mean(1) if chosen.dim() > 1 else chosen

    return Target(name, read, layer=layer)


def pixels(mask: Tensor | np.ndarray, index: int) -> Target:
    """Ask for the mean score of a class over some pixels of a segmentation.

    Automatic sparsity keeps the mean probability of the class over these pixels. The decision is for the class with the
    largest one.

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
    where = _tensor("mask", mask).clone()
    if where.dtype != torch.bool:
        raise InvalidTypeError(f"mask must be boolean, got {where.dtype}")
    if where.dim() != 2 or not bool(where.any()):
        raise InvalidValueError(f"mask must be [H, W] with at least one pixel, got {list(where.shape)}")
    name = f"class {integer('index', index, 0)} in {int(where.sum())} pixels"

    def logits(output: Any) -> Tensor:
        values = checked_logits(name, output, 4, "[S, classes, H, W]")
        if values.shape[2:] != where.shape:
            raise InvalidValueError(
                f"{name}: mask must have the size of the network's output, {list(values.shape[2:])}, got "
                f"{list(where.shape)}"
            )
        return values

    def means(values: Tensor) -> Tensor:
        return values[:, :, where.to(values.device)].mean(2)

    def probabilities(output: Any) -> Tensor:
        values = logits(output)
        return means(class_probabilities(values) if values.shape[1] > 1 else values.sigmoid())

    def answers(output: Any) -> Tensor:
        found = probabilities(output)
        return found if found.shape[1] > 1 else torch.cat([1 - found, found], 1)

    return Target(
        name,
        lambda output: of_class(name, means(logits(output)), index),
        lambda output: of_class(name, probabilities(output), index),
        answers=answers,
    )


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

    Automatic sparsity keeps its probability. The decision is among the tokens at the position.

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
        values = checked_logits(name, output, 3, "[S, positions, vocabulary]")
        if not -values.shape[1] <= position < values.shape[1]:
            raise InvalidValueError(f"{name}: the network returns {values.shape[1]} positions, {list(values.shape)}")
        return values[:, position]

    return Target(
        name,
        lambda output: of_class(name, logits(output), id),
        lambda output: of_class(name, class_probabilities(logits(output)), id),
        answers=lambda output: class_probabilities(logits(output)),
    )


def similarity(
    embedding: Tensor | np.ndarray | Sequence[float], mask: Tensor | np.ndarray | Sequence[int] | None = None
) -> Target:
    """Ask for the cosine similarity of a network's embedding to another, such as that of a sentence or picture.

    Automatic sparsity keeps the similarity.

    Parameters
    ----------
    embedding : Tensor, ndarray or sequence ``[D]`` or ``[1, D]``
        What is compared with the network's own embedding ``[S, D]``. That is its output, or the first that exists of
        the output's entries or attributes ``sentence_embedding``, ``image_embeds``, ``text_embeds``, ``pooler_output``
        and ``last_hidden_state``, or the first tensor of a tuple. Of tokens ``[S, T, D]`` it is the mean over all of
        them, padding included.
    mask : Tensor, ndarray or sequence ``[T]`` or ``[1, T]``, optional
        The tokens over which the mean is taken, such as the sample's ``attention_mask``: those that are not 0. The
        network's embedding is then the mean of its output, of ``last_hidden_state`` or of the first tensor of a tuple,
        as sentence encoders take it.

    Raises
    ------
    TypeError, ValueError
        `embedding` is not a finite vector, or is 0; `mask` has no tokens. When the target is read: the output has no
        embedding, or one of another length, or another number of tokens than the mask.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.targets import similarity
    >>> similarity([1.0, 0.0])(torch.tensor([[3.0, 4.0]]))
    tensor([0.6000])
    """
    other = finite_floats("embedding", _tensor("embedding", embedding))
    if not _is_vector(other):
        raise InvalidValueError(f"embedding must be [D] or [1, D] and not 0, got {list(other.shape)}")
    other = F.normalize(other.reshape(-1).clone(), dim=0)
    name = f"similarity to an embedding of {len(other)} numbers"
    chosen = None if mask is None else _tensor("mask", mask) != 0
    if chosen is not None and not _is_vector(chosen):
        raise InvalidValueError(f"mask must be [T] or [1, T] with at least one token, got {list(chosen.shape)}")

    def read(output: Any) -> Tensor:
        own = embedding_of(output) if chosen is None else tokens_of(output)
        if own is None:
            shape = "[S, D] or [S, T, D]" if chosen is None else "[S, T, D], of which mask chooses"
            raise InvalidTypeError(f"{name}: the network must return embeddings {shape}, got {described(output)}")
        if chosen is not None:
            if own.shape[1] != chosen.numel():
                raise InvalidValueError(f"{name}: mask has {chosen.numel()} tokens, the network's {own.shape[1]}")
            own = own[:, chosen.reshape(-1).to(own.device)].mean(1)
        own = floating(f"{name}: the network's embedding", own)
        if own.shape[1] != len(other):
            raise InvalidValueError(f"{name}: the network's embedding has {own.shape[1]}, {list(own.shape)}")
        return F.normalize(own, dim=1) @ other.to(own)

    return Target(name, read)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"{name} must be a tensor, an array or numbers, got {kind(value)}") from error


def _is_vector(values: Tensor) -> bool:
    """Whether values are ``[D]`` or ``[1, D]``, and not all 0."""
    return values.dim() > 0 and values.numel() == values.shape[-1] and bool(values.any())
