"""Image files of every kind, as photos and as masks."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from spade_fast.inputs import LoadedModel, open_photo
from spade_fast.inputs.photo import FORMATS, photo_suffixes, read_mask, read_photo
from spade_fast.inputs.pil_pixels import GREY

Image = pytest.importorskip("PIL.Image")
from PIL import PngImagePlugin  # noqa: E402

Image.init()  # fills Image.SAVE

NETWORK = LoadedModel("x", nn.Identity(), (0.2, 0.4, 0.6), (0.25,) * 3, 4, 4)
GROUND = (51, 102, 153)
PERFECT = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF": {}}


def save(path, image, **options):
    image.save(path, **options)
    return path


def png(size, bits, colour, rows, *chunks):
    """The bytes of a PNG file, from its header, its rows with filter bytes, and further chunks."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*one) for one in chunks), chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(values, bits, sample_format=1, photometric=1):
    """The bytes of an uncompressed little-endian grey TIFF file."""
    content = values.tobytes()
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, len(content)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def levels(path):
    """The grey levels of a file, checked against what a network is shown of it and of the image that Pillow opens."""
    pixels = np.asarray(open_photo(path))
    assert pixels.ndim == 3 and pixels.dtype == np.uint8 and (pixels == pixels[:, :, :1]).all()
    with Image.open(path) as opened:
        for given in (read_photo(path).image, opened):
            side = min(opened.size)
            shown = LoadedModel("x", nn.Identity(), resize=side, crop=side).preprocess(given)[1]
            top, left = ((length - side) // 2 for length in pixels.shape[:2])
            assert np.array_equal(shown, pixels[top : top + side, left : left + side])
    return pixels[:, :, 0].tolist()


# Orientation

# Where the corners of an upright photo (top left, top right, bottom left, bottom right) lie in the file.
STORED = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "bdac", 7: "dbca", 8: "cadb"}
LEVELS = dict(zip("abcd", (40, 100, 160, 220), strict=True))


@pytest.mark.parametrize("name", PERFECT)
@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_upright(tmp_path, name, orientation):
    corners = np.array([LEVELS[corner] for corner in STORED[orientation]], np.uint8).reshape(2, 2)
    shape = (20, 30) if orientation <= 4 else (30, 20)
    stored = Image.fromarray(corners.repeat(shape[0], 0).repeat(shape[1], 1)).convert("RGB")
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / f"photo.{name.lower()}", stored, exif=exif, **PERFECT[name])
    upright = np.array([[40, 100], [160, 220]]).repeat(20, 0).repeat(30, 1)
    read = open_photo(path)
    assert read.size == (60, 40) and np.abs(np.asarray(read)[:, :, 0] - upright.astype(int)).max() <= 1
    for given in (read, read_photo(path).image, Image.open(path)):
        shown = LoadedModel("x", nn.Identity(), resize=40, crop=40, interpolation="nearest").preprocess(given)[1]
        assert np.abs(shown[:, :, 0] - upright[:, 10:50].astype(int)).max() <= 1, "turned once, not twice"
    assert len(read_photo(path).notes(GREY)) == (orientation != 1)
    mask = save(
        tmp_path / f"mask.{name.lower()}", stored.point(lambda level: 255 * (level > 80)), exif=exif, **PERFECT[name]
    )
    assert np.array_equal(np.asarray(read_mask(mask)) > 0, upright > 80)


