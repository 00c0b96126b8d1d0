"""What every worker has to do: the memory it takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")

from batches import make_photos, small_job

import spade_fast
from spade_fast.batch.job import bytes_per_sample
from spade_fast.inputs import load_model
from spade_fast.pruning.ladders import LEVELS

NUMEL, GRAM = 12 * 12 * 9, 4 * (12 * 9) ** 2  # of layer 2


def packed(sparsity: float) -> float:
    return NUMEL / 8 + 4 * NUMEL * (1 - sparsity)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4 * GRAM + packed(0.5) + 4 * NUMEL),
        ({"draws": 3}, 4 * GRAM + 3 * packed(0.5) + 4 * NUMEL),
        ({"sparsity": "auto"}, 4 * GRAM + sum(map(packed, LEVELS)) + len(LEVELS) * 4 * NUMEL),
        (
            {"sparsity": "auto", "keep": (0.9, 0.5), "draws": 3},
            4 * GRAM + sum(map(packed, LEVELS)) + 4 * packed(LEVELS[0]) + len(LEVELS) * 4 * NUMEL,
        ),
    ],
)
def test_memory_of_a_sample(small, tmp_path, options, expected):
    make_photos(tmp_path / "photos", 1)
    job, network = small_job(tmp_path / "photos", tmp_path / "out", small, methods=["saliency"], layers="2", **options)
    assert bytes_per_sample(job, network) == pytest.approx(expected, abs=50)


def test_a_packed_layer_takes_what_is_counted(small):
    trace = spade_fast.trace(load_model(small).module, torch.rand(6, 3, 16, 16), sparsity=0.5, layers="2")
    (layer,) = trace._pruned.values()
    assert layer.mask.nbytes + layer.values.nbytes == pytest.approx(packed(0.5), abs=1)
