"""Pixels of PIL images of every mode: upright, 8 bits per channel, in front of a ground, as a mask, resized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spade_fast._util.errors import InvalidValueError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

GREY = (128, 128, 128)
# How to turn an image of each EXIF orientation, by the names of PIL.Image.Transpose.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_KEYS_OF_ORIENTATION = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 258, 262, 339  # tags of EXIF and TIFF
# Vector formats, whose pixels another program draws.
_DRAWN = ("EPS", "WMF")
_WIDEST_FILTER = 3  # Lanczos, in pixels to each side
_LARGE = 2**24  # pixels, 50 MB


class Upright(NamedTuple):
    """An image as it was read.

    Attributes
    ----------
    image
        Decoded, upright, of mode 1, L, LA, P, PA, RGB or RGBA.
    orientation
        The EXIF orientation from which it was turned; None if it was stored upright.
    several
        Whether it is the first of several frames or pages.
    damaged_exif
        Whether its EXIF data cannot be read, so that it may not be upright.
    """

    image: Image
    orientation: int | None
    several: bool
    damaged_exif: bool

    def cautions(self, ground: tuple[int, int, int]) -> list[str]:
        """Return sentences about what a network, with this colour behind transparent parts, does not see of it."""
        notes = []
        if self.damaged_exif:
            notes.append("The file's EXIF data are damaged: it is shown as stored, which may not be upright.")
        if self.several:
            notes.append("The file has several frames or pages, of which the first was read.")
        if is_transparent(self.image):
            notes.append(f"Transparent parts are shown on the mean colour of the network's input, RGB {ground}.")
        return notes

    def notes(self, ground: tuple[int, int, int]) -> list[str]:
        """Return sentences about what a person who looks at the file may not expect: the cautions, and the turn."""
        if self.orientation is None:
            return self.cautions(ground)
        return [f"The photo was turned upright (EXIF orientation {self.orientation}).", *self.cautions(ground)]


def upright(image: Image, name: str = "the image") -> Upright:
    """Decode an image, turn it as its EXIF orientation says, and scale it to 8 bits per channel.

    Raises
    ------
    ValueError
        The image is damaged, empty, or a vector graphic, or has pixels outside the range of its type; the message
        begins with `name`.
    """
    with _one_error(name):
        several = bool(getattr(image, "is_animated", False))
    decoded, orientation, turn = _decoded(image, name)
    with _one_error(name):
        if _is_deep(decoded.mode):
            decoded = _eight_bits(decoded, name)
        elif decoded.mode in ("La", "RGBa"):
            decoded = decoded.convert(decoded.mode.upper())
        elif decoded.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            decoded = decoded.convert("RGB")
    turned_from = orientation if orientation in _TURNS else None
    return Upright(_turned(decoded, turn), turned_from, several, orientation is None)


def is_transparent(image: Image) -> bool:
    """Whether a pixel of an upright image is not opaque."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def flatten(image: Image, ground: tuple[int, int, int]) -> Image:
    """Return an upright image as RGB in front of a ground of one colour."""
    from PIL import Image

    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    shown = Image.new("RGB", image.size, ground)
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    shown.paste(transparent, mask=transparent)
    return shown


def object_mask(image: Image, name: str = "the mask") -> Image:
    """Return where an image is visible and not black: upright, of mode L, 255 there and 0 elsewhere.

    Raises
    ------
    ValueError
        As in `upright`; or a colour image has more than 8 bits per channel, of which Pillow drops the lowest.
    """
    from PIL import Image

    if _is_deep_colour(image):
        raise InvalidValueError(
            f"{name} has colours of more than 8 bits per channel, of which Pillow drops the lowest: make the mask grey"
        )
    decoded, _, turn = _decoded(image, name)
    if _is_deep(decoded.mode):
        with _one_error(name):
            values, _ = _values(decoded, name)
        inside = (values != 0) & _visible(decoded, values)
    else:
        with _one_error(name):
            colours = np.asarray(decoded.convert("RGBA" if decoded.has_transparency_data else "RGB"))
        inside = colours[:, :, :3].any(2)
        if colours.shape[2] == 4:
            inside &= colours[:, :, 3] > 0
    return _turned(Image.fromarray(inside.astype(np.uint8) * 255), turn)