def test_orientation_of_16_bits_of_xmp_and_of_nonsense(tmp_path):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 40 * 257
    exif = Image.Exif()
    exif[274] = 6
    for name in ("deep.png", "deep.tif"):
        path = save(tmp_path / name, Image.fromarray(values), exif=exif)
        assert levels(path) == np.rot90(values // 257, -1).tolist()
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    assert open_photo(save(tmp_path / "xmp.png", Image.new("L", (6, 4)), pnginfo=xmp)).size == (4, 6)


def test_damaged_exif_data_are_told(tmp_path):
    head = b"Exif\0\0II*\0\x08\0\0\0"
    text = head + b"\x01\0" + struct.pack("<HHI4s", 274, 2, 2, b"x") + bytes(4)  # as orientation
    for content, damaged in ((text, True), (b"Exif\0\0nonsense", False), (head + b"\xff\xff", False), (b"", False)):
        read = read_photo(save(tmp_path / "odd.jpg", Image.new("L", (6, 4)), exif=content))
        assert read.image.size == (6, 4) and read.damaged_exif == damaged
        assert [note.startswith("The file's EXIF data are damaged") for note in read.notes(GREY)] == [True] * damaged


# More than 8 bits

GREYS = np.array([[0, 1, 128], [200, 254, 255]])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", png((3, 2), 16, 0, b"".join(b"\0" + row.tobytes() for row in (GREYS * 257).astype(">u2")))),
        ("a.pgm", b"P5 3 2 65535\n" + (GREYS * 257).astype(">u2").tobytes()),
        ("plain.pgm", b"P2 3 2 65535\n" + " ".join(map(str, (GREYS * 257).flatten())).encode()),
        ("12.pgm", b"P5 3 2 4095\n" + np.round(GREYS * 4095 / 255).astype(">u2").tobytes()),
        ("12.ppm", b"P6 3 2 4095\n" + np.round(GREYS * 4095 / 255).astype(">u2").repeat(3, 1).tobytes()),
        ("7.pgm", b"P5 3 2 127\n" + np.round(GREYS * 127 / 255).astype(np.uint8).tobytes()),
        ("a.pfm", b"Pf\n3 2\n-1.0\n" + (GREYS[::-1] / 255).astype("<f4").tobytes()),
        ("u16.tif", tiff((GREYS * 257).astype("<u2"), 16)),
        ("white0.tif", tiff((65535 - GREYS * 257).astype("<u2"), 16, photometric=0)),
        ("i16.tif", tiff(np.round(GREYS * 32767 / 255).astype("<i2"), 16, 2)),
        ("u32.tif", tiff((GREYS * 16843009).astype("<u4"), 32)),
        ("i32.tif", tiff(np.round(GREYS * (2**31 - 1) / 255).astype("<i4"), 32, 2)),
        ("f32.tif", tiff((GREYS / 255).astype("<f4"), 32, 3)),
        ("white0f.tif", tiff((1 - GREYS / 255).astype("<f4"), 32, 3, photometric=0)),
        ("u8.tif", tiff(GREYS.astype(np.uint8), 8)),
    ],
)
def test_levels_are_scaled_by_the_range_of_the_format(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    off = 1 if name.startswith(("12", "7")) else 0  # not every level can be written
    assert np.abs(np.array(levels(path)) - GREYS).max() <= off
    if not name.endswith(".ppm"):
        assert np.array_equal(np.asarray(read_mask(path))[:, 1:] > 0, [[name != "7.pgm", True], [True, True]])


def test_12_bits_in_tiff(tmp_path):
    # Two levels of 12 bits in three bytes: 4095 and 2056.
    (tmp_path / "12.tif").write_bytes(
        tiff(np.array([[0xFF, 0xF8, 0x08]], np.uint8), 12).replace(
            struct.pack("<HHII", 256, 4, 1, 3), struct.pack("<HHII", 256, 4, 1, 2)
        )
    )
    assert levels(tmp_path / "12.tif") == [[255, 128]]


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_16_bits_in_several_channels(tmp_path, colour):
    levels_16 = np.array([[[0x8080, 0x4040, 0xFFFF, 0xFFFF]] * 2] * 2)[
        :, :, {2: [0, 1, 2], 4: [0, 3], 6: [0, 1, 2, 3]}[colour]
    ]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels_16)
    (tmp_path / "a.png").write_bytes(png((2, 2), 16, colour, rows))
    expected = (128, 128, 128) if colour == 4 else (128, 64, 255)
    assert open_photo(tmp_path / "a.png").getpixel((1, 1)) == expected
    with pytest.raises(ValueError, match=r"a.png has colours of more than 8 bits per channel.* make the mask grey"):
        read_mask(tmp_path / "a.png")


