"""Gradient ascent on a picture's Fourier coefficients: pictures that excite a feature of a network or trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.checks import check_names, finite_floats, integer, number
from spade_fast._util.errors import DeadFeatureError, InvalidTypeError, InvalidValueError
from spade_fast._util.modes import evaluation_mode
from spade_fast._util.progress import Progress, no_progress
from spade_fast.attribution.visualization.diversity import comparing
from spade_fast.attribution.visualization.features import Feature, named_module, reading
from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS
from spade_fast.attribution.visualization.rectifiers import SilentPictures
from spade_fast.pruning.module_kinds import original_module

_CENTRED = 0.05  # largest shift of views for a neuron, which looks at the centre
_PATIENCE = 16  # steps without any gradient, even through rectifiers, after which a feature is given up
_LEAST_RATE = 0.05  # the last learning rate as a share of the first
_OPAQUE = 0.9  # share of the pixels that are not fully drawn
_SOFTNESS = 1 / 25  # width over which transparency is smoothed, as a share of the picture's side


@dataclass(frozen=True)
class Visualization:
    """Pictures that excite a feature.

    Attributes
    ----------
    pictures : Tensor ``[N, C, H, W]``
        Colours between 0 and 1, on the CPU.
    importance : Tensor ``[N, H, W]``
        Mean absolute gradient of the activation during the optimisation: where a picture matters.
    activations : tuple of float
        Mean activation of each picture on its views at the last step; NaN without any step.
    """

    pictures: Tensor
    importance: Tensor
    activations: tuple[float, ...]

    def drawn(self, background: float = 0.5) -> Tensor:
        """Return the pictures ``[N, C, H, W]`` over a grey background, more transparent where they matter less."""
        window = 2 * round(_SOFTNESS * min(self.importance.shape[-2:]) / 2) + 1
        smooth = F.avg_pool2d(self.importance[:, None], window, 1, window // 2, count_include_pad=False)
        full = smooth.flatten(1).quantile(_OPAQUE, dim=1).clamp(min=torch.finfo(smooth.dtype).tiny)
        opacity = (smooth / full.view(-1, 1, 1, 1)).clamp(max=1)
        return opacity * self.pictures + (1 - opacity) * background


@torch.inference_mode(False)
def visualize(
    model: nn.Module,
    feature: Feature | Sequence[Feature],
    *,
    count: int = 1,
    method: str = "maco",
    size: tuple[int, int] = (224, 224),
    view: tuple[int, int] | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    start: Tensor | None = None,
    steps: int = 128,
    views: int = 4,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Visualization:
    """Optimise pictures to maximise the activation of a feature.

    Parameters
    ----------
    model : nn.Module
        A network with one image input ``[N, C, H, W]``. In a ``with trace.applied(model):`` block it is the trace.
    feature : Feature or sequence of Feature
        The activation to maximise; of several, the sum.
    count : int
        Number of pictures. Several differ in what they show: the similarity of their feature maps is penalised.
    method : str
        ``"maco"``: only the phases of a picture's Fourier coefficients are optimised, the magnitudes are those of
        natural images (Fel et al., NeurIPS 2023). ``"fourier"``: all coefficients (Olah et al., Distill 2017).
    size : (int, int)
        Height and width of the pictures in pixels.
    view : (int, int), optional
        Height and width of what the network sees, a random part of a picture; those of the pictures if not given.
    mean, std : sequence of float
        Normalisation of the model's input for colours between 0 and 1, one number for each of its C channels.
    start : Tensor ``[C, H, W]``, optional
        A photo to begin with, colours between 0 and 1, resized to `size`: what would the feature have more of in it?
        With ``"maco"`` the magnitudes are the photo's.
    steps : int
        Number of steps of Adam.
    views : int
        Number of random views of each picture at each step. They cost a forward and a backward pass each.
    learning_rate : float, optional
        Of the first step, from which it falls to a twentieth; the method's own if not given.
    seed : int
        Seed of the initial pictures and of all views; torch's global random state is neither used nor changed.
    progress : callable, optional
        Called as ``progress("visualize", step, steps)``.

    Returns
    -------
    Visualization

    Raises
    ------
    DeadFeatureError
        The weights of the feature are zero, or it never fires (also a ValueError).
    ValueError
        The method, layer or index does not exist, the layer does not return feature maps, tokens or classes, the
        feature has no gradient, the network cannot take images of this size, a setting is out of range, `mean` and
        `std` differ in length, or `start` has a single colour, whose magnitudes with ``"maco"`` are zero.
    TypeError
        An argument has the wrong type; `model` is TorchScript.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import Feature, visualize
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> visualize(model, Feature(5), size=(32, 32), steps=4).pictures.shape
    torch.Size([1, 3, 32, 32])
    """
    model = original_module(model)
    features = _features(feature)
    size, view = _sides("size", size), _sides("view", size if view is None else view)
    mean, std = _normalisation(mean, std)
    _check(count, method, steps, views, learning_rate, seed)
    generator = torch.Generator().manual_seed(seed)
    held = (one for one in chain(model.parameters(), model.buffers()) if one.is_floating_point())
    parameter = next(held, torch.zeros(0))
    if parameter.is_meta:
        raise InvalidValueError("the model is on the meta device and has no values")
    made = PARAMETRIZATIONS[method](count, len(mean), size, generator)
    if start is not None:
        made.begin_with(_resized(start, len(mean), size))
    made.coefficients = made.coefficients.to(parameter.device).requires_grad_()
    rate = made.learning_rate if learning_rate is None else learning_rate
    optimizer = torch.optim.Adam([made.coefficients], rate)
    looks = made.views
    if any(one.neuron for one in features):
        looks = replace(looks, shift=_CENTRED)
    centre, spread = (torch.tensor(list(values), device=parameter.device).view(1, -1, 1, 1) for values in (mean, std))
    contrasted = any(one.contrast for one in features)
    places = {model if one.layer is None else named_module(model, one.layer) for one in features}
    importance = torch.zeros(count, *size, device=parameter.device)
    values = torch.full((count,), math.nan)

    def seen(pictures: Tensor) -> Tensor:
        images = (looks.of(pictures, views, view, generator) - centre) / spread
        return images.to(parameter.dtype).contiguous(memory_format=torch.channels_last)

    with evaluation_mode(model), torch.enable_grad():
        example = seen(made.pictures().detach())[:1]
        alike = nullcontext(None) if count == 1 else comparing(model, example)
        with reading(model, features, example) as activations, alike as similarity:
            silent = SilentPictures(lambda pictures: activations(seen(pictures))[1], places)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate * _falling(step / steps)
                pictures = made.pictures()
                found, alone = activations(seen(pictures))
                values = found.float().view(count, views).mean(1)
                if not bool(values.isfinite().all()):
                    raise InvalidValueError(f"the activation of {_named(features)} is not finite")
                penalty = made.penalty(pictures)
                if similarity is not None:
                    penalty = penalty + similarity(count)
                gradient = None
                if values.requires_grad:
                    (gradient,) = torch.autograd.grad(
                        values.sum(), pictures, retain_graph=contrasted or count > 1, allow_unused=True
                    )
                if gradient is None:
                    raise InvalidValueError(
                        f"the activation of {_named(features)} has no gradient: the network stops it"
                    )
                importance += gradient.abs().mean(1)
                own = gradient
                if contrasted:
                    (own,) = torch.autograd.grad(alone.sum(), pictures, retain_graph=count > 1)
                gradient = silent.roused(pictures, gradient, own)
                loss = (values.detach().abs() * penalty).sum() - (gradient * pictures).sum()
                (made.coefficients.grad,) = torch.autograd.grad(loss, made.coefficients)
                alive = silent.excited if step + 1 == steps else silent.moved
                if step + 1 in (_PATIENCE, steps) and not bool(alive.all()):
                    raise DeadFeatureError(
                        f"{_named(features)} never fires: no view of the picture changes it. It does not depend on the "
                        "image, or more steps, another seed or a photo to start with may excite it"
                    )
                optimizer.step()
                progress("visualize", step + 1, steps)
            if steps and len(features) > 1:
                _check_each(features, activations(seen(pictures))[1], pictures)
    with torch.no_grad():
        return Visualization(made.pictures().cpu(), importance.cpu() / max(steps, 1), tuple(values.tolist()))


def _features(given: Any) -> list[Feature]:
    features = list(given) if isinstance(given, Iterable) else [given]
    if not features or not all(isinstance(one, Feature) for one in features):
        raise InvalidTypeError(f"feature must be a Feature or a sequence of them, got {given!r}")
    return features


def _sides(name: str, given: Any) -> tuple[int, int]:
    if not isinstance(given, tuple | list):
        raise InvalidTypeError(f"{name} must be a height and a width, got {given!r}")
    if len(given) != 2:
        raise InvalidValueError(f"{name} must be a height and a width, got {given!r}")
    return integer(name, given[0], 1), integer(name, given[1], 1)


def _normalisation(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        means, spreads = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"mean and std must be numbers, one per channel, got {mean!r} and {std!r}") from error
    if len(means) != len(spreads) or not means:
        raise InvalidValueError(f"mean and std must have one number per channel, got {len(means)} and {len(spreads)}")
    if not all(map(math.isfinite, means)) or not all(0 < one < math.inf for one in spreads):
        raise InvalidValueError(f"mean must be finite, std positive and finite, got {means} and {spreads}")
    return means, spreads


def _check(count: int, method: str, steps: int, views: int, learning_rate: float | None, seed: int) -> None:
    check_names("method", [method], PARAMETRIZATIONS)
    integer("count", count, 1)
    integer("steps", steps, 0)
    integer("views", views, 1)
    if not 0 <= integer("seed", seed) < 1 << 63:
        raise InvalidValueError(f"seed must lie between 0 and 2**63 - 1, got {seed}")
    if learning_rate is not None and number("learning_rate", learning_rate, 0.0) == 0:
        raise InvalidValueError("learning_rate must be above 0, got 0")


def _resized(start: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    photo = finite_floats("start", start, "channels, height, width").float().cpu()
    if len(photo) != channels:
        raise InvalidValueError(f"start must have {channels} channels, got {list(photo.shape)}")
    if float(photo.min()) < 0 or float(photo.max()) > 1:
        raise InvalidValueError("start must have colours between 0 and 1")
    if photo.shape[1:] == size:
        return photo
    return F.interpolate(photo[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def _falling(done: float) -> float:
    """Return the learning rate as a share of the first, after a share of the steps."""
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _check_each(features: Sequence[Feature], activations: Tensor, pictures: Tensor) -> None:
    """Raise DeadFeatureError that names the features whose activations ``[F, N]`` no picture changes."""
    for feature, own in zip(features, activations, strict=True):
        gradient = None
        if own.requires_grad:
            (gradient,) = torch.autograd.grad(own.sum(), pictures, retain_graph=True, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            raise DeadFeatureError(f"{feature} does not fire beside the others: draw it alone, or with more steps")


def _named(features: Sequence[Feature]) -> str:
    return " + ".join(map(str, features))
