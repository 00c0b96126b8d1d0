"""Noise and masks of NoiseAugmenter, measured on the data's scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spade_fast import NoiseAugmenter
from spade_fast._util.errors import UserError


def copies(augmenter: NoiseAugmenter, sample: Any, sample_id: str = "a") -> Tensor:
    return torch.cat(list(augmenter(sample, sample_id)))


def test_noise_has_the_scale_of_each_column() -> None:
    std = torch.tensor([0.1, 1.0, 0.0, 50.0])
    row = torch.tensor([[1.0, -2.0, 3.0, 400.0]])
    made = copies(NoiseAugmenter(4000, row[0], std, noise=0.5, mask=0), row)
    assert torch.allclose(made.std(0), 0.5 * std, rtol=0.05) and torch.allclose(made.mean(0), row[0], rtol=0.05)
    assert (made[:, 2] == 3).all(), "a column that never changes gets no noise"


def test_without_statistics_the_scale_is_that_of_the_sample() -> None:
    sound = 3 + 20 * torch.randn(1, 2, 500)
    made = copies(NoiseAugmenter(8, noise=0.3, mask=0), sound)
    assert abs(float((made - sound).std()) / float(sound.std()) - 0.3) < 0.01
    masked = copies(NoiseAugmenter(8, noise=0, mask=0.4), sound)
    replaced = masked != sound
    assert abs(float(replaced.float().mean()) - 0.4) < 0.03
    assert torch.allclose(masked[replaced], sound.mean())


def test_masks_set_entries_to_the_mean_and_do_not_change_the_noise() -> None:
    row, mean = torch.full((1, 40), 5.0), torch.arange(40.0) + 100
    noisy = copies(NoiseAugmenter(50, mean, np.ones(40), mask=0), row)
    both = copies(NoiseAugmenter(50, mean, np.ones(40), mask=0.25), row)
    replaced = both == mean
    assert abs(float(replaced.float().mean()) - 0.25) < 0.03
    assert torch.equal(both[~replaced], noisy[~replaced])
    more = copies(NoiseAugmenter(50, mean, np.ones(40), mask=0.5), row) == mean
    assert bool((more >= replaced).all()), "the same draws, whatever the probability"


@pytest.mark.parametrize(
    ("shape", "span"),
    [((3, 200), (None, 20)), ((4, 12, 16, 16), (None, 4, 8, 8)), ((60, 5), (10, 1)), ((90,), (30,)), ((90,), 30)],
)
def test_neighbours_are_masked_together(shape: tuple[int, ...], span: Any) -> None:
    sample = torch.randn(1, *shape)
    masked = copies(NoiseAugmenter(40, 0.0, 1.0, noise=0, mask=0.3, span=span), sample) == 0
    assert abs(float(masked.float().mean()) - 0.3) < 0.07
    for dimension, size in enumerate(span if isinstance(span, tuple) else (span,), start=1):
        lengths = runs(masked.movedim(dimension, -1).flatten(0, -2))
        if size is None:
            assert set(lengths) == {masked.shape[dimension]}
        else:
            assert all(length % size == 0 for length in lengths) and (size > 1) == (min(lengths) > 1)
    starts = {int(one.flatten().nonzero()[0]) for one in masked if one.any()}
    assert len(starts) > 3, "blocks begin anywhere"


def runs(rows: Tensor) -> list[int]:
    """Lengths of the stretches of True that lie within a row, or fill it."""
    found = []
    for row in rows.tolist():
        stretches = "".join(".#"[one] for one in row).split(".")
        inner = stretches[1:-1] if len(stretches) > 1 else stretches
        found += [len(one) for one in inner if one]
    return found


def test_integers_and_the_form_of_the_sample_stay() -> None:
    frames, lengths = torch.randn(1, 2, 6), torch.tensor([6])
    augmenter = NoiseAugmenter(n=5, batch_size=3)
    given = {"frames": frames, "lengths": lengths, "flag": True}
    first, second = augmenter(given, "a")
    assert set(first) == set(given) and isinstance(first, dict) and first["flag"] is True
    assert first["frames"].shape == (3, 2, 6) and second["frames"].shape == (2, 2, 6)
    assert torch.equal(first["lengths"], lengths.expand(3)) and first["lengths"].dtype == torch.int64
    pair = next(iter(augmenter((frames, frames), "a")))
    assert isinstance(pair, tuple) and not torch.equal(pair[0], pair[1]), "each tensor has noise of its own"


def test_tensors_within_parts_are_repeated() -> None:
    frames, state = torch.randn(1, 4), (torch.randn(1, 3), torch.randn(1, 3))
    for batch, count in zip(NoiseAugmenter(n=5, batch_size=3)((frames, state)), (3, 2), strict=True):
        assert batch[0].shape == (count, 4)
        assert all(torch.equal(one, own.expand(count, 3)) for one, own in zip(batch[1], state, strict=True))
    with pytest.raises(ValueError, match="1 of the sample must be one sample"):
        list(NoiseAugmenter()((frames, [torch.randn(2, 3)])))


def test_statistics_of_several_tensors() -> None:
    sample = (torch.zeros(1, 3), torch.zeros(1, 2))
    augmenter = NoiseAugmenter(2000, {0: 0.0, 1: 0.0}, {0: [1.0, 2.0, 3.0], 1: 10.0}, noise=1, mask=0, batch_size=2000)
    (made,) = augmenter(sample)
    assert torch.allclose(made[0].std(0), torch.tensor([1.0, 2.0, 3.0]), rtol=0.07)
    assert torch.allclose(made[1].std(0), torch.full((2,), 10.0), rtol=0.07)
    with pytest.raises(ValueError, match=r"mean must be .* a mapping that has 1 of the sample"):
        NoiseAugmenter(2, {0: 0.0}, {0: 1.0})(sample)
    with pytest.raises(ValueError, match="mean must be numbers for a sample of one tensor"):
        NoiseAugmenter(2, {0: 0.0}, {0: 1.0})(sample[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_single_numbers(dtype: torch.dtype) -> None:
    sample = torch.randn(1, 4, 6).to(dtype)
    made = copies(NoiseAugmenter(3), sample.requires_grad_())
    assert made.dtype == dtype and made.shape == (3, 4, 6) and not made.requires_grad
    number = copies(NoiseAugmenter(3, 0.0, 1.0, mask=0), torch.ones(1, dtype=dtype))
    assert number.shape == (3,) and len(set(number.tolist())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": 0.0}, "mean and std must be given together"),
        ({"mean": 0.0, "std": -1.0}, "std must be at least 0"),
        ({"mean": "x", "std": 1.0}, "mean must be numbers"),
        ({"mean": 0.0, "std": float("nan")}, "std has NaN"),
        ({"noise": -0.1}, "noise must"),
        ({"mask": 1.1}, "mask must lie between 0 and 1"),
        ({"span": 0}, "span must be at least 1"),
        ({"span": 1.5}, "span must be an integer"),
        ({"span": (None, 0)}, "span must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        NoiseAugmenter(**options)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("options", "sample", "message"),
    [
        ({}, torch.ones(1, 5), "all values of the sample are the same.*give the data's mean and std"),
        ({}, torch.randn(2, 5), r"the sample must be one sample \[1, ...\] and not be empty, got \[2, 5\]"),
        ({}, torch.randn(1, 0), "not be empty"),
        ({}, torch.tensor(1.0), r"got \[\]"),
        ({}, {"x": torch.randn(3, 2)}, r"'x' of the sample must be one sample"),
        ({}, torch.full((1, 3), float("inf")), "NaN or infinite"),
        ({"mean": [0.0] * 4, "std": [1.0] * 4}, torch.randn(1, 5), r"mean \[4\] does not broadcast to a sample \[5\]"),
        ({"span": (2, 2)}, torch.randn(1, 5), r"one for each dimension of a sample \[5\], got \(2, 2\)"),
    ],
)
def test_bad_samples(options: dict[str, Any], sample: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        NoiseAugmenter(n=2, **options)(sample)
    assert isinstance(caught.value, UserError)


def test_noise_that_is_too_large_for_the_type() -> None:
    with pytest.raises(UserError, match=r"too large for torch\.float16"):
        copies(NoiseAugmenter(1, 0.0, 1e6, noise=1), torch.ones(1, 8).half())
