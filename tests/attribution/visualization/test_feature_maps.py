"""The last feature map of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spade_fast.attribution.visualization.feature_maps import last_feature_map


class LastAreChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.permute(0, 2, 3, 1)).relu().mean((1, 2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class OneColumn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True)


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ("1", 1)),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten()), ("0.1", 1)),
        (nn.Sequential(Block(), nn.Flatten()), ("0", 1)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), OneColumn(), nn.Flatten()), ("0", 1)),
        (LastAreChannels(), ("features", 3)),
        (nn.Sequential(nn.Flatten(), nn.Linear(216, 2)), None),
    ],
)
def test_the_last_feature_map(network: nn.Module, found: tuple[str, int] | None) -> None:
    network.train()
    assert last_feature_map(network, torch.randn(1, 3, 9, 8)) == found
    assert network.training and not any(module._forward_hooks for module in network.modules())