def test_16_bits_in_jpeg_2000(tmp_path):
    values = np.array([[0, 1, 128], [200, 254, 255]], np.uint16) * 257
    assert levels(save(tmp_path / "a.jp2", Image.fromarray(values.repeat(8, 0).repeat(8, 1))))[0][::8] == [0, 1, 128]


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.float32, np.float64, np.int32])
def test_items_of_datasets(dtype):
    largest = {"f": 1, "i": 2**31 - 1}.get(np.dtype(dtype).kind, 65535)
    image = Image.fromarray(np.round(np.full((4, 4), 128 / 255) * largest, 6 if largest == 1 else 0).astype(dtype))
    assert (NETWORK.preprocess(image)[1] == 128).all()


def test_a_tenth_of_16_bits_in_mode_i():
    values = np.full((4, 4), 26 * 257, np.int32)
    assert (NETWORK.preprocess(Image.fromarray(values))[1] == 26).all(), "what Pillow makes of 16 bits in many places"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 1.5, np.float32), "the image has pixels from 1.5 to 1.5; the range is 0 to 1"),
        (np.full((4, 4), 200, np.float32), "pixels from 200.0 to 200.0"),
        (np.full((4, 4), -0.1, np.float32), "pixels from -0.1"),
        (np.full((4, 4), np.nan, np.float32), "NaN or infinite"),
        (np.full((4, 4), np.inf, np.float32), "NaN or infinite"),
        (np.full((4, 4), -1, np.int32), "pixels from -1 to -1; the range is 0 to 65535"),
        (np.full((4, 4), 200, np.int32), "integer pixels up to 200 in Pillow's mode I"),
    ],
)
def test_levels_outside_the_range(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        NETWORK.preprocess(Image.fromarray(values))
    if values.dtype == np.float32:
        path = save(tmp_path / "a.tif", Image.fromarray(values))
        with pytest.raises(ValueError, match=message.replace("the image", "a.tif")):
            open_photo(path)


# Transparency and colours


def transparent_files(folder):
    """A file of every kind of transparency: left transparent over red or black, right opaque white."""
    left = np.arange(8) < 4
    shape = (8, 8)
    alpha = np.broadcast_to(np.where(left, 0, 255), shape).astype(np.uint8)
    red = np.zeros((*shape, 3), np.uint8)
    red[:, left, 0], red[:, ~left] = 255, 255
    rgba = Image.fromarray(np.dstack([red, alpha]))
    grey = Image.fromarray(alpha)
    palette = grey.point(lambda level: level > 0).convert("P")
    palette.putpalette([255, 0, 0, 255, 255, 255])
    yield save(folder / "rgba.png", rgba)
    yield save(folder / "rgba.tif", rgba)
    yield save(folder / "rgba.webp", rgba, lossless=True)
    yield save(folder / "la.png", Image.merge("LA", (grey, grey)))
    yield save(folder / "palette.png", palette, transparency=0)
    yield save(folder / "palette_bytes.png", palette, transparency=b"\0\xff")
    yield save(folder / "palette.gif", palette, transparency=0)
    yield save(folder / "grey.png", grey, transparency=0)
    yield save(folder / "bits.png", grey.convert("1"), transparency=0)
    yield save(folder / "rgb.png", Image.fromarray(red), transparency=(255, 0, 0))
    deep = alpha.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (folder / "deep.png").write_bytes(png(shape, 16, 0, rows, (b"tRNS", b"\0\0")))
    yield folder / "deep.png"
    deep = np.where(left[:, None], (0x1234, 0, 0), 0xFFFF).astype(">u2")
    rows = (b"\0" + deep.tobytes()) * 8
    (folder / "deep_rgb.png").write_bytes(png(shape, 16, 2, rows, (b"tRNS", struct.pack(">3H", 0x1234, 0, 0))))
    yield folder / "deep_rgb.png"
    if "AVIF" in Image.SAVE:
        yield save(folder / "rgba.avif", rgba, quality=100, subsampling="4:4:4")


def test_transparent_parts_are_shown_on_the_mean(tmp_path):
    expected = np.full((8, 8, 3), 255)
    expected[:, :4] = GROUND
    network = LoadedModel("x", nn.Identity(), NETWORK.mean, NETWORK.std, 8, 8)
    assert network.ground == GROUND and LoadedModel("x", nn.Identity(), (0.5,), (1.0,)).ground == (128, 128, 128)
    for path in transparent_files(tmp_path):
        off = 3 if path.suffix == ".avif" else 0
        for given in (read_photo(path).image, Image.open(path)):
            image, pixels = network.preprocess(given)
            assert np.abs(pixels.astype(int) - expected).max() <= off, path
            assert off or torch.allclose(image[0, :, :, :4], torch.zeros(3, 8, 4), atol=0.01)
        assert off or np.array_equal(np.asarray(open_photo(path, GROUND)), expected), path
        assert off or open_photo(path).getpixel((0, 0)) == (128, 128, 128), path


def test_half_transparent(tmp_path):
    path = save(tmp_path / "half.png", Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    assert np.abs(np.array(open_photo(path, (0, 100, 200)).getpixel((0, 0))) - (128, 50, 100)).max() <= 1
    for mode in ("RGBa", "PA"):
        given = Image.open(path).convert("RGBA" if mode == "PA" else mode)
        given = given.convert(mode)
        assert np.abs(NETWORK.preprocess(given)[1][0, 0].astype(int) - (153, 51, 76)).max() <= 2, mode
    given = Image.new("LA", (8, 8), (200, 0)).convert("La")
    assert tuple(NETWORK.preprocess(given)[1][0, 0]) == NETWORK.ground


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_colours_of_other_modes(tmp_path, mode):
    colour = (255, 255, 255) if mode in ("1", "L") else (200, 60, 30)
    given = Image.new("RGB", (8, 8), colour)
    if mode == "LAB":
        cms = pytest.importorskip("PIL.ImageCms")
        given = cms.profileToProfile(given, cms.createProfile("sRGB"), cms.createProfile("LAB"), outputMode="LAB")
    given = given.quantize(4) if mode == "P" else given.convert(mode)
    assert np.abs(NETWORK.preprocess(given)[1].astype(int) - colour).max() <= 5
    if mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB"):
        assert np.abs(np.asarray(open_photo(save(tmp_path / "a.tif", given))).astype(int) - colour).max() <= 5


def test_first_frames(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("white", "black", "red")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        assert open_photo(path).getpixel((0, 0)) == (255, 255, 255)
        assert read_photo(path).notes(GREY) == ["The file has several frames or pages, of which the first was read."]
    assert read_photo(save(tmp_path / "one.gif", frames[0])).notes(GREY) == []


# Masks


def test_label_masks_of_16_bits(tmp_path):
    ids = np.zeros((20, 20), np.uint16)
    ids[:10, :10], ids[12:20, 12:20] = 1, 300
    for path in (save(tmp_path / "a.png", Image.fromarray(ids)), save(tmp_path / "a.tif", Image.fromarray(ids))):
        assert np.array_equal(np.asarray(read_mask(path)), np.where(ids, 255, 0)) and (ids > 0).sum() == 164
    for dtype in (np.int32, np.float32):
        path = save(tmp_path / "wide.tif", Image.fromarray(ids.astype(dtype)))
        assert np.array_equal(np.asarray(read_mask(path)), np.where(ids, 255, 0))
    path = save(tmp_path / "float.tif", Image.fromarray(np.where(ids, 1e-6, 0).astype(np.float32)))
    assert (np.asarray(read_mask(path)) > 0).sum() == 164
    path = save(tmp_path / "nan.tif", Image.fromarray(np.where(ids, np.nan, 0).astype(np.float32)))
    with pytest.raises(ValueError, match=r"nan\.tif has pixels that are NaN"):
        read_mask(path)


def test_masks_are_where_something_is_visible_and_not_black(tmp_path):
    right = np.broadcast_to(np.arange(8) >= 4, (8, 8))
    for path in transparent_files(tmp_path):
        if path.name == "deep_rgb.png":
            continue
        assert np.array_equal(np.asarray(read_mask(path)) > 0, right), path
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 3] = 255  # opaque and black
    hidden[:, 4:, 2] = 1
    assert np.array_equal(np.asarray(read_mask(save(tmp_path / "a.png", Image.fromarray(hidden)))) > 0, right)
    for mode in ("1", "L", "CMYK"):
        given = Image.fromarray(np.where(right, 255, 0).astype(np.uint8)).convert("RGB").convert(mode)
        assert np.array_equal(np.asarray(read_mask(save(tmp_path / "a.tif", given))) > 0, right), mode
    labels = Image.fromarray(right.astype(np.uint8))  # as in PASCAL VOC: class 0 is black, class 1 dark red
    labels.putpalette([0, 0, 0, 128, 0, 0])
    assert np.array_equal(np.asarray(read_mask(save(tmp_path / "voc.png", labels))) > 0, right)


# Hostile files


def test_narrow_images_take_little_memory(tmp_path):
    script = (
        "import pathlib, resource, sys, torch\n"
        "from spade_fast.inputs import LoadedModel\n"
        "from spade_fast.inputs.photo import read_photo\n"
        "network = LoadedModel('x', torch.nn.Identity(), interpolation='bicubic')\n"
        "for path in sys.argv[1:]:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    image, pixels = network.preprocess(read_photo(pathlib.Path(path)).image)\n"
        "    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "    print(image.shape[2], image.shape[3], pixels[..., 0].min(), pixels[..., 0].max(), more)\n"
    )
    paths = []
    for size, colour in (((100_000, 1), 0), ((1, 100_000), 0), ((100_000, 1), 6), ((20_000_000, 1), 0)):
        rows = (b"\0" + b"\x80" * size[0] * (4 if colour else 1)) * size[1]
        paths.append(tmp_path / f"{len(paths)}.png")
        paths[-1].write_bytes(png(size, 8, colour, rows))
    lines = subprocess.check_output([sys.executable, "-c", script, *paths], text=True).splitlines()
    for line, level, megabytes in zip(lines, (128, 128, 126, 128), (20, 20, 20, 150), strict=True):
        height, width, darkest, brightest, more = map(int, line.split())
        assert (height, width, darkest, brightest) == (224, 224, level, level) and more < 1000 * megabytes


def header_only(name, size):
    """The start of a file that claims a size."""
    if name == "PNG":
        return png(size, 8, 2, b"\0")
    if name == "PPM":
        return b"P6 %d %d 255\n" % size
    if name == "BMP":
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, *size, 1, 24, 0, 0, 0, 0, 0, 0)
    if name == "GIF":
        frame = b",\0\0\0\0" + struct.pack("<HHB", *size, 0)
        return b"GIF89a" + struct.pack("<HHBBB", *size, 0, 0, 0) + frame + b"\2\2\x4c\1\0;"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, name)
    content = buffer.getvalue()
    if name == "JPEG":
        return content.replace(struct.pack(">HH", 48, 64), struct.pack(">HH", size[1], size[0]))
    for tag, old, new in ((256, 64, size[0]), (257, 48, size[1])):
        content = content.replace(struct.pack("<HHII", tag, 4, 1, old), struct.pack("<HHII", tag, 4, 1, new))
    return content


