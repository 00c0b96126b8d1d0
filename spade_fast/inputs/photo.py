"""Opening image files: which formats are read, up to which size, and one error for whatever is wrong with a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spade_fast._util.errors import InvalidValueError, MissingFileError, UserError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import is_file, read_bytes, reading
from spade_fast.inputs.pil_pixels import GREY, Upright, flatten, object_mask, upright

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

# Names that Pillow gives to raster formats. Some of its other decoders run programs (EPS starts Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_MOST_BYTES = 2**31


def photo_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes of the formats that are read."""
    with extra_for("photos need"):
        from PIL import Image
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def open_photo(path: Path, ground: tuple[int, int, int] = GREY) -> Image:
    """Open an image file as an upright RGB `PIL.Image.Image` with 8 bits per channel.

    The formats are AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM (PBM, PGM, PFM), TIFF and WebP, as far as Pillow was built
    with them. The image is turned as its EXIF orientation says. More than 8 bits are scaled by the range that the
    format states, otherwise by that of the type; floating-point pixels are colours between 0 and 1. Of an animation or
    a file with several pages, the first is read. Colour profiles are ignored.

    Parameters
    ----------
    path : Path
    ground : (int, int, int)
        RGB colour behind transparent pixels, from 0 to 255.

    Raises
    ------
    FileNotFoundError, OSError
        The file does not exist or cannot be read.
    ValueError
        The file is not an image of these formats, is damaged, has pixels outside its range, or has more pixels than
        Pillow's limit (twice ``PIL.Image.MAX_IMAGE_PIXELS``, about 179 million).
    ImportError
        Pillow is not installed.

    Examples
    --------
    >>> from spade_fast.inputs import demo_photo, open_photo
    >>> open_photo(demo_photo()).mode
    'RGB'
    """
    return flatten(read_photo(path).image, ground)


def read_photo(path: Path) -> Upright:
    """Open an image file as `open_photo` does, but keep its transparency."""
    with _opened(path) as image:
        return upright(image, str(path))


def read_mask(path: Path) -> Image:
    """Open an image file as a mask: an upright `PIL.Image.Image` of mode L, 255 where it is visible and not black.

    Raises
    ------
    FileNotFoundError, OSError, ValueError, ImportError
        As in `open_photo`; or a colour image has more than 8 bits per channel, of which Pillow drops the lowest.
    """
    with _opened(path) as image:
        return object_mask(image, str(path))


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """Open an image file without decoding its pixels."""
    with extra_for("photos need"):
        from PIL import Image
    if not is_file(path):
        raise MissingFileError(f"no such image file: {path}")
    with reading(path):
        length = path.stat().st_size
    if length > _MOST_BYTES:
        raise InvalidValueError(f"image files may have up to {_MOST_BYTES} bytes, got {length}: {path}")
    contents = read_bytes(path)
    Image.init()
    reasons = []
    # Not Image.open: its error for too many pixels does not tell the size, and half as many are a warning.
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accepts = Image.OPEN[name]
        accepted = accepts is None or accepts(contents[:16])
        if not accepted:
            continue
        if isinstance(accepted, str):
            reasons.append(accepted)
            continue
        try:
            image = factory(io.BytesIO(contents), "")
        except (MemoryError, UserError):
            raise
        except Exception as error:  # decoders of damaged files raise errors of many kinds
            reasons.append(str(error))
            continue
        with image:
            _check_size(image.size, path)
            yield image
        return
    reason = "; ".join(reasons) or f"the formats are {', '.join(FORMATS)}"
    raise InvalidValueError(f"not an image file, or damaged: {path} ({reason})")


def _check_size(size: tuple[int, int], path: Path) -> None:
    from PIL import Image

    limit = None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise InvalidValueError(
            f"{path} has {size[0]} x {size[1]} pixels, more than Pillow's limit of {limit} "
            "(twice PIL.Image.MAX_IMAGE_PIXELS)"
        )
