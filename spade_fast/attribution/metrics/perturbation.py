"""What a network predicts while the pixels that a map ranks highest are removed or inserted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.checks import class_indices, finite_floats, integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast.attribution.metrics.decisions import LOGITS, class_probabilities
from spade_fast.attribution.metrics.function_targets import kept_by_network, targets_of_each
from spade_fast.pruning.calibration import images_per_batch
from spade_fast.targets.network_outputs import logits_of
from spade_fast.targets.target import TargetLike

_BLUR = 1 / 20  # standard deviation of the blurred baseline, as a share of the shorter side
_MAPS = "samples, height, width"


def deletion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetLike | Sequence[TargetLike] | Tensor,
    *,
    steps: int = 50,
    patch: int = 1,
    baseline: str | Tensor = "blur",
    batch_size: int | None = None,
) -> Tensor:
    """Compute a class's probability while the most important pixels are removed (RISE, arXiv 1806.07421).

    After step k, the ``k * H * W // steps`` pixels with the largest values are replaced by the baseline in all
    channels. Equal values are ordered by position, row by row from the top; this order is arbitrary and matters for
    maps with large constant areas. The lower the curve, the better the map.

    A vision transformer sees patches, and scattered pixels that change in many of them at once are unlike any image it
    knows. With `patch`, whole squares are replaced, ordered by the sums of their pixels' values.

    Parameters
    ----------
    model : nn.Module
        The network: images ``[N, C, H, W]`` to logits ``[N, classes]``, or to what the targets read. It runs without
        gradients in evaluation mode; its modes and buffers are restored afterwards.
    images : Tensor ``[S, C, H, W]``
        As the model takes them, on its device.
    maps : Tensor ``[S, H, W]``
        Floating-point and finite.
    targets : int, callable, sequence or Tensor ``[S]``
        Index of the class, or a function of the network's output that returns one number per sample, such as those of
        :mod:`spade_fast.targets`: one for all samples, or one per sample. The curve of a function is that of what
        automatic sparsity would keep of it, such as a probability.
    steps : int
        From 1 to the number of patches, which are pixels by default.
    patch : int
        Side of the squares whose pixels are replaced together, such as the side of the network's own patches. It
        divides the height and the width of the images.
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
        Softmax probabilities, or what is kept of target functions, from the image to the baseline.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or shape or is out of range; images, maps, baseline, logits or numbers of targets
        are NaN or infinite; a target does not return one number per sample.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import metrics
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    >>> curve = metrics.deletion_curve(model, torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4), [0, 3], steps=8)
    >>> curve.shape
    torch.Size([2, 9])
    """
    return _curve(model, images, maps, targets, steps, patch, baseline, batch_size, insert=False)


def insertion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: TargetLike | Sequence[TargetLike] | Tensor,
    *,
    steps: int = 50,
    patch: int = 1,
    baseline: str | Tensor = "blur",
    batch_size: int | None = None,
) -> Tensor:
    """Compute a class's probability while the most important pixels are inserted (RISE, arXiv 1806.07421).

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
    return _curve(model, images, maps, targets, steps, patch, baseline, batch_size, insert=True)


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


def _curve(
    model: Any,
    images: Any,
    maps: Any,
    targets: Any,
    steps: Any,
    patch: Any,
    baseline: Any,
    batch_size: Any,
    *,
    insert: bool,
) -> Tensor:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    images = finite_floats("images", images, "samples, C, H, W")
    samples, _, *size = images.shape
    maps = finite_floats("maps", maps, _MAPS).to(images.device)
    if maps.shape != (samples, *size):
        raise InvalidValueError(f"maps must have shape {[samples, *size]} to match images, got {list(maps.shape)}")
    if any(side % integer("patch", patch, 1) for side in size):
        raise InvalidValueError(f"patch must divide the height and the width of the images, {size}, got {patch}")
    grid = [side // patch for side in size]
    patches = math.prod(grid)
    if integer("steps", steps, 1) > patches:
        kind = "pixels" if patch == 1 else f"patches of {patch} x {patch} pixels"
        raise InvalidValueError(f"steps must be at most the number of {kind}, {patches}, got {steps}")
    batch = images_per_batch(images.device) if batch_size is None else integer("batch_size", batch_size, 1)
    functions = targets_of_each(targets, samples, model)
    classes = None if functions else class_indices("targets", targets, samples, images.device)
    before, after = images, _baseline(baseline, images)
    if insert:
        before, after = after, before

    if patch > 1:
        maps = maps.double().view(samples, grid[0], patch, grid[1], patch).sum((2, 4))
    ranks = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view(samples, 1, *grid)
    ranks = ranks.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    found = []
    with undisturbed(model):
        for job in torch.arange(samples * (steps + 1), device=images.device).split(batch):
            sample, step = job // (steps + 1), job % (steps + 1)
            replaced = ranks[sample] < (step * patches // steps).view(-1, 1, 1, 1)
            shown = torch.where(replaced, after[sample], before[sample])
            if classes is None:
                found.append(kept_by_network(model, shown, [functions[index] for index in sample.tolist()]))
            else:
                output = model(shown)
                logits = logits_of(output)
                logits = finite_floats("the model's output", output if logits is None else logits, LOGITS)
                found.append(class_probabilities(logits, classes[sample]))
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
