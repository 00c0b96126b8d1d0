"""How alike pictures are: Gram matrices of the last feature map, wherever its channels are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.attribution.visualization.diversity import comparing


class Maps(nn.Module):
    """A layer whose channels are second, or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.mix: nn.Module = nn.Linear(3, 4) if last else nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.permute(0, 2, 3, 1)).mean((1, 2)) if self.last else self.mix(x).mean((2, 3))


def test_similarity_by_hand_with_channels_second_or_last() -> None:
    images = torch.randn(6, 3, 5, 7)  # three pictures, two views of each
    plain, turned = Maps(last=False), Maps(last=True)
    turned.mix.weight.data, turned.mix.bias.data = plain.mix.weight.data[..., 0, 0], plain.mix.bias.data
    features = plain.mix(images).unflatten(0, (3, 2)).movedim(1, 2).flatten(2)
    grams = torch.stack([one @ one.T for one in features]).flatten(1)
    pairs = F.cosine_similarity(grams[:, None], grams[None], dim=2)
    expected = (pairs.sum(1) - 1) / 2
    for network in (plain, turned):
        with comparing(network, images[:1]) as similarity:
            network(images)
            torch.testing.assert_close(similarity(3), expected)
        assert not network.mix._forward_hooks
