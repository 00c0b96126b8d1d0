"""What the tests of the studies share: the studies on the path, small networks, photos and emojis."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("captum", reason="the studies score Captum's methods")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")

sys.path.append(str(Path(__file__).parents[2]))

from spade_fast.inputs.networks import LoadedModel  # noqa: E402
from studies.shared.cases import Case  # noqa: E402
from studies.shared.photos import Photo  # noqa: E402
from studies.trojan import patches  # noqa: E402


@pytest.fixture
def emojis(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Discs, one colour per emoji, instead of the font's pictures."""

    def disc(emoji: str) -> Image.Image:
        rows, columns = np.mgrid[:100, :100] - 49.5
        picture = np.zeros((100, 100, 4), np.uint8)
        picture[rows**2 + columns**2 < 50**2] = (255, ord(emoji[0]) % 256, 0, 255)
        return Image.fromarray(picture)

    patches._picture.cache_clear()
    monkeypatch.setattr(patches, "_glyph", disc)
    yield
    patches._picture.cache_clear()


@pytest.fixture
def loaded() -> LoadedModel:
    """A small network with 1x1 convolutions, ``0`` and ``2``, on images of 24 pixels."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    return LoadedModel("small", module.eval(), (0.5,) * 3, (0.25,) * 3, 24, 24)


@pytest.fixture
def cases() -> list[Case]:
    """Four questions about two photos; the evidence is the left half of the image."""
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[:, :12] = True
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 3, 24, 24, generator=generator) for _ in range(4)]
    return [
        Case(f"case {n}", f"case {n}", f"photo {n // 2}", "x", image, n, mask, (n + 1) % 4, ~mask)
        for n, image in enumerate(images)
    ]


@pytest.fixture
def photos() -> Callable[..., list[Photo]]:
    """Makes photos of one colour each."""
    return lambda *colours: [
        Photo(f"photo {index}", Image.new("RGB", (40, 32), colour)) for index, colour in enumerate(colours)
    ]
