"""The resized crop, and images that are turned, turned again, and left as they were."""

from __future__ import annotations

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from spade_fast.inputs import pil_pixels  # noqa: E402
from spade_fast.inputs.pil_pixels import flatten, resized_crop, upright  # noqa: E402

FILTERS = ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")


def smooth(size):
    """A photo-like image: broad waves and some noise."""
    generator = np.random.default_rng(size[0])
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [110 + 60 * np.sin(x / 9 + channel) * np.cos(y / 13 - channel) for channel in range(3)]
    return Image.fromarray(
        (np.stack(waves, 2) + generator.normal(0, 8, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_crop_of_the_resized_image(monkeypatch, name, large):
    if large:
        monkeypatch.setattr(pil_pixels, "_LARGE", 0)
    resampling = Image.Resampling[name]
    for size, resized, crop in (
        ((400, 300), (85, 64), (56, 56)),
        ((301, 402), (64, 86), (60, 48)),
        ((30, 20), (96, 64), (56, 56)),
        ((64, 64), (64, 64), (56, 56)),
        ((500, 3), (1400, 8), (8, 8)),
        ((3, 500), (8, 1400), (8, 8)),
    ):
        image = smooth(size)
        corner = ((resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2)
        box = (*corner, corner[0] + crop[0], corner[1] + crop[1])
        expected = np.asarray(image.resize(resized, resampling).crop(box)).astype(int)
        made = np.asarray(resized_crop(image, resized, corner, crop, resampling, (0, 0, 0)))
        assert made.shape == (crop[1], crop[0], 3)
        difference = np.abs(made - expected)
        if not large:
            assert not difference.any()
        elif name == "NEAREST":  # a pixel on the border of two may be either
            assert (difference > 0).mean() < 0.03
        else:
            assert difference.max() <= 2


def test_transparent_crops(monkeypatch):
    image = smooth((60, 40)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((60, 40)))
    whole = resized_crop(image, (48, 32), (8, 0), (32, 32), Image.Resampling.BILINEAR, (10, 200, 90))
    monkeypatch.setattr(pil_pixels, "_LARGE", 0)
    part = resized_crop(image, (48, 32), (8, 0), (32, 32), Image.Resampling.BILINEAR, (10, 200, 90))
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(part)).max() <= 1
    top = np.asarray(flatten(image, (10, 200, 90)))[0].astype(int)
    assert np.abs(top - (10, 200, 90)).max() <= 5, "the gradient begins transparent"


def test_given_images_stay_as_they_were(tmp_path):
    exif = Image.Exif()
    exif[274] = 8
    for name, given in (("a.jpg", smooth((6, 4))), ("a.tif", smooth((6, 4)).convert("L"))):
        path = tmp_path / name
        given.save(path, exif=exif)
        opened = Image.open(path)
        expected = np.asarray(upright(opened).image)
        for image in (opened, upright(opened).image):
            assert np.array_equal(np.asarray(upright(image).image), expected)
        assert opened.filename in (path, str(path)) and expected.shape[:2] == (6, 4)
    values = np.full((2, 2), 400, np.uint16)
    deep = Image.fromarray(values)
    deep.info["transparency"] = 400
    assert upright(deep).image.mode == "LA" and np.array_equal(np.asarray(deep), values)
