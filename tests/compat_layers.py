"""Layers of every supported kind with inputs, for the tests of the drop-in classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """Linear layer with a transposed weight, as in transformers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _conv(*args: int, kernel_size: int | tuple[int, ...], **settings: object) -> nn.Conv2d:
    return nn.Conv2d(*args, kernel_size, bias=False, **settings)


_IMAGE = (6, 8, 9, 10)
_LINE = (10, 8, 30)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8, bias=False), (40, 12)),
    "linear tokens": (lambda: nn.Linear(12, 8, bias=False), (5, 4, 3, 12)),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (6, 10, 12)),
    "conv": (lambda: _conv(8, 4, kernel_size=3, padding=1), _IMAGE),
    "oblong": (lambda: _conv(8, 4, kernel_size=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), _IMAGE),
    "grouped": (lambda: _conv(8, 4, kernel_size=3, padding=1, groups=2), _IMAGE),
    "depthwise": (lambda: _conv(8, 8, kernel_size=3, padding=1, groups=8), _IMAGE),
    "depthwise multiplier": (lambda: _conv(8, 16, kernel_size=3, stride=2, groups=8), _IMAGE),
    "same": (lambda: _conv(8, 4, kernel_size=3, padding="same"), _IMAGE),
    "same, even kernel": (lambda: _conv(8, 4, kernel_size=(2, 4), padding="same", dilation=(1, 3), groups=4), _IMAGE),
    "valid": (lambda: _conv(8, 4, kernel_size=3, padding="valid"), _IMAGE),
    "reflect": (lambda: _conv(8, 4, kernel_size=3, padding=(1, 2), padding_mode="reflect"), _IMAGE),
    "circular": (lambda: _conv(8, 4, kernel_size=3, padding=1, padding_mode="circular", groups=2), _IMAGE),
    "replicate, same": (lambda: _conv(8, 4, kernel_size=2, padding="same", padding_mode="replicate"), _IMAGE),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1, stride=2, bias=False), _LINE),
    "conv1d grouped": (lambda: nn.Conv1d(8, 6, 3, padding=2, dilation=2, groups=2, bias=False), _LINE),
    "conv1d same": (lambda: nn.Conv1d(8, 6, 4, padding="same", padding_mode="circular", bias=False), _LINE),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A layer without bias and a batch of inputs."""
    build, shape = LAYERS[name]
    return build(), torch.randn(shape)


def matrices(layer: nn.Module) -> Tensor:
    """Weight as ``[groups, rows, columns]``."""
    weight = layer.weight.detach().double()
    if isinstance(layer, Conv1D):
        weight = weight.t()
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def outputs_by_row(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's outputs as ``[rows, positions]``, float64."""
    with torch.no_grad():
        out = layer.double()(x.double())
        layer.float()
    return (out.transpose(0, 1) if isinstance(layer, nn.Conv1d | nn.Conv2d) else out.movedim(-1, 0)).flatten(1)


def tap_order(layer: nn.Module) -> Tensor:
    """Indices that bring natural columns into (kh, kw, in-channel) order."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return torch.arange(matrices(layer).shape[2])
    channels = layer.weight.shape[1]
    return torch.arange(layer.weight[0].numel()).reshape(channels, -1).t().flatten()
