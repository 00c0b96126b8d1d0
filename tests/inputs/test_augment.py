"""Augmentations against scalar code: `colorsys` for colours, plain bilinear sums for crops."""

from __future__ import annotations

import colorsys
import hashlib

import pytest
import torch

from spade_fast._util.errors import UserError
from spade_fast.inputs.augment import ImageAugmenter, _crop_box, _random_table

OFF = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "brightness": 0.0, "hue": 0.0}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height: int = 24, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def all_images(batches) -> torch.Tensor:
    return torch.cat(list(batches))


def shift_hue(image: torch.Tensor, shift: float) -> torch.Tensor:
    """Turn the hue pixel by pixel."""
    shifted = torch.empty_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            shifted[:, y, x] = torch.tensor(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    return shifted


def test_hue_alone():
    image = photo(7, 7)
    image[:, 0, 0], image[:, 0, 1] = 0.0, 1.0
    image[:, 0, 2] = torch.tensor([1.0, 0.0, 0.0])
    image[:, 0, 3] = torch.tensor([0.5, 0.5, 0.1])  # two equal largest channels
    images = all_images(ImageAugmenter(n=6, seed=3, **{**OFF, "hue": 0.5})(image))
    for made, draw in zip(images, _random_table(3, "0", 6).tolist(), strict=True):
        assert torch.allclose(made, shift_hue(image, draw[24] - 0.5), atol=5e-6)


def bilinear(image: torch.Tensor, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> torch.Tensor:
    """Enlarge a crop, value by value, with the crop's edge pixels repeated outside it."""
    out = torch.empty(image.shape[0], *size)
    for y in range(size[0]):
        for x in range(size[1]):
            at = ((y + 0.5) * height / size[0] - 0.5, (x + 0.5) * width / size[1] - 0.5)
            lows = [int(value // 1) for value in at]
            total = torch.zeros(image.shape[0])
            for dy in (0, 1):
                for dx in (0, 1):
                    row = min(max(lows[0] + dy, 0), height - 1)
                    column = min(max(lows[1] + dx, 0), width - 1)
                    share = (1 - abs(at[0] - lows[0] - dy)) * (1 - abs(at[1] - lows[1] - dx))
                    total += share * image[:, top + row, left + column]
            out[:, y, x] = total
    return out


def test_whole_augmentation_against_its_drawn_numbers():
    image = photo()
    augmenter = ImageAugmenter(n=5, seed=3)
    draws = _random_table(3, "cat", 5).tolist()
    images = all_images(augmenter(image, "cat"))
    for made, draw in zip(images, draws, strict=True):
        box = _crop_box(draw, 24, 20, (0.2, 1.0), (3 / 4, 4 / 3))
        expected = bilinear(image, *box, (24, 20))
        if draw[22] < 0.5:
            expected = expected.flip(-1)
        expected = (expected * (0.5 + draw[23])).clamp(0, 1)
        expected = shift_hue(expected, 0.6 * draw[24] - 0.3)
        assert torch.allclose(made, expected, atol=1e-5)


def test_nothing_switched_on_returns_the_image():
    image = photo(12, 12)
    images = all_images(ImageAugmenter(n=3, **OFF)(image))
    assert torch.allclose(images, image.expand(3, -1, -1, -1), atol=1e-6)


def test_flip_alone():
    image = photo(8, 8)
    images = all_images(ImageAugmenter(n=2, **{**OFF, "flip": 1.0})(image))
    assert torch.allclose(images, image.flip(-1).expand_as(images), atol=1e-6)


def test_normalisation_is_undone_and_applied_again():
    image = photo()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    plain = all_images(ImageAugmenter(n=4)(image))
    normalised = all_images(ImageAugmenter(n=4, mean=MEAN, std=STD)((image - mean) / std))
    assert torch.allclose(normalised * std + mean, plain, atol=1e-5)
    assert plain.min() >= 0 and plain.max() <= 1


def test_crops_stay_inside_and_in_range():
    areas = []
    for draw in _random_table(0, "0", 2000).tolist():
        top, left, height, width = _crop_box(draw, 64, 48, (0.2, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= 64 - height and 0 <= left <= 48 - width and height > 0 and width > 0
        assert 0.7 < width / height < 1.4
        areas.append(height * width / (64 * 48))
    assert min(areas) > 0.18 and max(areas) > 0.95
    # No try fits: the largest centred crop of allowed ratio.
    assert _crop_box([1.0] * 25, 10, 100, (1.0, 1.0), (1.0, 1.0)) == (0, 45, 10, 10)


def test_reproducible_from_seed_and_sample_id_alone():
    image = photo()
    first = all_images(ImageAugmenter(n=7, seed=5, batch_size=7)(image, "a"))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    batches = ImageAugmenter(n=7, seed=5, batch_size=3)(image[None], "a")
    assert torch.equal(all_images(batches), first)
    assert torch.equal(all_images(batches), first), "a second run over the batches"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(all_images(ImageAugmenter(n=4, seed=5)(image, "a")), first[:4])
    assert not torch.equal(all_images(ImageAugmenter(n=7, seed=6)(image, "a")), first)
    assert not torch.equal(all_images(ImageAugmenter(n=7, seed=5)(image, "b")), first)
    assert torch.equal(all_images(ImageAugmenter(n=7)(image, 3)), all_images(ImageAugmenter(n=7)(image, "3")))
    assert len({tuple(made.flatten().tolist()) for made in first}) == 7, "each image has a draw of its own"


def noise_of(made: torch.Tensor, plain: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The noise of images, in standard deviations for noise of the whole range."""
    return (made - plain) / (sample.max() - sample.min())


def test_draws_of_augmentations_are_as_they_were():
    digest = hashlib.blake2b(b"3/cat", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    assert torch.equal(_random_table(3, "cat", 5), torch.rand(5, 25, generator=generator, dtype=torch.float64))


def test_noise_is_a_share_of_the_range_in_the_scale_of_the_network():
    sample = (photo(64, 48) - 0.4) / 0.2
    options = {"n": 12, "mean": [0.4] * 3, "std": [0.2] * 3, "seed": 5}
    plain = all_images(ImageAugmenter(**options)(sample, "a"))
    found = noise_of(all_images(ImageAugmenter(**options, noise=0.25)(sample, "a")), plain, sample)
    assert abs(float(found.std()) - 0.25) < 0.005 and abs(float(found.mean())) < 0.005
    assert float(found.max()) > 0.9, "it is not clipped"
    doubled = noise_of(all_images(ImageAugmenter(**options, noise=0.5)(sample, "a")), plain, sample)
    assert torch.allclose(doubled, 2 * found, atol=1e-5), "the same draws, whatever their size"
    assert len({round(float(one[0, 0, 0]), 5) for one in found}) == 12


def test_noise_depends_on_seed_sample_and_index_alone():
    sample = photo()

    def make(sample_id: str = "a", **options) -> torch.Tensor:
        return all_images(ImageAugmenter(**{"n": 7, "seed": 5, "noise": 0.2, **options})(sample, sample_id))

    first = make()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(make(batch_size=3), first) and torch.equal(make(n=4), first[:4])
    assert torch.equal(torch.get_rng_state(), state)
    plain = noise_of(first, make(noise=0.0), sample)
    for other in ({"seed": 6}, {"sample_id": "b"}):
        assert not torch.allclose(noise_of(make(**other), make(**other, noise=0.0), sample), plain, atol=0.1)
    double = all_images(ImageAugmenter(n=7, seed=5, noise=0.2)(sample.double(), "a"))
    half = all_images(ImageAugmenter(n=7, seed=5, noise=0.2)(sample.half(), "a"))
    assert double.dtype == torch.float64 and torch.allclose(double.float(), first, atol=1e-5)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), first, atol=5e-3)


def test_noisy_copies_of_the_sample_itself():
    sample = 4 * photo(32, 40) - 2
    augmenter = ImageAugmenter(n=2, seed=5, size=16, noise=0.2, mean=[0.5] * 3, std=[0.25] * 3)
    copies = augmenter.noisy(sample, "a", 6)
    assert copies.shape == (6, 3, 32, 40) and torch.equal(augmenter.noisy(sample[None], "a", 4), copies[:4])
    found = noise_of(copies, sample, sample)
    assert abs(float(found.std()) - 0.2) < 0.005
    images = all_images(ImageAugmenter(n=2, seed=5, noise=0.2, **OFF)(photo(32, 40), "a"))
    images = noise_of(images, photo(32, 40), photo(32, 40))
    assert float((found[:2] - images).std()) > 0.2, "other noise than that of the augmented images"
    assert torch.equal(ImageAugmenter().noisy(sample.half(), 0, 2), sample.half().expand(2, -1, -1, -1))
    assert not augmenter.noisy(sample.requires_grad_(), "a", 1).requires_grad
    constant = torch.full((3, 8, 8), 2.0)
    assert torch.equal(augmenter.noisy(constant, "a", 1)[0], constant), "without a range there is no noise"


def test_noise_that_is_too_large_for_the_dtype():
    augmenter = ImageAugmenter(n=1, noise=1e6)
    with pytest.raises(UserError, match=r"noise with standard deviation 9.* is too large for torch.float16"):
        all_images(augmenter(photo().half()))
    with pytest.raises(UserError, match=r"is too large for torch.float16"):
        augmenter.noisy(photo().half(), "a", 1)
    assert augmenter.noisy(photo(), "a", 1).isfinite().all()


def test_batches_sizes_dtypes():
    batches = ImageAugmenter(n=5, batch_size=2, size=(6, 9))(photo())
    assert len(batches) == 3
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 6, 9), (2, 3, 6, 9), (1, 3, 6, 9)]
    full = all_images(ImageAugmenter(n=3)(photo()))
    double = all_images(ImageAugmenter(n=3)(photo().double()))
    half = all_images(ImageAugmenter(n=3)(photo().half()))
    assert double.dtype == torch.float64 and torch.allclose(double.float(), full, atol=1e-5)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), full, atol=5e-3)
    grey = all_images(ImageAugmenter(n=3, hue=0, mean=[0.5], std=[0.5])(torch.rand(1, 8, 8)))
    assert grey.shape == (3, 1, 8, 8)


def test_colours_far_out_of_range_warn():
    with pytest.warns(UserWarning, match="mean and std"):
        ImageAugmenter(n=1)(photo() * 5 - 2)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 1.5},
        {"seed": "x"},
        {"batch_size": 0},
        {"mean": MEAN},
        {"mean": MEAN, "std": (1.0,)},
        {"mean": MEAN, "std": (1, 0, 1)},
        {"scale": (0.5, 0.2)},
        {"scale": (0, 1)},
        {"scale": (0.5, 2)},
        {"ratio": (1,)},
        {"hue": 0.6},
        {"brightness": -0.1},
        {"flip": 2},
        {"flip": "often"},
        {"noise": -0.1},
        {"noise": float("nan")},
        {"noise": float("inf")},
        {"noise": 10**400},
        {"noise": True},
        {"noise": "0.1"},
        {"mean": 0.5, "std": 0.5},
        {"mean": "red", "std": "red"},
        {"scale": 1},
        {"scale": ("a", "b")},
        {"ratio": None},
        {"size": (0, 4)},
        {"size": (3,)},
        {"size": "ab"},
        {"size": 4.5},
    ],
)
def test_bad_options(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))) as caught:
        ImageAugmenter(**options)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.full((3, 4, 4), float("nan")), ValueError, "NaN"),
        (torch.full((3, 4, 4), float("inf")), ValueError, "infinite"),
        (torch.rand(4, 4), ValueError, "shape"),
        (torch.rand(2, 3, 4, 4), ValueError, "shape"),
        (torch.rand(3, 0, 4), ValueError, "shape"),
        (torch.rand(1, 4, 4), ValueError, "hue"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "floating-point"),
        ("cat.jpg", TypeError, "str"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        ImageAugmenter(n=2)(image)
    if message != "hue":
        with pytest.raises(error, match=message):
            ImageAugmenter(noise=0.1).noisy(image, 0, 1)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_number_of_copies(count, error):
    with pytest.raises(error, match="count must be"):
        ImageAugmenter(noise=0.1).noisy(photo(), 0, count)


def test_channels_must_fit_mean_and_std():
    with pytest.raises(ValueError, match="4 channels"):
        ImageAugmenter(n=2, mean=MEAN, std=STD, hue=0)(torch.rand(4, 8, 8))
