"""Maps drawn over photos."""

from __future__ import annotations

import numpy as np
import pytest

from spade_fast.attribution.drawing import Column, draw, draw_pictures, normalise, overlay

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def test_normalise():
    values = np.arange(1000.0).reshape(20, 50)
    values[0, 0] = 1e6
    scaled = normalise(values)
    assert scaled.min() >= 0 and scaled.max() == 1 and np.isclose(scaled[10, 0], 500 / np.percentile(values, 99.5))
    single = np.zeros((20, 20))
    single[3, 3] = 2.0
    assert normalise(single)[3, 3] == 1
    assert not normalise(np.zeros((3, 3))).any() and not normalise(-np.ones((3, 3))).any()
    for bad in (np.full((3, 3), np.nan), np.zeros((3, 3, 3))):
        with pytest.raises(ValueError, match="attribution map"):
            normalise(bad)


def test_overlay():
    photo = np.full((8, 8, 3), 200, dtype=np.uint8)
    heat = np.zeros((8, 8))
    heat[2, 5] = 1
    picture = overlay(photo, heat)
    assert picture.shape == (8, 8, 3) and picture.min() >= 0 and picture.max() <= 1
    assert np.allclose(picture[0, 0], picture[7, 7]) and picture[2, 5].mean() > 0.8
    assert np.ptp(picture[0, 0]) < 1e-6, "the photo is grey"
    coarse = overlay(photo, np.eye(2))
    assert coarse[0, 0].mean() > coarse[0, 7].mean()


def test_draw(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    maps = [np.random.default_rng(1).random((16, 16)) for _ in range(2)]
    columns = [Column("Dense", ["cat 90%"], maps), Column("SPADE", ["dog 40%", "(cat 30%)"], maps)]
    draw(tmp_path / "two.png", photo, columns, ["Saliency", "Grad-CAM"], "Why?", "Because")
    draw(tmp_path / "one.png", photo, columns, ["Saliency"], "Why?")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.format == "PNG" and two.width == one.width > 1000 and two.height > one.height + 300
        assert np.array(two.convert("L")).std() > 20


@pytest.mark.parametrize(
    "name", ["$x^2$", "a$b", "$", "$$", r"$\frac{$", "\\", r"\$", "a_b^c", "{", "", "\x00", "\ud800", "é漢"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_drawn_as_they_are(tmp_path, name):
    photo, maps = np.zeros((16, 16, 3), dtype=np.uint8), [np.eye(16)]
    draw(tmp_path / "named.png", photo, [Column(name, [name], maps)], [name], name, name)
    draw(tmp_path / "empty.png", photo, [Column("", [""], maps)], [""], "", "")
    with Image.open(tmp_path / "named.png") as named, Image.open(tmp_path / "empty.png") as empty:
        assert (np.array(named) != np.array(empty)).any() == (name != "")


def test_a_users_tex_setting_is_ignored(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"text.usetex": True}):
        test_names_are_drawn_as_they_are(tmp_path, "a_b")


def test_warnings_are_marked(tmp_path):
    photo = np.zeros((16, 16, 3), dtype=np.uint8)

    def orange(*warnings):
        columns = [Column("Dense", ["cat"], [np.eye(16)]), Column("SPADE", ["dog"], [np.eye(16)], warnings)]
        draw(tmp_path / "figure.png", photo, columns, ["Saliency"], "Why?")
        with Image.open(tmp_path / "figure.png") as figure:
            head = np.array(figure.convert("RGB"), int)[:200]
        found = (np.abs(head - [0xB3, 0x4A, 0]).max(2) < 20).any(0)
        return found[: len(found) * 2 // 3].any(), found[len(found) * 2 // 3 :].any()

    assert orange() == (False, False) and orange("lost the decision", "kept less") == (False, True)


def test_pictures_side_by_side(tmp_path):
    colours = {"Dense": (255, 0, 0), "SPADE": (0, 0, 255)}
    pictures = [np.full((16, 16, 3), colour, np.uint8) for colour in colours.values()]
    columns = [Column(name, ["x"], []) for name in colours]
    draw_pictures(tmp_path / "figure.png", columns, {"one": pictures}, "What excites it")
    with Image.open(tmp_path / "figure.png") as figure:
        row = np.array(figure.convert("RGB"))[-figure.height // 3]
    ends = [np.flatnonzero((row == colour).all(1))[[0, -1]].tolist() for colour in colours.values()]
    assert all(last - first > 300 for first, last in ends) and ends[0][1] < ends[1][0]


def test_rows_of_pictures(tmp_path):
    """One cell is empty, and the names of the rows stand beside them."""
    red, blue = (np.full((8, 16, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    columns = [Column(name, [], []) for name in ("Dense", "SPADE")]
    draw_pictures(tmp_path / "figure.png", columns, {"one": [red, blue], "x" * 90: [blue, None]}, "What excites it")
    with Image.open(tmp_path / "figure.png") as figure:
        pixels = np.array(figure.convert("RGB"))
    height, width = pixels.shape[:2]
    assert width > height, "wide pictures"
    middle = np.array([[pixels[int(height * y), int(width * x)] for x in (0.3, 0.7)] for y in (0.45, 0.8)])
    assert middle[0].tolist() == [[255, 0, 0], [0, 0, 255]] and middle[1, 0].tolist() == [0, 0, 255]
    assert middle[1, 1].tolist() == [255, 255, 255]
    margin = pixels[:, : width // 12]
    assert (margin[height // 3 :] < 200).any() and not (margin[:, :5] < 200).any()
