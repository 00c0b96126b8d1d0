"""How alike pictures are to a network: similarity of their Gram matrices, which keep what is seen and not where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.module_names import named_module
from spade_fast.attribution.visualization.feature_maps import last_feature_map


@contextmanager
def comparing(model: nn.Module, example: Tensor) -> Iterator[Callable[[int], Tensor]]:
    """Yield a function that tells how alike the images of the last forward pass are.

    It is given the number of pictures, of which the images are views in equal number, and returns the mean similarity
    of each picture with the others ``[N]``: the cosine of the Gram matrices of the last feature map with several
    positions (Olah, Mordvintsev and Schubert, Distill 2017).

    Raises
    ------
    ValueError
        The network has no such feature map.
    """
    found = last_feature_map(model, example)
    if found is None:
        raise InvalidValueError("several pictures cannot be compared: no module of the network returns feature maps")
    layer, channels = found
    maps: list[Tensor] = []

    def read(module: nn.Module, inputs: object, output: Any) -> None:
        maps[:] = [output.movedim(channels, 1).clone()]  # what follows may change it in place

    hook = named_module(model, layer).register_forward_hook(read)
    try:

        def similarity(count: int) -> Tensor:
            features = maps[0].float().unflatten(0, (count, -1)).movedim(1, 2).flatten(2)  # [N, C, views H W]
            grams = F.normalize((features @ features.mT).flatten(1), dim=1)
            return ((grams @ grams.mT).sum(1) - 1) / (count - 1)

        yield similarity
    finally:
        hook.remove()
