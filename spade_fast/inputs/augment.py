"""Calibration images: random augmentations of one sample, determined by ``(seed, sample id)`` alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import integer, is_number, kind, normalisation, number, sides
from spade_fast._util.draws import add_noise, generator_of, noise_deviation
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import require
from spade_fast.inputs.augmenters import AUGMENTATIONS, Augmentations, Augmenter

HUE = 0.3  # largest shift by default
_CROP_TRIES = 10
# Columns of the table of random numbers; the columns before them hold area and aspect ratio of each try.
_TOP, _LEFT, _FLIP, _BRIGHTNESS, _HUE = range(2 * _CROP_TRIES, 2 * _CROP_TRIES + 5)
# Noise or adversarial samples put a few values outside [0, 1]; many values outside indicate a wrong mean and std.
_OUTSIDE_MARGIN, _OUTSIDE_SHARE = 0.1, 0.05


class ImageAugmenter(Augmenter):
    """Makes the random images on which the trace of one image is calibrated (SPADE, arXiv 2310.04519, section 4).

    Each image is a random resized crop that is flipped horizontally with probability 1/2, then changed in brightness
    and hue. Augmentation works on colours between 0 and 1: the normalisation of the input is undone first and applied
    again at the end. Images are drawn independently, and image `i` depends only on ``(seed, sample id, i)``, not on
    `n`, the batch size, the device or torch's global random state. Noise comes last, and leaves the other draws as they
    are.

    Parameters
    ----------
    n : int
        Number of images (in the paper: 1024).
    mean, std : sequence of float, optional
        Normalisation of the network's input, one number per channel; None for images that are already between 0 and 1.
    seed : int
        Any integer.
    size : int or (int, int), optional
        Height and width of the augmented images in pixels, or one number for both; None for those of the sample.
    batch_size : int, optional
        Images per batch; None for 8 on a CPU and 64 elsewhere. It affects only memory and speed.
    scale : (float, float)
        Range of the crop's area as a share of the image's area.
    ratio : (float, float)
        Range of the crop's width divided by its height.
    flip : float
        Probability of a horizontal flip.
    brightness : float
        Colours are multiplied by a number drawn from ``[1 - brightness, 1 + brightness]`` and clipped to 0-1.
    hue : float
        The hue is shifted by a number drawn from ``[-hue, hue]``, in turns (at most 0.5). Shifting it needs kornia (the
        extra ``image``) and three channels; 0 leaves it unchanged.
    noise : float
        Standard deviation of the Gaussian noise that is added to each image as the network takes it, as a share of the
        range (maximum - minimum) of the sample's values. It is not clipped. A trace on which SmoothGrad runs is
        calibrated with its noise.

    Raises
    ------
    TypeError, ValueError
        A parameter has the wrong type or is out of range.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import ImageAugmenter
    >>> augmenter = ImageAugmenter(n=6, batch_size=4, seed=1, hue=0)
    >>> [tuple(batch.shape) for batch in augmenter(torch.rand(3, 8, 8))]
    [(4, 3, 8, 8), (2, 3, 8, 8)]
    """

    def __init__(
        self,
        n: int = AUGMENTATIONS,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.5,
        hue: float = HUE,
        noise: float = 0.0,
    ) -> None:
        super().__init__(n, seed, batch_size)
        self.mean, self.std = _normalisation(mean, std)
        self.size = None if size is None else sides("size", size)
        self.scale = _interval("scale", scale, 1.0)
        self.ratio = _interval("ratio", ratio, math.inf)
        self.flip = number("flip", flip, 0, 1)
        self.brightness = number("brightness", brightness, 0, 1)
        self.hue = number("hue", hue, 0, 0.5)
        self.noise = number("noise", noise, 0)

    def __call__(self, image: Tensor, sample_id: str | int = 0) -> AugmentedImages:
        """Return the augmentations of one image, which can be iterated any number of times.

        Parameters
        ----------
        image : Tensor ``[C, H, W]`` or ``[1, C, H, W]``
            The sample as the network takes it (normalised by `mean` and `std`), with a floating-point dtype.
        sample_id : str or int
            Name of the sample. With the seed it determines all random numbers; ``0`` and ``"0"`` are the same sample.

        Returns
        -------
        AugmentedImages
            Iterable of tensors ``[N, C, H, W]`` with the sample's dtype and device; `len` is the number of batches.

        Raises
        ------
        TypeError
            `image` is not a floating-point tensor.
        ValueError
            `image` has the wrong shape, NaN or infinite values, or not three channels although `hue` is not 0.
        ImportError
            kornia is not installed.
        """
        image = _checked(image)
        channels = image.shape[0]
        if self.hue and channels != 3:
            raise InvalidValueError(
                f"hue needs images of 3 channels, got {list(image.shape)}: use ImageAugmenter(hue=0)"
            )
        if self.hue:
            require("kornia", "shifting hue needs")
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise InvalidValueError(f"mean and std have {len(self.mean)} numbers, but image has {channels} channels")
        return AugmentedImages(self, image, str(sample_id))

    def noisy(self, image: Tensor, sample_id: str | int, count: int) -> Tensor:
        """Return copies of the sample itself with noise, but no augmentation.

        Parameters
        ----------
        image : Tensor ``[C, H, W]`` or ``[1, C, H, W]``
            The sample as the network takes it, with a floating-point dtype.
        sample_id : str or int
            Name of the sample. With the seed it determines the noise of copy `i`, which is not that of image `i`.
        count : int
            Number of copies.

        Returns
        -------
        Tensor ``[count, C, H, W]``
            With the sample's dtype and device.

        Raises
        ------
        TypeError, ValueError
            `image` is not a finite floating-point tensor of the right shape, or `count` not an integer of at least 1;
            the noise is too large for the dtype.
        """
        image = _checked(image)
        names = [f"copy/{self.seed}/{index}/{sample_id}" for index in range(integer("count", count, 1))]
        return add_noise(image.expand(count, -1, -1, -1), noise_deviation(image, self.noise), names, image.dtype)

    def __repr__(self) -> str:
        return (
            f"ImageAugmenter(n={self.n}, mean={self.mean}, std={self.std}, seed={self.seed}, size={self.size}, "
            f"noise={self.noise:g})"
        )


class AugmentedImages(Augmentations[Tensor]):
    """The augmentations of one image, returned by `ImageAugmenter`."""

    def __init__(self, augmenter: ImageAugmenter, image: Tensor, sample_id: str) -> None:
        super().__init__(augmenter.divide(range(augmenter.n), image.device))
        self.augmenter = augmenter
        self.sample_id = sample_id
        self._dtype = image.dtype
        # Half precision would round colours more coarsely than an 8-bit photo does.
        self._colours = self._undo_normalisation(image.to(torch.promote_types(image.dtype, torch.float32)))
        self._deviation = noise_deviation(image, augmenter.noise)
        self._draws = _random_table(augmenter.seed, sample_id, augmenter.n)

    def _undo_normalisation(self, image: Tensor) -> Tensor:
        mean, std = self._mean_and_std(image)
        colours = image * std + mean
        outside = ((colours < -_OUTSIDE_MARGIN) | (colours > 1 + _OUTSIDE_MARGIN)).float().mean().item()
        if outside > _OUTSIDE_SHARE:
            warnings.warn(
                f"{outside:.0%} of the image's values lie outside 0-1 after undoing mean {self.augmenter.mean} and std "
                f"{self.augmenter.std}, and are clipped: are these the network's mean and std?",
                stacklevel=4,
            )
        return colours.clamp(0, 1)

    def _mean_and_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.augmenter.mean or (0.0,), self.augmenter.std or (1.0,)
        return like.new_tensor(mean).view(-1, 1, 1), like.new_tensor(std).view(-1, 1, 1)

    def _batch(self, indices: Sequence[int]) -> Tensor:
        options, source = self.augmenter, self._colours
        channels, height, width = source.shape
        size = options.size or (height, width)
        draws = self._draws[list(indices)]
        batch = source.new_empty(len(indices), channels, *size)
        for image, draw in zip(batch, draws.tolist(), strict=True):
            top, left, crop_height, crop_width = _crop_box(draw, height, width, options.scale, options.ratio)
            crop = source[None, :, top : top + crop_height, left : left + crop_width]
            crop = F.interpolate(crop, size, mode="bilinear", align_corners=False, antialias=True)[0]
            image.copy_(crop.flip(-1) if draw[_FLIP] < options.flip else crop)

        factors = 1 + options.brightness * (2 * draws[:, _BRIGHTNESS] - 1)
        shifts = 2 * math.pi * options.hue * (2 * draws[:, _HUE] - 1)
        factors, shifts = (draw.to(source).view(-1, 1, 1, 1) for draw in (factors, shifts))
        if options.hue:
            from kornia.enhance import adjust_hue
        # On a CPU a single image stays in the cache; a GPU is fastest with the whole batch in one call.
        chunk = 1 if source.device.type == "cpu" else len(batch)
        mean, std = self._mean_and_std(source)
        for images, factor, shift in zip(batch.split(chunk), factors.split(chunk), shifts.split(chunk), strict=True):
            coloured = (images * factor).clamp_(0, 1)
            if options.hue:
                coloured = adjust_hue(coloured, shift.flatten())
            images.copy_(coloured.sub_(mean).div_(std))
        if not options.noise:
            return batch.to(self._dtype)
        names = [f"noise/{options.seed}/{index}/{self.sample_id}" for index in indices]
        return add_noise(batch, self._deviation, names, self._dtype)


def _random_table(seed: int, sample_id: str, n: int) -> Tensor:
    """Return uniform random numbers ``[N, 25]``, float64; row i does not depend on N."""
    return torch.rand(n, _HUE + 1, generator=generator_of(f"{seed}/{sample_id}"), dtype=torch.float64)


def _crop_box(
    draw: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a crop: the first try that fits, or else the largest centred crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in zip(draw[:_CROP_TRIES], draw[_CROP_TRIES : 2 * _CROP_TRIES], strict=True):
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + ratio_draw * (high - low))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(draw[_TOP] * (height - crop_height + 1))
            left = int(draw[_LEFT] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_height = max(1, min(height, round(width / aspect)))
    crop_width = max(1, min(width, round(height * aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _checked(image: Tensor) -> Tensor:
    """Return the sample as ``[C, H, W]``, detached, or raise TypeError or ValueError."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise InvalidTypeError(f"image must be a floating-point tensor, got {kind(image)}")
    if image.dim() == 4 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 3 or image.numel() == 0:
        raise InvalidValueError(
            f"image must have shape [C, H, W] or [1, C, H, W] and not be empty, got {list(image.shape)}; "
            "NoiseAugmenter takes samples of any shape"
        )
    if not bool(torch.isfinite(image).all()):
        raise InvalidValueError("image has NaN or infinite values")
    return image.detach()


def _interval(name: str, value: Any, most: float) -> tuple[float, float]:
    limit = "" if math.isinf(most) else f" and at most {most:g}"
    allowed = f"{name} must be two numbers above 0{limit} in ascending order, got {value!r}"
    if not isinstance(value, tuple | list) or not all(map(is_number, value)):
        raise InvalidTypeError(allowed)
    if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
        raise InvalidValueError(allowed)
    return float(value[0]), float(value[1])


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise InvalidValueError("mean and std must be given together")
    return normalisation(mean, std)
