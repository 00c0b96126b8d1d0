"""Opening image files as RGB photos."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from spade_fast._util.errors import InvalidValueError, MissingFileError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import is_file, read_bytes


def open_photo(path: Path) -> Any:
    """Open an image file as an RGB `PIL.Image.Image`.

    Raises
    ------
    FileNotFoundError, OSError
        The file does not exist or cannot be read.
    ValueError
        The file is not an image, is damaged, or has too many pixels.
    ImportError
        Pillow is not installed.
    """
    with extra_for("photos need"):
        from PIL import Image
    if not is_file(path):
        raise MissingFileError(f"no such image file: {path}")
    contents = read_bytes(path)
    try:
        with Image.open(io.BytesIO(contents)) as photo:
            if photo.mode.startswith("I;16"):  # convert() would clip 16-bit values at 255
                return Image.fromarray((np.asarray(photo) // 257).astype(np.uint8)).convert("RGB")
            return photo.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidValueError(f"not an image file, or damaged: {path}") from error
