"""Calibration images: random augmentations of one sample, reproducible from ``(seed, sample id)`` alone."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import require
from spade_fast.pruning.calibration import images_per_batch

_CROP_TRIES = 10
# Columns of the table of random numbers, after area and aspect ratio of each try.
_TOP, _LEFT, _FLIP, _BRIGHTNESS, _HUE = range(2 * _CROP_TRIES, 2 * _CROP_TRIES + 5)
# A few values outside [0, 1] come from noise or adversarial samples; many of them mean a wrong mean and std.
_OUTSIDE_MARGIN, _OUTSIDE_SHARE = 0.1, 0.05


class ImageAugmenter:
    """Makes the random images on which the trace of one image is calibrated (SPADE, arXiv 2310.04519, section 4).

    Each image is a random resized crop, flipped with probability 1/2, of changed brightness and then shifted hue. It is
    made in colours between 0 and 1: the normalisation of the input is undone first and applied again at the end.
    Every image has a draw of its own, and image `i` depends on ``(seed, sample id, i)`` alone: not on `n`, the batch
    size, the device or torch's global random state.

    Parameters
    ----------
    n
        Number of images.
    mean, std
        Normalisation of the images that the network takes, one number per channel; None for images already in 0-1.
    seed
        Any integer.
    size
        Height and width of the images made (a number for both); None for those of the sample.
    batch_size
        Images per batch; None for 8 on a CPU and 64 elsewhere. It changes memory and speed only.
    scale
        Range of the crop's share of the image area.
    ratio
        Range of the crop's width over its height.
    flip
        Probability of a horizontal flip.
    brightness
        Brightness is multiplied by a number drawn from ``[1 - brightness, 1 + brightness]`` and clipped to 0-1.
    hue
        Hue is shifted by a number drawn from ``[-hue, hue]``, in turns (at most 0.5). Set it to 0 for images that do
        not have three channels.

    The hue is shifted by kornia (the extra ``image``).

    Raises
    ------
    TypeError, ValueError
        A parameter of the wrong type or outside its range.

    Examples
    --------
    >>> augmenter = ImageAugmenter(n=6, batch_size=4, seed=1)
    >>> [tuple(batch.shape) for batch in augmenter(torch.rand(3, 8, 8))]
    [(4, 3, 8, 8), (2, 3, 8, 8)]
    """

    def __init__(
        self,
        n: int = 1024,
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
        hue: float = 0.3,
    ) -> None:
        self.n = integer("n", n, 1)
        self.seed = integer("seed", seed)
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, 1)
        self.mean, self.std = _normalisation(mean, std)
        self.size = None if size is None else _size(size)
        self.scale = _interval("scale", scale, 1.0)
        self.ratio = _interval("ratio", ratio, math.inf)
        self.flip = _fraction("flip", flip, 1.0)
        self.brightness = _fraction("brightness", brightness, 1.0)
        self.hue = _fraction("hue", hue, 0.5)

    def __call__(self, image: Tensor, sample_id: str | int = 0) -> AugmentedImages:
        """Return the augmentations of one image, which can be run over any number of times.

        Parameters
        ----------
        image : Tensor ``[C, H, W]`` or ``[1, C, H, W]``
            The sample as the network takes it (normalised by `mean` and `std`), of a floating-point type.
        sample_id
            Names the sample: with the seed it fixes all random numbers. ``0`` and ``"0"`` are the same sample.

        Returns
        -------
        AugmentedImages
            Iterable of tensors ``[batch, C, height, width]`` of the sample's type, on its device; `len` is the number
            of batches.

        Raises
        ------
        TypeError
            `image` is not a floating-point tensor.
        ValueError
            Wrong shape, NaN or infinite values, or not three channels although hue is to be shifted.
        ImportError
            kornia is missing.
        """
        if not isinstance(image, Tensor) or not image.is_floating_point():
            given = f"{image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
            raise InvalidTypeError(f"image must be a floating-point tensor, got {given}")
        if image.dim() == 4 and image.shape[0] == 1:
            image = image[0]
        if image.dim() != 3 or image.numel() == 0:
            raise InvalidValueError(
                f"image must have shape [C, H, W] or [1, C, H, W], not empty, got {list(image.shape)}"
            )
        if not bool(torch.isfinite(image).all()):
            raise InvalidValueError("image has NaN or infinite values")
        channels = image.shape[0]
        if self.hue and channels != 3:
            raise InvalidValueError(f"hue needs images of 3 channels, got {channels}: use ImageAugmenter(hue=0)")
        if self.hue:
            require("kornia", "shifting hue needs")
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise InvalidValueError(f"mean and std have {len(self.mean)} numbers, but image has {channels} channels")
        return AugmentedImages(self, image.detach(), str(sample_id))

    def __repr__(self) -> str:
        return f"ImageAugmenter(n={self.n}, mean={self.mean}, std={self.std}, seed={self.seed}, size={self.size})"


class AugmentedImages:
    """The augmentations of one image; made by `ImageAugmenter`, batch by batch, and again in each run over them."""

    def __init__(self, augmenter: ImageAugmenter, image: Tensor, sample_id: str) -> None:
        self.augmenter = augmenter
        self.sample_id = sample_id
        self.batch_size = augmenter.batch_size or images_per_batch(image.device)
        self._dtype = image.dtype
        # Half precision would round the colours more coarsely than an 8-bit photo.
        self._colours = self._undo_normalisation(image.to(torch.promote_types(image.dtype, torch.float32)))
        self._draws = _random_table(augmenter.seed, sample_id, augmenter.n)

    def __len__(self) -> int:
        return -(-self.augmenter.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        n, step = self.augmenter.n, self.batch_size
        return (self._batch(range(start, min(start + step, n))) for start in range(0, n, step))

    def _undo_normalisation(self, image: Tensor) -> Tensor:
        mean, std = self._mean_and_std(image)
        colours = image * std + mean
        outside = ((colours < -_OUTSIDE_MARGIN) | (colours > 1 + _OUTSIDE_MARGIN)).float().mean().item()
        if outside > _OUTSIDE_SHARE:
            warnings.warn(
                f"{outside:.0%} of the image's values lie outside 0-1 once mean {self.augmenter.mean} and std "
                f"{self.augmenter.std} are undone, and are clipped: are these the network's mean and std?",
                stacklevel=4,
            )
        return colours.clamp(0, 1)

    def _mean_and_std(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.augmenter.mean or (0.0,), self.augmenter.std or (1.0,)
        return like.new_tensor(mean).view(-1, 1, 1), like.new_tensor(std).view(-1, 1, 1)

    def _batch(self, indices: range) -> Tensor:
        options, source = self.augmenter, self._colours
        channels, height, width = source.shape
        size = options.size or (height, width)
        draws = self._draws[indices.start : indices.stop]
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
        # One image at a time stays in a processor's cache; a GPU wants the whole batch in one call.
        chunk = 1 if source.device.type == "cpu" else len(batch)
        mean, std = self._mean_and_std(source)
        for images, factor, shift in zip(batch.split(chunk), factors.split(chunk), shifts.split(chunk), strict=True):
            coloured = (images * factor).clamp_(0, 1)
            if options.hue:
                coloured = adjust_hue(coloured, shift.flatten())
            images.copy_(coloured.sub_(mean).div_(std))
        return batch.to(self._dtype)


def _random_table(seed: int, sample_id: str, n: int) -> Tensor:
    """Uniform numbers ``[n, 25]`` in float64; row i does not depend on n."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.rand(n, _HUE + 1, generator=generator, dtype=torch.float64)


def _crop_box(
    draw: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop: the first try that fits, else the largest centred one of allowed ratio."""
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


def _fraction(name: str, value: float, most: float) -> float:
    if not 0 <= value <= most:
        raise InvalidValueError(f"{name} must lie between 0 and {most:g}, got {value!r}")
    return float(value)


def _interval(name: str, value: tuple[float, float], most: float) -> tuple[float, float]:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise InvalidValueError(f"{name} must be two rising numbers above 0{limit}, got {value!r}")
    return float(value[0]), float(value[1])


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return integer("size", height, 1), integer("size", width, 1)


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise InvalidValueError("mean and std must be given together")
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != len(std) or not mean:
        raise InvalidValueError(f"mean and std must have the same number of channels, got {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise InvalidValueError(f"mean must be finite and std positive and finite, got {mean} and {std}")
    return mean, std
