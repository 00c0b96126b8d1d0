"""How good maps of importance are: where they point, what the network does without the pixels they name.

Maps ``[samples, height, width]`` are larger where a pixel matters more; scores are float64 on the device of the maps,
one a sample, and NaN where a sample has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.checks import array, class_indices, finite_floats, integer, is_number, kind
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast.pruning.calibration import images_per_batch

_BLUR = 1 / 20  # standard deviation of the blurred baseline, as a share of the shorter side
_MAPS, _LOGITS = "samples, height, width", "samples, classes"


def localisation_auc(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under the ROC curve of a map's values as a score for the pixels of a mask (SPADE, arXiv 2310.04519).

    It is the probability that a random pixel inside has a larger value than a random one outside, where equal values
    count half: 1 is perfect, 0.5 chance, and also what a map without contrast gets.

    Parameters
    ----------
    maps : Tensor ``[samples, height, width]``
        Of a floating-point type, finite.
    masks : Tensor ``[samples, height, width]``, bool
        True where the evidence is known to lie, such as on a trojan patch.

    Returns
    -------
    Tensor ``[samples]``
        NaN where a mask is empty or full.

    Raises
    ------
    TypeError, ValueError
        Tensors of the wrong type or shape; NaN or infinite maps.
    """
    maps, masks = (tensor.flatten(1) for tensor in _maps_and_masks(maps, masks))
    rising = maps.sort(1).values
    twice_the_ranks = torch.searchsorted(rising, maps) + torch.searchsorted(rising, maps, right=True) + 1
    inside = masks.sum(1)
    wins = (twice_the_ranks * masks).sum(1).double() / 2 - (inside * (inside + 1)).double() / 2
    return wins / (inside * (masks.shape[1] - inside))


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0) -> Tensor:
    """Whether a map's maximum lies in the mask (Zhang et al., ECCV 2016, arXiv 1608.00507).

    Parameters
    ----------
    maps, masks
        As in `localisation_auc`.
    tolerance
        Largest distance in pixels (Euclidean, between centres) of a maximum from the mask that still is a hit. Zhang et
        al. allow 15.

    Returns
    -------
    Tensor ``[samples]``
        1 for a hit and 0 for a miss; where several pixels share the maximum, the share of them that hit. NaN where a
        mask is empty.

    Raises
    ------
    TypeError, ValueError
        As `localisation_auc`; a tolerance that is no number, negative or infinite.
    """
    maps, masks = _maps_and_masks(maps, masks)
    if not is_number(tolerance):
        raise InvalidTypeError(f"tolerance must be a number of pixels, got {tolerance!r}")
    if not 0 <= tolerance < math.inf:
        raise InvalidValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    reach = min(int(tolerance), max(maps.shape[1:]) - 1)
    offsets = torch.arange(-reach, reach + 1, device=maps.device) ** 2
    disc = (offsets[:, None] + offsets <= tolerance**2).float()
    near = F.conv2d(masks.float().unsqueeze(1), disc[None, None], padding=reach).squeeze(1) > 0.5
    largest = maps == maps.amax((1, 2), keepdim=True)
    hits = (largest & near).sum((1, 2)).double() / largest.sum((1, 2))
    return hits.masked_fill(~masks.any(2).any(1), math.nan)


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of a map's sum that lies inside the mask: the energy-based pointing game.

    After Wang et al. (Score-CAM, CVPR workshops 2020, arXiv 1910.01279). With the cell of its class as mask it is the
    score of the grid pointing game (Böhle, Fritz, Schiele, CVPR 2021, arXiv 2104.00032).

    Parameters
    ----------
    maps, masks
        As in `localisation_auc`; maps must not be negative anywhere.

    Returns
    -------
    Tensor ``[samples]``
        0 where a mask is empty, NaN where a map is zero everywhere.

    Raises
    ------
    TypeError, ValueError
        As `localisation_auc`; maps with negative values.
    """
    maps, masks = _maps_and_masks(maps, masks)
    if bool((maps < 0).any()):
        raise InvalidValueError(
            "maps has negative values, whose energy is not defined: take maps.clamp(min=0) or maps.abs()"
        )
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2))


def deletion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: int | Sequence[int] | Tensor,
    *,
    steps: int = 50,
    baseline: str | Tensor = "blur",
    batch_size: int | None = None,
) -> Tensor:
    """Probability of the target while the most important pixels are removed (Petsiuk et al., RISE, arXiv 1806.07421).

    After step `k` the ``k * height * width // steps`` pixels of largest value are those of the baseline, in all
    channels. Equal values go by position, row by row from the top: an arbitrary order, which matters for maps with
    large areas of one value. The lower the curve, the better the map.

    Parameters
    ----------
    model
        Maps ``[n, C, H, W]`` to logits ``[n, classes]``. It runs without gradients in evaluation mode and is left as it
        was: modes, buffers and weights.
    images : Tensor ``[samples, C, H, W]``
        As the model takes them, on its device.
    maps : Tensor ``[samples, H, W]``
        Of a floating-point type, finite.
    targets
        Index of the class: one for all, or one a sample.
    steps
        From 1 to the number of pixels.
    baseline : "blur", "zero" or Tensor
        What takes the place of removed pixels. ``"blur"``: the image under a Gaussian whose standard deviation is a
        twentieth of its shorter side (11.2 of 224 pixels), cut off at three of them, borders repeated. ``"zero"``: 0 in
        what the model takes, so the mean colour if images are normalised. A tensor is expanded to the images' shape.
    batch_size
        Images a forward pass, samples and steps together; None for 8 on a CPU and 64 elsewhere. It changes memory and
        speed only.

    Returns
    -------
    Tensor ``[samples, steps + 1]``
        Softmax probabilities, float64, from the image to the baseline.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong type, shape or range; NaN or infinite images, maps, baseline or logits.
    """
    return _curve(model, images, maps, targets, steps, baseline, batch_size, insert=False)


def insertion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: int | Sequence[int] | Tensor,
    *,
    steps: int = 50,
    baseline: str | Tensor = "blur",
    batch_size: int | None = None,
) -> Tensor:
    """Probability of the target while the most important pixels are put into the baseline (RISE, arXiv 1806.07421).

    All is as in `deletion_curve`, but from the baseline to the image: the higher the curve, the better the map.
    """
    return _curve(model, images, maps, targets, steps, baseline, batch_size, insert=True)


def auc(curve: Tensor) -> Tensor:
    """Mean height of curves ``[samples, points]`` of evenly spaced points, by the trapezoid rule: ``[samples]``.

    Raises
    ------
    TypeError, ValueError
        No floating-point tensor of that shape, fewer than two points, NaN or infinite values.
    """
    curve = finite_floats("curve", curve, "samples, points")
    if curve.shape[1] < 2:
        raise InvalidValueError("curve must have at least two points, got one")
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


@dataclass(frozen=True)
class Agreement:
    """How close a pruned network's outputs are to the dense one's: tensors ``[samples]``, float64.

    Attributes
    ----------
    same_top
        1 where both have the same top class, else 0.
    probability_difference
        Absolute difference of the target's softmax probabilities.
    logit_distance
        ``||dense - pruned|| / ||dense||``, Euclidean; NaN where the dense logits are all zero.
    """

    same_top: Tensor
    probability_difference: Tensor
    logit_distance: Tensor


def agreement(dense: Tensor, pruned: Tensor, targets: int | Sequence[int] | Tensor | None = None) -> Agreement:
    """Compare a pruned network's outputs with those of the dense network on the same samples.

    Parameters
    ----------
    dense, pruned : Tensor ``[samples, classes]``
        Logits, finite.
    targets
        Index of the class: one for all, or one a sample; None for each sample's top class of the dense network.

    Returns
    -------
    Agreement
        Where classes tie, the first of them is the top class.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong type, shape or range; NaN or infinite logits.
    """
    dense = finite_floats("dense", dense, _LOGITS).double()
    pruned = finite_floats("pruned", pruned, _LOGITS).to(dense)
    if dense.shape != pruned.shape:
        raise InvalidValueError(
            f"dense and pruned must have the same shape, got {list(dense.shape)} and {list(pruned.shape)}"
        )
    top = dense.argmax(1)
    classes = top if targets is None else class_indices("targets", targets, len(dense), dense.device)
    norm = dense.norm(dim=1)
    return Agreement(
        (pruned.argmax(1) == top).double(),
        (_probabilities(dense, classes) - _probabilities(pruned, classes)).abs(),
        ((dense - pruned).norm(dim=1) / norm).masked_fill(norm == 0, math.nan),
    )


def bootstrap_interval(
    values: Tensor | np.ndarray | Sequence[float],
    groups: Tensor | np.ndarray | Sequence[str | int] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a mean by resampling groups (Efron, Tibshirani, An Introduction to the Bootstrap, 1993).

    Values that share a source, such as scores of several patches on one photo, are not independent: whole groups are
    drawn with replacement, as many as there are, and each draw gives the mean of all its values.

    Parameters
    ----------
    values : ``[n]``
        Finite or NaN; NaNs are ignored.
    groups : ``[n]``
        The name or number of each value's group; None for a group each. A single group gives an interval of no width.
    level
        Share of the resampled means inside, between 0 and 1.
    resamples, seed
        How many draws, and the number (not negative) that fixes them.

    Returns
    -------
    tuple of float
        Lower and upper end.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong type, shape or range; infinite values; only NaNs.
    """
    resamples, seed = integer("resamples", resamples, 1), integer("seed", seed, 0)
    if not is_number(level):
        raise InvalidTypeError(f"level must be a number between 0 and 1, got {level!r}")
    if not 0 < level < 1:
        raise InvalidValueError(f"level must lie between 0 and 1, got {level}")
    numbers = array(values)
    if numbers.dtype.kind not in "biuf":
        raise InvalidTypeError(f"values must be numbers, got {numbers.dtype}")
    names = np.arange(numbers.size) if groups is None else array(groups)
    if numbers.ndim != 1 or names.shape != numbers.shape:
        raise InvalidValueError(
            f"values and groups must have shape [n], got {list(numbers.shape)} and {list(names.shape)}"
        )
    if np.isinf(numbers).any():
        raise InvalidValueError("values has infinite values")
    known = ~np.isnan(numbers)
    if not known.any():
        raise InvalidValueError("values has nothing but NaN: there is no mean")
    _, group = np.unique(names[known], return_inverse=True)
    counts, sums = np.bincount(group), np.bincount(group, numbers[known])
    times = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    low, high = np.quantile((times @ sums) / (times @ counts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _curve(
    model: Any, images: Any, maps: Any, targets: Any, steps: Any, baseline: Any, batch_size: Any, *, insert: bool
) -> Tensor:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    images = finite_floats("images", images, "samples, C, H, W")
    samples, _, *size = images.shape
    maps = finite_floats("maps", maps, _MAPS).to(images.device)
    if maps.shape != (samples, *size):
        raise InvalidValueError(f"maps must have shape {[samples, *size]}, as images do, got {list(maps.shape)}")
    pixels = math.prod(size)
    if integer("steps", steps, 1) > pixels:
        raise InvalidValueError(f"steps must be at most the number of pixels, {pixels}, got {steps}")
    batch = images_per_batch(images.device) if batch_size is None else integer("batch_size", batch_size, 1)
    targets = class_indices("targets", targets, samples, images.device)
    before, after = images, _baseline(baseline, images)
    if insert:
        before, after = after, before

    ranks = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view(samples, 1, *size)
    found = []
    with undisturbed(model):
        for job in torch.arange(samples * (steps + 1), device=images.device).split(batch):
            sample, step = job // (steps + 1), job % (steps + 1)
            replaced = ranks[sample] < (step * pixels // steps).view(-1, 1, 1, 1)
            logits = model(torch.where(replaced, after[sample], before[sample]))
            logits = finite_floats("the model's output", logits, _LOGITS)
            found.append(_probabilities(logits, targets[sample]))
    return torch.cat(found).view(samples, steps + 1)


def _baseline(baseline: Any, images: Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        values = finite_floats("baseline", baseline).to(images)
        try:
            return values.expand_as(images)
        except RuntimeError:
            shapes = f"{list(images.shape)}, got {list(values.shape)}"
            raise InvalidValueError(f"baseline cannot be expanded to the images' shape {shapes}") from None
    if not isinstance(baseline, str):
        raise InvalidTypeError(f"baseline must be 'blur', 'zero' or a tensor, got {type(baseline).__name__}")
    if baseline not in ("blur", "zero"):
        raise InvalidValueError(f"baseline must be 'blur', 'zero' or a tensor, got {baseline!r}")
    return torch.zeros_like(images) if baseline == "zero" else _blur(images, _BLUR * min(images.shape[2:]))


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Images under a Gaussian of standard deviation `sigma` in pixels."""
    reach = math.ceil(3 * sigma)
    planes = images.to(torch.promote_types(images.dtype, torch.float32)).flatten(0, 1).unsqueeze(1)
    offsets = torch.arange(-reach, reach + 1, device=planes.device, dtype=planes.dtype)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0).view(1, 1, 1, -1)
    planes = F.pad(planes, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, weights), weights.mT).view_as(images).to(images.dtype)


def _probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    if bool(((targets < 0) | (targets >= logits.shape[1])).any()):
        raise InvalidValueError(f"targets must be classes from 0 to {logits.shape[1] - 1}, got {targets.tolist()}")
    return logits.double().softmax(1).gather(1, targets[:, None])[:, 0]


def _maps_and_masks(maps: Any, masks: Any) -> tuple[Tensor, Tensor]:
    maps = finite_floats("maps", maps, _MAPS).double().contiguous()
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise InvalidTypeError(f"masks must be a boolean tensor, got {kind(masks)}")
    if masks.shape != maps.shape:
        raise InvalidValueError(f"masks must have the shape of maps, {list(maps.shape)}, got {list(masks.shape)}")
    return maps, masks.to(maps.device)