@pytest.mark.parametrize("name", ["PNG", "PPM", "BMP", "GIF", "JPEG", "TIFF"])
def test_too_many_pixels_are_named(tmp_path, name):
    size = (60_000, 50_000)
    path = tmp_path / "bomb.png"
    path.write_bytes(header_only(name, size))
    for read in (open_photo, read_mask):
        with pytest.raises(
            ValueError, match=r"bomb.png has 60000 x 50000 pixels, more than Pillow's limit of 178956970"
        ):
            read(path)


def test_the_limit_is_that_of_pillow(tmp_path, monkeypatch, recwarn):
    path = save(tmp_path / "a.png", Image.new("L", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_photo(path).size == (20, 10) and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match="20 x 10 pixels, more than Pillow's limit of 198"):
        open_photo(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_photo(path).size == (20, 10)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_other_program_is_started(tmp_path, monkeypatch):
    path = tmp_path / "drawing.png"
    path.write_bytes(EPS)

    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    for read in (open_photo, read_photo, read_mask):
        with pytest.raises(
            ValueError, match=r"not an image file, or damaged: .*drawing.png \(the formats are AVIF, BMP"
        ):
            read(path)
    opened = Image.open(path)
    assert opened.format == "EPS"
    with pytest.raises(ValueError, match="the image is a vector graphic"):
        NETWORK.preprocess(opened)
    for name in ("WMF", "FITS", "HDF5", "GRIB", "BUFR", "MPEG", "PSD", "SPIDER", "TGA"):
        assert name not in FORMATS


def test_text_that_unpacks_to_gigabytes(tmp_path):
    packed = zlib.compress(b"\0" * 2**27)
    for kind, content in ((b"zTXt", b"Comment\0\0" + packed), (b"iCCP", b"profile\0\0" + packed)):
        path = tmp_path / "bomb.png"
        path.write_bytes(png((2, 2), 8, 0, b"\0\0\0" * 2, (kind, content)))
        with pytest.raises(
            ValueError, match=r"not an image file, or damaged: .*bomb.png \(Decompressed data too large"
        ):
            open_photo(path)


def test_empty_images_and_wrong_files(tmp_path):
    with pytest.raises(ValueError, match="the image is empty: 0 x 5 pixels"):
        NETWORK.preprocess(Image.new("RGB", (0, 5)))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="not an image file"):
        open_photo(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no such image file"):
        open_photo(tmp_path)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="image files may have up to 2147483648 bytes, got 1099511627776"):
        open_photo(tmp_path / "huge.png")


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_one_error(tmp_path, name, recwarn):
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {name}")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274], exif[270] = 6, "x"
    image = Image.fromarray(pixels)
    image.save(buffer, name, **({"exif": exif} if name in PERFECT else {}))
    whole = buffer.getvalue()
    path = tmp_path / "damaged.png"
    random_ = random.Random(0)
    refused = 0
    for turn in range(200):
        content = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            content[random_.randrange(min(len(content), 300 if turn % 2 else len(content)))] = random_.randrange(256)
        path.write_bytes(content[: random_.randint(1, len(content))] if turn % 3 == 0 else content)
        try:
            open_photo(path)
        except ValueError as error:
            assert "damaged.png" in str(error)
            refused += 1
    assert refused > 0
    path.write_bytes(whole[: len(whole) // 2])
    opened = None
    with pytest.raises(ValueError, match=r"not an image file, or damaged: .*damaged\.png"):
        open_photo(path)
    try:
        opened = Image.open(path)
    except Exception:
        return
    with pytest.raises(ValueError, match="not an image file, or damaged: the image"):
        NETWORK.preprocess(opened)


def test_suffixes():
    named = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".pgm", ".ppm", ".pbm", ".pnm", ".bmp", ".gif", ".webp"}
    assert named | {".tif", ".tiff", ".jp2", ".j2k"} <= photo_suffixes()
    assert not photo_suffixes() & {".eps", ".ps", ".wmf", ".emf", ".fits", ".h5", ".mpg", ".pdf", ".tga", ""}
