"""A small network for tests of attribution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """Maps images of 3 channels to 5 classes; reuses its activation and calls another as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.act = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.act(self.conv2(self.act(self.conv1(x))))
        x = F.relu(x - 0.05)
        return self.head(x.mean((2, 3))) * (1 if scale is None else scale)
