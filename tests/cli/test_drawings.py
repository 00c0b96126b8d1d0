"""How the commands draw a feature: `Visualization.drawn` of a picture larger than what the network sees."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL")

from spade_fast import Feature, load_model, visualize
from spade_fast._util.progress import no_progress
from spade_fast.cli.drawings import Drawing


def test_pictures_are_those_of_visualize_paler_where_they_matter_less(small):
    network = load_model(small)
    drawing = Drawing(method="fourier", steps=2, views=3, count=2, contrast=True, neuron=True, seed=5)
    made = visualize(
        network.module,
        Feature(4, "2", neuron=True, contrast=True),
        method="fourier",
        steps=2,
        views=3,
        count=2,
        seed=5,
        size=(20, 20),
        view=(16, 16),
        mean=network.mean,
        std=network.std,
    )
    found = drawing.draw(network, 4, "2", no_progress)
    assert found.activations == made.activations
    for picture, expected, full in zip(found.pictures, made.drawn(), made.pictures, strict=True):
        assert np.abs(picture / 255 - expected.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
        assert np.abs(picture / 255 - full.permute(1, 2, 0).numpy()).max() > 2 / 255


def test_amount_of_work():
    assert Drawing(count=2).work(features=2, networks=3) == "12 pictures of 128 steps"
    assert Drawing(steps=1).work(features=1, networks=1) == "1 picture of 1 step"


def test_the_photo_to_begin_with_in_the_size_of_the_pictures(small, photo):
    network = load_model(small)
    first = Drawing(start=photo).first_picture(network)
    assert first is not None and first.shape == (20, 20, 3) and first.std() > 10
    assert Drawing().first_picture(network) is None
