"""Gradient ascent on a picture's Fourier coefficients: pictures that excite a feature of a network or trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.checks import normalisation
from spade_fast._util.errors import DeadFeatureError, InvalidValueError
from spade_fast._util.modes import evaluation_mode
from spade_fast._util.module_names import named_module
from spade_fast._util.progress import Progress, no_progress
from spade_fast.attribution.visualization.arguments import (
    check_settings,
    features_of,
    photo_of_size,
    sides,
)
from spade_fast.attribution.visualization.diversity import comparing
from spade_fast.attribution.visualization.features import Feature, reading
from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS
from spade_fast.attribution.visualization.rectifiers import SilentPictures
from spade_fast.pruning.module_kinds import original_module
from spade_fast.targets.target import Read, Target

_CENTRED = 0.05  # largest shift of views for a neuron, which looks at the centre
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
        Mean absolute gradient of the activation during the optimisation: where a picture matters. The border, which
        random views show less often than the centre, has less.
    activations : tuple of float
        Mean activation of each picture on the views of the last step, before its last change; NaN without any step.
    """

    pictures: Tensor = field(repr=False)
    importance: Tensor = field(repr=False)
    activations: tuple[float, ...]

    def drawn(self, background: float = 0.5) -> Tensor:
        """Return the pictures ``[N, C, H, W]`` over a grey background, more transparent where they matter less.

        A picture without importance, as before the first step, is not transparent.
        """
        window = 2 * round(_SOFTNESS * min(self.importance.shape[-2:]) / 2) + 1
        smooth = F.avg_pool2d(self.importance[:, None], window, 1, window // 2, count_include_pad=False)
        full = smooth.flatten(1).quantile(_OPAQUE, dim=1).view(-1, 1, 1, 1)
        opacity = torch.where(full > 0, (smooth / full).clamp(max=1), 1)
        return opacity * self.pictures + (1 - opacity) * background


@torch.inference_mode(False)
def visualize(
    model: nn.Module,
    feature: Feature | Read | Sequence[Feature | Read],
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
    feature : Feature, callable or sequence
        The activation to maximise, or a function of the model's output that returns one number per image, such as those
        of :mod:`spade_fast.targets`; of several, the sum.
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
        Of the first step, from which it falls to a twentieth; by default the method's own, with ``"maco"`` a lower one
        if there is a photo to begin with, which stays recognisable.
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
    features = features_of(feature)
    size, view = sides("size", size), sides("view", size if view is None else view)
    mean, std = normalisation(mean, std)
    check_settings(count, method, steps, views, learning_rate, seed)
    generator = torch.Generator().manual_seed(seed)
    held = (one for one in chain(model.parameters(), model.buffers()) if one.is_floating_point())
    parameter = next(held, torch.zeros(0))
    if parameter.is_meta:
        raise InvalidValueError("the model is on the meta device and has no values")
    made = PARAMETRIZATIONS[method](count, len(mean), size, generator)
    if start is not None:
        made.begin_with(photo_of_size(start, len(mean), size))
    made.coefficients = made.coefficients.to(parameter.device).requires_grad_()
    rate = made.learning_rate if learning_rate is None else learning_rate
    optimizer = torch.optim.Adam([made.coefficients], rate)
    looks = made.views
    activations_of = [one for one in features if isinstance(one, Feature)]
    if any(one.neuron for one in activations_of):
        looks = replace(looks, shift=_CENTRED)
    centre, spread = (torch.tensor(list(values), device=parameter.device).view(1, -1, 1, 1) for values in (mean, std))
    contrasted = any(one.contrast for one in activations_of)
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
                gradient = _gradient(values, pictures)
                if gradient is None:
                    raise InvalidValueError(
                        f"the activation of {_named(features)} has no gradient: the network stops it"
                    )
                importance += gradient.abs().mean(1)
                own = gradient
                if contrasted:
                    (own,) = torch.autograd.grad(alone.sum(), pictures, retain_graph=True)
                gradient = silent.roused(pictures, gradient, own)
                loss = (values.detach().abs() * penalty).sum() - (gradient * pictures).sum()
                (made.coefficients.grad,) = torch.autograd.grad(loss, made.coefficients)
                silent.check(step + 1, steps, _named(features))
                optimizer.step()
                progress("visualize", step + 1, steps)
            if steps and len(features) > 1:
                _check_each(features, activations(seen(pictures))[1], pictures)
    with torch.no_grad():
        return Visualization(made.pictures().cpu(), importance.cpu() / max(steps, 1), tuple(values.tolist()))


def _falling(done: float) -> float:
    """Return the learning rate as a share of the first, after a share of the steps."""
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _check_each(features: Sequence[Feature | Target], activations: Tensor, pictures: Tensor) -> None:
    """Raise DeadFeatureError that names the features whose activations ``[F, N]`` no picture changes."""
    for feature, own in zip(features, activations, strict=True):
        gradient = _gradient(own, pictures)
        if gradient is None or not bool(gradient.any()):
            raise DeadFeatureError(f"{feature} does not fire beside the others: draw it alone, or with more steps")


def _gradient(values: Tensor, pictures: Tensor) -> Tensor | None:
    """Return the gradient of a sum with respect to pictures, or None without one; the graph stays."""
    if not values.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(values.sum(), pictures, retain_graph=True, allow_unused=True)
    return gradient


def _named(features: Sequence[Feature | Target]) -> str:
    return " + ".join(map(str, features))
