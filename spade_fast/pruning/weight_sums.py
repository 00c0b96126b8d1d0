"""Follows parameters through sums that a network uses as weights, such as ``w + B @ A`` of LoRA written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class WeightSums:
    """The tensors that a forward pass computes without its inputs, and the parameters that were added to make them.

    Parameters
    ----------
    model
        The model that runs. Its parameters and buffers do not depend on the inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {
            one.untyped_storage().data_ptr()
            for one in (*model.parameters(), *model.buffers())
            if one.layout == torch.strided
        }
        self._terms = WeakTensorKeyDictionary()  # of each tensor that was computed without inputs

    def among(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of the tensors is such a sum."""
        return any(self._terms.get(one) for one in tensors)

    def follow(
        self, tensors: Sequence[Tensor], results: Iterable[Tensor], added: Mapping[str, Any], product: bool
    ) -> dict[str, Any]:
        """Record a call; return the parameters in sums that it multiplies by something that depends on the inputs.

        Parameters
        ----------
        tensors
            What the function was given.
        results
            What it returned.
        added
            The function, for each parameter that it added or joined to something.
        product
            Whether it is a matrix product or a convolution.

        Returns
        -------
        dict
            By name, the function that added the parameter.
        """
        given = [self._terms.get(one) for one in tensors]
        constant = all(
            known is not None or (one.layout == torch.strided and one.untyped_storage().data_ptr() in self._own)
            for one, known in zip(tensors, given, strict=True)
        )
        terms = {name: function for known in given if known for name, function in known.items()}
        for result in results:
            if constant:
                self._terms[result] = {**added, **({} if product else terms)}
            else:
                self._terms.pop(result, None)
        return terms if product and not constant else {}
