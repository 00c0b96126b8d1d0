"""Gram matrices of layers, one for all layers that have had the same inputs, such as the projections of attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_COMPARED_FIRST = 8  # entries of the diagonal


@dataclass(frozen=True)
class Call:
    """The input of a layer in one call.

    The `geometry` is all else that decides which product of it is added to the Gram matrix, and how: also the strides
    of the input, on which roundings may depend.
    """

    x: Tensor
    geometry: Any

    def equals(self, other: Call) -> bool:
        """Whether the other call has the same product, since its input has the same values."""
        a, b = self.x, other.x
        return self.geometry == other.geometry and (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a, b)

    def copy(self) -> Call:
        """Return a call whose input nobody can change."""
        return Call(self.x.clone(), self.geometry)


def summable(inputs: Tensor, gram: Tensor) -> Tensor:
    """Return inputs in a dtype in which their products can be added to a Gram matrix."""
    return inputs if inputs.dtype == torch.bfloat16 and gram.dtype == torch.float32 else inputs.to(gram.dtype)


@dataclass(eq=False)
class _Sum:
    """A Gram matrix and the layers whose it is.

    If some of its layers have had another call since, `ahead` is the sum with that call, which is the `latest` of that
    sum.
    """

    gram: Tensor
    layers: set[str]
    ahead: _Sum | None = None
    latest: Call | None = None


class GramSums:
    """Sums the products of layers' inputs; layers whose inputs have been equal so far share one sum.

    Which layers share is found after their first call, by comparing their sums. From then on the first of them that is
    called leaves for a copy of the sum, with its product added; the others follow without a product of their own if
    their inputs have the same values. So every sum is, bit for bit, what it would be alone, whatever a network does to
    its activations between two calls, and there are never more sums than layers. On a GPU, where comparing would wait
    for queued work, nothing is shared.

    Attributes
    ----------
    grams : dict of Tensor ``[G, C, C]``
        By layer; layers may share a tensor.
    """

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self._sums: dict[str, _Sum] = {}
        self._first: weakref.WeakValueDictionary[Any, _Sum] = weakref.WeakValueDictionary()

    def add(
        self, layer: str, call: Call | None, zeros: Callable[[], Tensor], add_product: Callable[[Tensor], None]
    ) -> None:
        """Add the product of a call to the sum of a layer.

        Parameters
        ----------
        layer
            Name of the layer.
        call
            The call, or None if it cannot be compared with others.
        zeros
            Makes the layer's Gram matrix.
        add_product
            Adds the product of the call to a Gram matrix in place.
        """
        if call is not None and not call.x.is_cpu:
            call = None
        own = self._sums.get(layer)
        if own is None:
            own = _Sum(zeros(), set())
            add_product(own.gram)
            self._move(layer, own if call is None else self._equal(own))
        elif call and own.ahead and own.ahead.latest and own.ahead.latest.equals(call):
            self._move(layer, own.ahead)
        elif len(own.layers) == 1:
            own.ahead = own.latest = None
            add_product(own.gram)
        else:
            with torch.inference_mode(False):  # see `zeros`
                ahead = _Sum(own.gram.clone(), set(), latest=call and call.copy())
            add_product(ahead.gram)
            if own.ahead:
                own.ahead.latest = None
            own.ahead = ahead
            self._move(layer, ahead)

    def drop(self, layer: str) -> None:
        """Forget a layer's sum."""
        self.grams.pop(layer, None)
        own = self._sums.pop(layer, None)
        if own is not None:
            own.layers.remove(layer)
            if not own.layers and own.ahead:
                own.ahead.latest = None

    def _move(self, layer: str, target: _Sum) -> None:
        """Make `target` the sum of a layer."""
        self.drop(layer)
        target.layers.add(layer)
        self._sums[layer], self.grams[layer] = target, target.gram

    def _equal(self, new: _Sum) -> _Sum:
        """Return the sum of a layer after its first call, `new`, or the equal one of another layer."""
        gram = new.gram
        key = (gram.shape, gram.dtype, *gram[0].diagonal()[:_COMPARED_FIRST].tolist())
        other = self._first.setdefault(key, new)
        return other if other is not new and torch.equal(other.gram, gram) else new
