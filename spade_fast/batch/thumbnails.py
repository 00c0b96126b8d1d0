"""Small pictures of samples, as the network sees them, which reports contain as text."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.extras import is_installed
from spade_fast.inputs.networks import LoadedModel

SIDE = 112  # pixels
_QUALITY = 80


def thumbnail(image: Tensor, model: LoadedModel) -> str | None:
    """Encode a network's input ``[1, C, H, W]`` as a small JPEG file in base64; None if it is no picture."""
    channels = image.shape[1]
    if channels not in (1, 3) or len(model.mean) not in (1, channels) or not is_installed("PIL"):
        return None
    from PIL import Image

    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
    size = [max(1, round(side * min(1, SIDE / max(image.shape[-2:])))) for side in image.shape[-2:]]
    colours = F.interpolate(image.float() * std + mean, size, mode="area").clamp(0, 1)[0].expand(3, -1, -1)
    file = io.BytesIO()
    pixels = (255 * colours).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def decode_thumbnail(encoded: Any) -> np.ndarray | None:
    """Decode a picture to an ndarray ``[H, W, 3]``, uint8; None for anything that `thumbnail` did not make."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded)), formats=["JPEG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (TypeError, ValueError, OSError, binascii.Error):
        return None
