"""Explanation methods by name, each giving one map of importance for a picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.stages import stage

_IG_STEPS, _IG_BATCH = 32, 16


@dataclass(frozen=True)
class Question:
    """What is to be explained.

    Attributes
    ----------
    model
        A network prepared by `prepare_for_attribution`.
    image
        Its input ``[1, C, H, W]``.
    target
        Index of the class.
    black
        Input ``[1, C, 1, 1]`` of a black pixel: where integrated gradients start.
    layer
        The module whose maps Grad-CAM looks at.
    """

    model: nn.Module
    image: Tensor
    target: int
    black: Tensor
    layer: nn.Module


@dataclass(frozen=True)
class Method:
    """A method's title and the function that makes its map ``[H, W]``: strength of evidence, never negative."""

    title: str
    run: Callable[[Question], Tensor]


def _saliency(question: Question) -> Tensor:
    from captum.attr import Saliency

    return _strength(Saliency(question.model).attribute(question.image, target=question.target))


def _input_x_gradient(question: Question) -> Tensor:
    from captum.attr import InputXGradient

    return _strength(InputXGradient(question.model).attribute(question.image, target=question.target))


def _integrated_gradients(question: Question) -> Tensor:
    from captum.attr import IntegratedGradients

    attributions = IntegratedGradients(question.model).attribute(
        question.image,
        question.black.expand_as(question.image),
        target=question.target,
        n_steps=_IG_STEPS,
        internal_batch_size=_IG_BATCH,
    )
    return _strength(attributions)


def _gradcam(question: Question) -> Tensor:
    from captum.attr import LayerGradCam

    cam = LayerGradCam(question.model, question.layer).attribute(
        question.image, target=question.target, relu_attributions=True
    )
    large = F.interpolate(cam.detach(), question.image.shape[-2:], mode="bicubic", align_corners=False)
    return large[0, 0].clamp(min=0)


def _guided_gradcam(question: Question) -> Tensor:
    from captum.attr import GuidedGradCam

    method = GuidedGradCam(question.model, question.layer)
    return _strength(method.attribute(question.image, target=question.target, interpolate_mode="bilinear"))


def _guided_backprop(question: Question) -> Tensor:
    from captum.attr import GuidedBackprop

    return _strength(GuidedBackprop(question.model).attribute(question.image, target=question.target))


METHODS = {
    "saliency": Method("Saliency", _saliency),
    "input-x-gradient": Method("Input x gradient", _input_x_gradient),
    "integrated-gradients": Method("Integrated gradients", _integrated_gradients),
    "guided-backprop": Method("Guided backprop", _guided_backprop),
    "gradcam": Method("Grad-CAM", _gradcam),
    "guided-gradcam": Method("Guided Grad-CAM", _guided_gradcam),
}


def attribution_map(name: str, question: Question) -> Tensor:
    """Run a method.

    Parameters
    ----------
    name
        A key of `METHODS`.

    Returns
    -------
    Tensor ``[H, W]``
    """
    with stage("attribute"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting (backward|forward).*hooks")
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require gradients")
        return METHODS[name].run(question).detach().cpu()


def last_feature_layer(model: nn.Module, image: Tensor) -> nn.Module:
    """Return the last module in the forward pass whose output still is a map: the layer Grad-CAM looks at.

    Raises
    ------
    ValueError
        The network has no such module.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[-2:]) > 1:
            found.append(module)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer whose output is a map: Grad-CAM cannot be used on it")
    return found[-1]


def _strength(attributions: Tensor) -> Tensor:
    return attributions.abs().sum(1)[0]
