"""Tensors inside of the arguments of a model: in lists, tuples, dicts and packed sequences, at any depth."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

_Value = TypeVar("_Value")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value; those of a packed sequence are its data."""
    leaves = [one.data if isinstance(one, PackedSequence) else one for one in tree_leaves(value)]
    return [one for one in leaves if isinstance(one, Tensor)]


def moved_to(device: torch.device, value: _Value) -> _Value:
    """Return the value with its tensors on a device."""

    def move(leaf: Any) -> Any:
        movable: Any = leaf  # the types of PackedSequence.to know no devices
        return movable.to(device) if isinstance(leaf, (Tensor, PackedSequence)) else leaf

    moved: _Value = tree_map(move, value)
    return moved
