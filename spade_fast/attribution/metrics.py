"""Metrics of attribution maps (localisation, deletion, insertion) and of pruned outputs, with confidence intervals.

Attribution maps ``[S, H, W]``, one per sample, are larger where a pixel matters more. Scores ``[S]`` are float64 on the
device of the maps, one per sample, and NaN where the score of a sample is undefined.
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
    """Compute the area under the ROC curve of a map as a classifier of a mask's pixels (SPADE, arXiv 2310.04519).

    It is the probability that a random pixel inside the mask has a larger value than a random pixel outside, where
    equal values count half: 1 is perfect; 0.5 is chance, and also the score of a constant map.

    Parameters
    ----------
    maps : Tensor ``[S, H, W]``
        Floating-point and finite.
    masks : Tensor ``[S, H, W]``, bool
        True where the evidence is known to be, such as on a trojan patch.

    Returns
    -------
    Tensor ``[S]``
        NaN where a mask is empty or full.

    Raises
    ------
    TypeError, ValueError
        A tensor has the wrong type or shape, or the maps have NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.localisation_auc(torch.tensor([[[0.9, 0.3, 0.8]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, masks = (tensor.flatten(1) for tensor in _maps_and_masks(maps, masks))
    rising = maps.sort(1).values
    twice_the_ranks = torch.searchsorted(rising, maps) + torch.searchsorted(rising, maps, right=True) + 1
    inside = masks.sum(1)
    wins = (twice_the_ranks * masks).sum(1).double() / 2 - (inside * (inside + 1)).double() / 2
    return wins / (inside * (masks.shape[1] - inside))


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0) -> Tensor:
    """Determine whether the maximum of a map lies in the mask (Zhang et al., ECCV 2016, arXiv 1608.00507).

    Parameters
    ----------
    maps, masks
        As in `localisation_auc`.
    tolerance : float
        Largest distance of a maximum from the mask that still counts as a hit, in pixels (Euclidean, between centres).
        Zhang et al. use 15.

    Returns
    -------
    Tensor ``[S]``
        1 for a hit and 0 for a miss; if several pixels share the maximum, the share of them that hit. NaN where a mask
        is empty.

    Raises
    ------
    TypeError, ValueError
        As in `localisation_auc`; or the tolerance is not a number, or is negative or infinite.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.pointing_game(torch.tensor([[[0.9, 0.3, 0.8]]]), torch.tensor([[[True, True, False]]]))
    tensor([1.], dtype=torch.float64)
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
    """Compute the share of a map's sum that lies inside the mask: the energy-based pointing game.

    After Wang et al. (Score-CAM, CVPR workshops 2020, arXiv 1910.01279). If the mask is the grid cell of the explained
    class, it is the score of the grid pointing game (Böhle, Fritz, Schiele, CVPR 2021, arXiv 2104.00032).

    Parameters
    ----------
    maps, masks
        As in `localisation_auc`; maps must not have negative values.

    Returns
    -------
    Tensor ``[S]``
        0 where a mask is empty, NaN where a map is zero everywhere.

    Raises
    ------
    TypeError, ValueError
        As in `localisation_auc`; or a map has negative values.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.energy_inside(torch.tensor([[[3.0, 1.0, 4.0]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, masks = _maps_and_masks(maps, masks)
    if bool((maps < 0).any()):
        raise InvalidValueError(
            "maps has negative values, for which the energy is undefined: use maps.clamp(min=0) or maps.abs()"
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
    """Compute the target's probability while the most important pixels are removed (RISE, arXiv 1806.07421).

    After step k, the ``k * H * W // steps`` pixels with the largest values are replaced by the baseline in all
    channels. Equal values are ordered by position, row by row from the top; this order is arbitrary and matters for
    maps with large constant areas. The lower the curve, the better the map.

    Parameters
    ----------
    model : nn.Module
        The network: images ``[N, C, H, W]`` to logits ``[N, classes]``. It runs without gradients in evaluation mode;
        its modes and buffers are restored afterwards.
    images : Tensor ``[S, C, H, W]``
        As the model takes them, on its device.
    maps : Tensor ``[S, H, W]``
        Floating-point and finite.
    targets : int, sequence of int or Tensor ``[S]``
        Index of the class: one for all samples, or one per sample.
    steps : int
        From 1 to the number of pixels.
    baseline : "blur", "zero" or Tensor
        Replacement of removed pixels. ``"blur"``: the image blurred by a Gaussian with a standard deviation of 1/20 of
        its shorter side (11.2 of 224 pixels), truncated at three standard deviations, with replicated borders.
        ``"zero"``: zeros in the model's input, which is the mean colour if images are normalised. A tensor is expanded
        to the shape of the images.
    batch_size : int, optional
        Images per forward pass, over samples and steps; None for 8 on a CPU and 64 elsewhere. It affects only memory
        and speed.

    Returns
    -------
    Tensor ``[S, steps + 1]``, float64
        Softmax probabilities, from the image to the baseline.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape or is out of range; images, maps, baseline or logits have NaN or
        infinite values.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    >>> curve = metrics.deletion_curve(model, torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4), [0, 3], steps=8)
    >>> curve.shape
    torch.Size([2, 9])
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
    """Compute the target's probability while the most important pixels are inserted (RISE, arXiv 1806.07421).

    The same as `deletion_curve`, but from the baseline to the image: the higher the curve, the better the map.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    >>> curve = metrics.insertion_curve(model, torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4), 1, steps=8, baseline="zero")
    >>> metrics.auc(curve).shape
    torch.Size([2])
    """
    return _curve(model, images, maps, targets, steps, baseline, batch_size, insert=True)


def auc(curve: Tensor) -> Tensor:
    """Compute the mean height of curves by the trapezoidal rule.

    Parameters
    ----------
    curve : Tensor ``[S, points]``
        Values at evenly spaced points, as from `deletion_curve`.

    Returns
    -------
    Tensor ``[S]``, float64

    Raises
    ------
    TypeError, ValueError
        `curve` is not a floating-point tensor of that shape, has fewer than two points, or has NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.auc(torch.tensor([[1.0, 0.5, 0.0]]))
    tensor([0.5000], dtype=torch.float64)
    """
    curve = finite_floats("curve", curve, "samples, points")
    if curve.shape[1] < 2:
        raise InvalidValueError("curve must have at least two points, got one")
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


@dataclass(frozen=True)
class Agreement:
    """Agreement of the outputs of a pruned network with those of the dense network.

    Attributes
    ----------
    same_top : Tensor ``[S]``, float64
        1 where both have the same top class, otherwise 0.
    probability_difference : Tensor ``[S]``, float64
        Absolute difference of the target's softmax probabilities.
    logit_distance : Tensor ``[S]``, float64
        ``‖dense - pruned‖ / ‖dense‖``, Euclidean; NaN where the dense logits are all zero.
    """

    same_top: Tensor
    probability_difference: Tensor
    logit_distance: Tensor


def agreement(dense: Tensor, pruned: Tensor, targets: int | Sequence[int] | Tensor | None = None) -> Agreement:
    """Compare the outputs of a pruned network with those of the dense network on the same samples.

    Parameters
    ----------
    dense, pruned : Tensor ``[S, classes]``
        Finite logits.
    targets : int, sequence of int, Tensor ``[S]`` or None
        Index of the class: one for all samples, or one per sample; None for the dense network's top class.

    Returns
    -------
    Agreement
        If several classes tie, the first of them is the top class.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape or is out of range, or logits are NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> metrics.agreement(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])).same_top
    tensor([1.], dtype=torch.float64)
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
    """Compute the percentile bootstrap interval of a mean (Efron, Tibshirani, An Introduction to the Bootstrap, 1993).

    Values that share a source, such as the scores of several patches on one photo, are not independent. Whole groups
    are therefore resampled with replacement, and each resample gives the mean of all its values.

    Parameters
    ----------
    values : Tensor, ndarray or sequence ``[N]``
        Finite or NaN; NaNs are ignored.
    groups : Tensor, ndarray or sequence ``[N]``, optional
        Name or number of each value's group; None if each value is its own group. With a single group the interval has
        zero width.
    level : float
        Share of the resampled means inside the interval, between 0 and 1.
    resamples : int
        Number of resamples.
    seed : int
        Seed of the resampling, at least 0.

    Returns
    -------
    tuple of float
        Lower and upper end of the interval.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape or is out of range; values are infinite, or all are NaN.

    Examples
    --------
    >>> from spade_fast.attribution import metrics
    >>> low, high = metrics.bootstrap_interval([0.7, 0.8, 0.9, 0.6], groups=["a", "a", "b", "c"])
    >>> low <= 0.75 <= high
    True
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
        raise InvalidValueError("values has nothing but NaN: their mean is undefined")
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
        raise InvalidValueError(f"maps must have shape {[samples, *size]} to match images, got {list(maps.shape)}")
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
            raise InvalidValueError(f"baseline cannot be expanded to the shape of images, {shapes}") from None
    if not isinstance(baseline, str):
        raise InvalidTypeError(f"baseline must be 'blur', 'zero' or a tensor, got {type(baseline).__name__}")
    if baseline not in ("blur", "zero"):
        raise InvalidValueError(f"baseline must be 'blur', 'zero' or a tensor, got {baseline!r}")
    return torch.zeros_like(images) if baseline == "zero" else _blur(images, _BLUR * min(images.shape[2:]))


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images by a Gaussian with standard deviation `sigma` in pixels."""
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
