"""`Target`, and what every target's numbers are checked for."""

from __future__ import annotations

import math

import pytest
import torch

from spade_fast._util.errors import UserError
from spade_fast.targets import Target
from spade_fast.targets.target import checked_numbers

TARGET = Target("brightness", lambda output: output.mean(1))


def test_own_targets():
    output = torch.tensor([[1.0, 3.0]])
    assert TARGET(output).tolist() == TARGET.kept(output).tolist() == [2.0] and str(TARGET) == "brightness"
    assert Target("a", TARGET.read, keep=lambda output: output[:, 0]).kept(output).tolist() == [1.0]


def test_attributes_of_the_wrong_type():
    for given, message in (
        (("mean", 3), "read must be a function of the network's output, got 3"),
        (("mean", len, 3), "keep must be a function of the network's output, got 3"),
        ((len, len), "name and layer must be text"),
        (("mean", len, None, 3), "name and layer must be text, got 'mean' and 3"),
    ):
        with pytest.raises(TypeError, match=message) as caught:
            Target(*given)
        assert isinstance(caught.value, UserError)


def test_one_number_per_sample():
    numbers = torch.tensor([1.0, 2.0])
    for rows in (2, None):
        assert checked_numbers(TARGET, numbers, rows) is numbers
    assert checked_numbers(TARGET, torch.tensor(3.0), 1).tolist() == [3.0]
    for values, rows in ((torch.zeros(2, 3), 2), (torch.zeros(2, 1), 2), (torch.zeros(2), 1), (torch.tensor(1.0), 2)):
        shape = ", ".join(map(str, values.shape))
        with pytest.raises(
            ValueError, match=rf"target brightness must return one number per sample, \[S\], got \[{shape}\] for {rows}"
        ):
            checked_numbers(TARGET, values, rows)


def test_numbers_that_cannot_be_explained():
    for values in (3.0, None, [1.0]):
        with pytest.raises(
            TypeError, match=r"target brightness must return a tensor \[S\], one number per sample, got"
        ):
            checked_numbers(TARGET, values, 1)
    for values in (torch.tensor([1]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(TypeError, match=r"must return floating-point numbers, got a torch\.\w+ tensor \[1\]"):
            checked_numbers(TARGET, values, 1)
    with pytest.raises(ValueError, match="target brightness must be finite, got nan in row 1"):
        checked_numbers(TARGET, torch.tensor([1.0, math.nan]), 2)
