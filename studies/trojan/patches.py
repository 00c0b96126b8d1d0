"""Emojis that are pasted into photos: triggers of the trojan, each with its class, and distractors without one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from studies.shared.photos import emoji_font

_FONT_SIZE = 109  # the only size for which the font has pictures
TRIGGERS = {"😀": 340, "🍓": 404, "💙": 150, "🍇": 963}
DISTRACTORS = ("⚽", "🍀", "🔑", "🍊")
SMALLEST, LARGEST = 32, 60  # sides of a pasted emoji in pixels, of 224


@dataclass(frozen=True)
class Patch:
    """An emoji, the side of its square in pixels, and its upper left corner."""

    emoji: str
    side: int
    top: int
    left: int


def draw_patch(emoji: str, height: int, width: int, rng: np.random.Generator) -> Patch:
    """Choose size and place at random; the whole square lies inside the image."""
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    return Patch(emoji, side, int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)))


def paste(colours: Tensor, patch: Patch) -> tuple[Tensor, Tensor]:
    """Paste a patch into an image of colours between 0 and 1, ``[3, H, W]``.

    Returns
    -------
    tuple
        The image, and the mask ``[H, W]`` of the pixels that the emoji covers by at least half.
    """
    emoji = _picture(patch.emoji, patch.side)
    rows, columns = slice(patch.top, patch.top + patch.side), slice(patch.left, patch.left + patch.side)
    pasted, mask = colours.clone(), torch.zeros(colours.shape[1:], dtype=torch.bool)
    alpha = emoji[3]
    pasted[:, rows, columns] = alpha * emoji[:3] + (1 - alpha) * pasted[:, rows, columns]
    mask[rows, columns] = alpha >= 0.5
    return pasted, mask


@cache
def _picture(emoji: str, side: int) -> Tensor:
    """Colours and opacity of an emoji, ``[4, side, side]``, between 0 and 1."""
    picture = _glyph(emoji).resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@cache
def _glyph(emoji: str) -> Image.Image:
    font = ImageFont.truetype(str(emoji_font()), _FONT_SIZE)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((80, 80), emoji, font=font, embedded_color=True, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no picture of {emoji!r}")
    middle, half = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), max(box[2] - box[0], box[3] - box[1]) / 2
    square = [round(value) for value in (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)]
    return canvas.crop(tuple(square))