def resized_crop(
    image: Image,
    size: tuple[int, int],
    corner: tuple[int, int],
    crop: tuple[int, int],
    resampling: Resampling,
    ground: tuple[int, int, int],
) -> Image:
    """Return a part of the resized image in front of a ground, without making all of a resized image that is large.

    The result is ``flatten(image, ground).resize(size, resampling).crop(...)``; of a large image, up to rounding.

    Parameters
    ----------
    image : PIL.Image.Image
        As `upright` returns it.
    size : (int, int)
        Width and height of the whole image after resizing.
    corner : (int, int)
        Left and top of the part in the resized image.
    crop : (int, int)
        Width and height of the part.
    resampling : PIL.Image.Resampling
    ground : (int, int, int)
        Colour behind transparent pixels.
    """
    if size[0] * size[1] <= _LARGE:
        (left, top), (width, height) = corner, crop
        return flatten(image, ground).resize(size, resampling).crop((left, top, left + width, top + height))
    window, box = [], []
    for length, resized, start, kept in zip(image.size, size, corner, crop, strict=True):
        low, high = start * length / resized, (start + kept) * length / resized
        margin = _WIDEST_FILTER * max(1, length / resized) + 1
        first, last = max(0, math.floor(low - margin)), min(length, math.ceil(high + margin))
        window.append((first, last))
        box.append((low - first, high - first))
    (left, right), (top, bottom) = window
    part = flatten(image.crop((left, top, right, bottom)), ground)
    (x0, x1), (y0, y1) = box
    return part.resize(crop, resampling, box=(x0, y0, x1, y1))


def _decoded(image: Image, name: str) -> tuple[Image, int | None, str | None]:
    """Return an image with its pixels, its EXIF orientation as `_orientation` does, and how it has yet to be turned."""
    if image.format in _DRAWN:
        raise InvalidValueError(f"{name} is a vector graphic ({image.format}), not a photo")
    if 0 in image.size:
        raise InvalidValueError(f"{name} is empty: {image.width} x {image.height} pixels")
    with _one_error(name):
        deep = _is_deep_colour(image)
        orientation = _orientation(image)
        with _unmapped(image):
            image.load()
        turn = _TURNS.get(_orientation(image) or 1)  # Pillow itself turns TIFF images when it decodes them
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and deep:
        image = image.copy()  # Pillow scales these colours to 8 bits, but not the one that is transparent
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image, orientation, turn


@contextmanager
def _unmapped(image: Image) -> Iterator[None]:
    """Keep Pillow from mapping a TIFF file into memory, which then reads the rows of a turned image by its height."""
    from PIL.ImageFile import ImageFile

    if not isinstance(image, ImageFile) or image.format != "TIFF":
        yield
        return
    name, image.filename = image.filename, ""
    try:
        yield
    finally:
        image.filename = name


def _orientation(image: Image) -> int | None:
    """Return the EXIF orientation, 1 if there is none; None if the EXIF data are damaged, which the pixels survive."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many kinds
        return None


def _turned(image: Image, turn: str | None) -> Image:
    from PIL import Image

    if turn is None:
        return image
    turned = image.transpose(Image.Transpose[turn])
    for key in _KEYS_OF_ORIENTATION:
        turned.info.pop(key, None)
    return turned


def _is_deep(mode: str) -> bool:
    return mode.startswith("I") or mode == "F"


def _is_deep_colour(image: Image) -> bool:
    """Whether a file that is not yet decoded has more than 8 bits in each of several channels."""
    tiles = getattr(image, "tile", None)
    if not tiles or _is_deep(image.mode):
        return False
    decoder, *_, arguments = tiles[0]
    if decoder.startswith("ppm"):
        return image.mode == "RGB" and isinstance(arguments, tuple) and arguments[1] > 255
    return ";16" in str(arguments)


def _eight_bits(image: Image, name: str) -> Image:
    """Scale grey pixels of more bits to 8 bits, with an alpha channel if one grey level is transparent."""
    from PIL import Image

    values, largest = _values(image, name)
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > largest:
        raise InvalidValueError(f"{name} has pixels from {lowest} to {highest}; the range is 0 to {largest}")
    if image.mode == "I" and image.format is None and 0 < highest <= 255:
        raise InvalidValueError(
            f"{name} has integer pixels up to {highest} in Pillow's mode I, which means a range to 65535: use mode L"
        )
    scaled = (values * np.float32(255 / largest) + np.float32(0.5)).astype(np.uint8)
    grey = Image.fromarray(scaled)
    if "transparency" in image.info:
        alpha = _visible(image, values).astype(np.uint8) * 255
        grey = Image.merge("LA", (grey, Image.fromarray(alpha)))
    return grey


def _visible(image: Image, values: np.ndarray) -> Any:
    """Where pixels differ from the grey level that is transparent, if there is one."""
    return values != image.info["transparency"] if "transparency" in image.info else True


def _values(image: Image, name: str) -> tuple[np.ndarray, int]:
    """Return the grey levels of an image with more than 8 bits, and the level of white.

    It is what the format states. Images that were not read from a file have that of their type; but in mode I, where
    Pillow keeps integers of all types, levels up to 65535 are taken for those of 16 bits.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise InvalidValueError(f"{name} has pixels that are NaN or infinite")
        largest = 1
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        largest = 65535
    else:
        largest = 65535 if values.max() <= 65535 else 2**31 - 1
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits, signed = tags.get(_BITS, (1,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        if image.mode != "F":
            largest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        if image.mode == "I" and not signed:
            values = values.view(np.uint32)
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts only up to 8 bits
            values = largest - values
    return values, largest


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one error."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise InvalidValueError(f"not an image file, or damaged: {name} ({error})") from error
