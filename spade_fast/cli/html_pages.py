"""What the HTML pages share: templates that refer to nothing outside the page, and pictures as data URLs."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from spade_fast._util.extras import extra_for

# JPEG quality: single-pixel evidence stays sharp, and a page with a dozen maps stays below a megabyte.
_QUALITY, _SMALL_QUALITY = 90, 70


def render_template(name: str, **content: Any) -> str:
    """Fill in a template of this package; text is escaped."""
    with extra_for("the page needs"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("spade_fast.cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = "{:.1%}".format
    return environment.get_template(name).render(**content)


def data_url(colours: np.ndarray, small: bool = False) -> str:
    """Encode an image as a data URL; colours between 0 and 1, ``[H, W, 3]``. `small` is for thumbnails."""
    from PIL import Image

    quality, subsampling = (_SMALL_QUALITY, 2) if small else (_QUALITY, 0)
    picture = Image.fromarray((colours * 255).round().astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
