"""Photos and emojis from packages: foolbox (ImageNet photos), and an educational game and a font from Debian.

The Debian packages are downloaded and unpacked, not installed.
"""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image
from rich.console import Console

from spade_fast.inputs import demo_photo, open_photo

CACHE = Path("out/studies")
CONSOLE = Console(stderr=True)
_PHOTOS, _FONT = "gcompris-qt-data", "fonts-noto-color-emoji"
_TRAINING = (
    "categorization",
    "explore_monuments",
    "explore_world_animals",
    "explore_farm_animals",
    "explore_world_music",
)
_ANIMALS = ("explore_world_animals", "explore_farm_animals", "categorization")
_HELD_OUT = "erase"  # animals, 1920 x 1080
_LEAST_SIDE = 200


@dataclass(frozen=True)
class Photo:
    """A photo in RGB, and its unique name."""

    name: str
    image: Image.Image


@cache
def training_photos() -> list[Photo]:
    """Photos to implant the trojan with."""
    return [photo for album in _TRAINING for photo in _album(album)]


@cache
def tuning_photos() -> list[Photo]:
    """Photos to choose settings on."""
    return _album(_HELD_OUT)[::2]


@cache
def test_photos() -> list[Photo]:
    """Photos to report on: seen neither in training nor in tuning."""
    return [*imagenet_photos(), *_album(_HELD_OUT)[1::2]]


@cache
def animal_photos() -> list[Photo]:
    """More photos to report on with networks that no study has trained: those of animals."""
    return [photo for album in _ANIMALS for photo in _album(album)]


@cache
def imagenet_photos() -> list[Photo]:
    """The twenty photos of foolbox."""
    files = sorted(demo_photo().parent.glob("imagenet_*.jpg"))
    return [Photo(file.stem, open_photo(file)) for file in files]


def emoji_font() -> Path:
    """Path of Noto Color Emoji."""
    return _unpacked(_FONT) / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def _album(name: str) -> list[Photo]:
    path = _unpacked(_PHOTOS) / "usr/share/gcompris-qt/rcc" / f"{name}.rcc"
    photos = []
    for file, content in sorted(_qt_resources(path.read_bytes())):
        if file.endswith(".webp"):
            image = Image.open(io.BytesIO(content))
            if image.mode == "RGB" and min(image.size) >= _LEAST_SIDE:
                photos.append(Photo(f"{name}/{Path(file).stem}", image.copy()))
    return photos


def _unpacked(package: str) -> Path:
    """Folder with the files of a Debian package, which is downloaded if no earlier run has."""
    folder = CACHE / "packages" / package
    if not folder.is_dir():
        download = folder.parent / "download"
        download.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=download, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError("photos and emojis come from Debian packages, but there is no apt-get here") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"apt-get cannot download {package} (try apt-get update): {error.stderr}") from error
        (archive,) = download.glob(f"{package}_*.deb")
        unfinished = folder.with_suffix(".unfinished")
        subprocess.run(["dpkg-deb", "-x", archive, unfinished], check=True)
        unfinished.rename(folder)
        archive.unlink()
    return folder


def _qt_resources(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a Qt resource archive (``rcc --binary``), of formats 1 to 3."""
    magic, version, tree, data, names = struct.unpack_from(">4s4I", content)
    if magic != b"qres":
        raise ValueError("not a Qt resource archive")
    node_size = 14 if version == 1 else 22
    compressed, directory = 1, 2

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        start = tree + node * node_size
        name_at, flags = struct.unpack_from(">IH", content, start)
        letters, _ = struct.unpack_from(">HI", content, names + name_at)
        text = names + name_at + 6
        path = f"{folder}/{content[text : text + 2 * letters].decode('utf-16-be')}" if node else ""
        if flags & directory:
            count, first = struct.unpack_from(">II", content, start + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        (data_at,) = struct.unpack_from(">I", content, start + 10)
        (size,) = struct.unpack_from(">I", content, data + data_at)
        packed = content[data + data_at + 4 : data + data_at + 4 + size]
        yield path, zlib.decompress(packed[4:]) if flags & compressed else packed

    yield from walk(0, "")
