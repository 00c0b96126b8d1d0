"""Means of maps against plain sums, and bad maps."""

from __future__ import annotations

import pytest
import torch

from spade_fast._util.errors import UserError
from spade_fast.attribution import mean_map


def test_each_map_has_the_same_weight():
    maps = torch.rand(3, 5, 7) * torch.tensor([1.0, 1e-20, 1e20])[:, None, None]
    found = mean_map(list(maps))
    expected = sum(one / one.sum() for one in maps.double()) / 3
    assert found.dtype == torch.float32 and torch.allclose(found, expected.float(), rtol=1e-6, atol=0)
    assert torch.equal(mean_map(maps), found), "maps may be one tensor"
    assert mean_map([maps[0], maps[1].double()]).dtype == torch.float64
    assert mean_map([maps[0].half()]).dtype == torch.float32


def test_a_map_of_zeros_stays_zero():
    one = torch.rand(4, 4)
    assert not mean_map([torch.zeros(4, 4)]).any()
    assert torch.allclose(mean_map([one, torch.zeros(4, 4)]), one / one.sum() / 2)


@pytest.mark.parametrize("value", [1e308, 5e-324])
def test_sums_do_not_overflow_or_vanish(value):
    assert torch.allclose(mean_map([torch.full((2, 5), value, dtype=torch.float64)]), torch.tensor(0.1).double())


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([], ValueError, "maps must have at least one map"),
        ([torch.ones(2, 3), torch.ones(3, 2)], ValueError, r"maps\[0\] has \[2, 3\] and maps\[1\] \[3, 2\]"),
        ([torch.ones(2, 3), torch.ones(1, 3)], ValueError, r"maps\[0\] has \[2, 3\] and maps\[1\] \[1, 3\]"),
        ([torch.ones(1, 2, 3)], ValueError, r"maps\[0\] must have shape \[H, W\]"),
        ([torch.ones(0, 3)], ValueError, r"maps\[0\] must have shape \[H, W\] and not be empty"),
        ([torch.ones(2, 2), -torch.ones(2, 2)], ValueError, r"maps\[1\] has negative values"),
        ([torch.full((2, 2), torch.nan)], ValueError, r"maps\[0\] has NaN or infinite values"),
        ([torch.full((2, 2), torch.inf)], ValueError, r"maps\[0\] has NaN or infinite values"),
        ([torch.ones(2, 2, dtype=torch.int64)], TypeError, r"maps\[0\] must be a floating-point tensor"),
        ([[1.0]], TypeError, r"maps\[0\] must be a floating-point tensor, got list"),
    ],
)
def test_bad_maps(maps, error, message):
    with pytest.raises(error, match=message) as caught:
        mean_map(maps)
    assert isinstance(caught.value, UserError)
