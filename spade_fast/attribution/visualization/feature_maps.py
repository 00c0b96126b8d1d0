"""Where a network has its last feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.modes import evaluation_mode
from spade_fast.attribution.layouts import Layouts


def last_feature_map(model: nn.Module, image: Tensor) -> tuple[str, int] | None:
    """Find the last module that returns a feature map with several positions.

    Parameters
    ----------
    model
        A network.
    image
        Its input ``[N, C, H, W]``.

    Returns
    -------
    (str, int) or None
        The name of the module, of those that return the same map the innermost, and the dimension of the channels.
    """
    outputs: list[tuple[str, Any]] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        if not outputs or output is not outputs[-1][1] or not list(module.children()):
            outputs.append((name, output))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with evaluation_mode(model), torch.no_grad(), Layouts(image) as layouts:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    for name, output in reversed(outputs):
        channels = layouts.channels(output) if isinstance(output, Tensor) else None
        if channels is not None and has_positions(output, channels):
            return name, channels
    return None


def has_positions(output: Tensor, channels: int) -> bool:
    """Whether an output, with its channels in this dimension, is a feature map with several positions."""
    return output.dim() == 4 and output.numel() > len(output) * output.shape[channels]
