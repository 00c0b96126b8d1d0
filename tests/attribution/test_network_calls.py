"""Calibration batches are checked against the sample, and completed by its further arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spade_fast.attribution.network_calls import network_calls

SAMPLE = torch.rand(1, 3), torch.rand(1, 2, 4, 4)


def calls(batches: Any, inputs: Any = SAMPLE, more: Any = None, *, of_all: bool = False) -> list[Any]:
    return list(network_calls(batches, inputs, more, of_all=of_all))


def test_batches_are_completed() -> None:
    rows, images, scale, same = torch.rand(6, 3), torch.rand(6, 2, 4, 4), torch.rand(1, 5), torch.rand(7)
    ((first, second, scales, mode, other),) = calls([(rows, images)], more=(scale, "mean", same))
    assert first is rows and second is images and mode == "mean" and other is same
    assert torch.equal(scales, scale.expand(6, 5))
    whole = [rows, images, torch.rand(6, 5), "sum", same]
    assert calls([whole], more=(scale, "mean", same)) == [whole]
    assert calls([{"rows": rows}], more=scale) == [{"rows": rows}]
    assert [len(one) for one in calls(torch.rand(11, 2, 4, 4), SAMPLE[1])] == [8, 3]  # split as before


def test_samples_of_several_rows() -> None:
    sample, more = torch.rand(2, 3), torch.tensor([[1], [2]])
    ((_, found),) = calls([torch.rand(6, 3)], sample, more)
    assert found.flatten().tolist() == [1, 2, 1, 2, 1, 2]
    with pytest.raises(ValueError, match="batch 0 has 5 rows, not a multiple of the sample's 2"):
        calls([torch.rand(5, 3)], sample, more)
    with pytest.raises(ValueError, match="batch 0 lacks the additional_forward_args, which differ by sample"):
        calls([torch.rand(6, 3)], sample, more, of_all=True)
    assert calls([[sample, more]], sample, more, of_all=True) == [[sample, more]]


def test_they_can_be_iterated_as_often_as_the_batches() -> None:
    batches = [SAMPLE, SAMPLE]
    found = network_calls(batches, SAMPLE, None, of_all=False)
    assert operator.length_hint(found) == 2 and len(list(found)) == len(list(found)) == 2
    assert isinstance(network_calls(iter(batches), SAMPLE, None, of_all=False), Iterator)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (SAMPLE[0], r"batch 1 has 1 value, but the network is called with 2 inputs and 2 additional_forward_args"),
        ((*SAMPLE, 1), r"batch 1 has 3 values, but the network is called with 2 inputs .* leave out labels"),
        (
            (SAMPLE[0].double(), SAMPLE[1]),
            r"batch 1, input 0 is torch.float64, but that of the sample is torch.float32",
        ),
        (
            (SAMPLE[0], SAMPLE[1][0]),
            r"batch 1, input 1 has shape \[2, 4, 4\], but that of the sample is \[1, 2, 4, 4\]",
        ),
        ((SAMPLE[0], None), r"batch 1, input 1 must be a tensor like that of the sample, got NoneType"),
    ],
)
def test_other_structures_than_the_samples_are_refused(batch: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        calls([SAMPLE, batch], more=(1, 2))


def test_one_input() -> None:
    with pytest.raises(TypeError, match=r"batch 0 has 3 values, but the network is called with 1 input: a batch"):
        calls([(*SAMPLE, 1)], SAMPLE[0])
    with pytest.raises(TypeError, match=r"batch 0 is torch.int64, but that of the sample is torch.float32"):
        calls([torch.zeros(4, 3, dtype=torch.int64)], SAMPLE[0])
