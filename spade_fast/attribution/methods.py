"""Attribution methods by name: the Captum method and arguments of each for one image, and the resulting map.

``docs/methods.md`` lists which methods work on which networks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast._util.ranges import stage
from spade_fast.attribution.function_kinds import RECTIFIER, STAND_INS
from spade_fast.attribution.maps import to_map
from spade_fast.attribution.prepare import rehearse
from spade_fast.attribution.smoothgrad import SmoothGrad, smooth_magnitudes
from spade_fast.pruning.calibration import images_per_batch
from spade_fast.targets.class_names import class_names_of
from spade_fast.targets.classification import checked_target
from spade_fast.targets.target import TargetLike

if TYPE_CHECKING:
    from captum.attr import Attribution

_IG_STEPS = 32
_SHAP_SAMPLES, _SHAP_NOISE = 16, 0.1
_LIME_SAMPLES, _LIME_SQUARES = 500, 8
_OCCLUSION_PATCHES = 7  # patches per side; the stride is half a patch
_BATCH = 16
_SEED = 0


@dataclass(frozen=True)
class Question:
    """The prediction to explain.

    Attributes
    ----------
    model : nn.Module
        A network prepared by `prepare_for_attribution`.
    image : Tensor ``[1, C, H, W]``
        Its input.
    target : int, str or callable
        Index of the class to explain, its name if the model has a Hugging Face configuration with names, or a function
        of the network's output that returns one number per sample, such as those of :mod:`spade_fast.targets`.
    black : Tensor ``[1, C, 1, 1]``
        The network's input for a black pixel: the baseline of all methods that need one.

    Raises
    ------
    TypeError, ValueError
        `target` is none of these.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.attribution import Question
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    >>> question = Question(model, torch.rand(1, 3, 4, 4), 2, torch.zeros(1, 3, 1, 1))
    """

    model: nn.Module
    image: Tensor
    target: TargetLike
    black: Tensor

    def __post_init__(self) -> None:
        """Check the target."""
        object.__setattr__(self, "target", checked_target(self.target, class_names_of(self.model)))

    @property
    def black_image(self) -> Tensor:
        return self.black.expand_as(self.image)


@dataclass(frozen=True)
class Recipe:
    """A Captum method on a network, and its arguments for one image.

    ``Spade(recipe.attribution, ...).attribute(image, **recipe.arguments)`` runs it on a trace, and
    ``recipe.attribution.attribute(image, **recipe.arguments)`` on the dense network if the target is a class; a target
    function needs `spade_fast.targets.answering` there.
    """

    attribution: Attribution
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes
    ----------
    title
        Its name in pictures and reports.
    build
        Makes its recipe, or raises ValueError if the network rules it out.
    smooth
        Whether its attributions are gradients at the pixels, which SmoothGrad smooths; other methods ignore it.
    """

    title: str
    build: Callable[[Question], Recipe]
    smooth: bool


def _saliency(question: Question) -> Recipe:
    """Simonyan, Vedaldi, Zisserman, Deep Inside Convolutional Networks, ICLR workshop 2014."""
    from captum.attr import Saliency

    return Recipe(Saliency(question.model), {"target": question.target})


def _input_x_gradient(question: Question) -> Recipe:
    """Shrikumar et al., Not Just a Black Box, arXiv 1605.01713, 2016."""
    from captum.attr import InputXGradient

    return Recipe(InputXGradient(question.model), {"target": question.target})


def _integrated_gradients(question: Question) -> Recipe:
    """Sundararajan, Taly, Yan, Axiomatic Attribution for Deep Networks, ICML 2017."""
    from captum.attr import IntegratedGradients

    arguments = {
        "baselines": question.black_image,
        "target": question.target,
        "n_steps": _IG_STEPS,
        "internal_batch_size": _BATCH,
    }
    return Recipe(IntegratedGradients(question.model), arguments)


def _gradient_shap(question: Question) -> Recipe:
    """Lundberg, Lee, A Unified Approach to Interpreting Model Predictions, NeurIPS 2017."""
    from captum.attr import GradientShap

    arguments = {
        "baselines": question.black_image,
        "target": question.target,
        "n_samples": _SHAP_SAMPLES,
        "stdevs": _SHAP_NOISE,
    }
    return Recipe(GradientShap(question.model), arguments)


def _deep_lift(question: Question) -> Recipe:
    """Shrikumar, Greenside, Kundaje, Learning Important Features Through Propagating Activation Differences, 2017."""
    from captum.attr import DeepLift

    _, unknown = rehearse(question.model, (question.image,), STAND_INS)
    if unknown:
        raise InvalidValueError(f"DeepLIFT has no rule for {', '.join(sorted(unknown))}")
    return Recipe(DeepLift(question.model), {"baselines": question.black_image, "target": question.target})


def _lrp(question: Question) -> Recipe:
    """Bach et al., On Pixel-Wise Explanations ... by Layer-Wise Relevance Propagation, PLOS ONE 2015."""
    from spade_fast.attribution.lrp import LRP

    lrp = LRP(question.model)
    lrp.check(question.image)
    return Recipe(lrp, {"target": question.target})


def _guided_backprop(question: Question) -> Recipe:
    """Springenberg et al., Striving for Simplicity: The All Convolutional Net, ICLR workshop 2015."""
    from captum.attr import GuidedBackprop

    _need_relu(question)
    return Recipe(GuidedBackprop(question.model), {"target": question.target})


def _gradcam(question: Question) -> Recipe:
    """Selvaraju et al., Grad-CAM, ICCV 2017."""
    from spade_fast.attribution.cam import GradCam, last_feature_layer

    layer = last_feature_layer(question.model, question.image, question.target)
    return Recipe(GradCam(question.model, layer), {"target": question.target, "relu_attributions": True})


def _guided_gradcam(question: Question) -> Recipe:
    """Selvaraju et al., Grad-CAM, ICCV 2017."""
    from captum.attr import GuidedGradCam

    from spade_fast.attribution.cam import GradCam, last_feature_layer

    layer = last_feature_layer(question.model, question.image, question.target)
    _need_relu(question)
    guided = GuidedGradCam(question.model, layer)
    guided.grad_cam = GradCam(question.model, layer)
    return Recipe(guided, {"target": question.target, "interpolate_mode": "bilinear"})


def _layercam(question: Question) -> Recipe:
    """Jiang et al., LayerCAM, IEEE TIP 2021."""
    from spade_fast.attribution.cam import LayerCam, last_feature_layer

    layer = last_feature_layer(question.model, question.image, question.target)
    return Recipe(LayerCam(question.model, layer), {"target": question.target})


def _lime(question: Question) -> Recipe:
    """Ribeiro, Singh, Guestrin, "Why Should I Trust You?", KDD 2016."""
    from captum.attr import Lime

    from spade_fast.attribution.lime import Ridge, nearness, squares

    arguments = {
        "baselines": question.black_image,
        "target": question.target,
        "feature_mask": squares(question.image, _LIME_SQUARES),
        "n_samples": _LIME_SAMPLES,
        "perturbations_per_eval": _BATCH,
    }
    return Recipe(Lime(question.model, Ridge(), nearness), arguments)


def _occlusion(question: Question) -> Recipe:
    """Zeiler, Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014."""
    from captum.attr import Occlusion

    channels, height, width = question.image.shape[1:]
    window = [max(1, size // _OCCLUSION_PATCHES) for size in (height, width)]
    arguments = {
        "sliding_window_shapes": (channels, *window),
        "strides": (channels, *(max(1, side // 2) for side in window)),
        "baselines": question.black_image,
        "target": question.target,
        "perturbations_per_eval": _BATCH,
    }
    return Recipe(Occlusion(question.model), arguments)


METHODS = {
    "saliency": Method("Saliency", _saliency, smooth=True),
    "input-x-gradient": Method("Input x gradient", _input_x_gradient, smooth=True),
    "integrated-gradients": Method("Integrated gradients", _integrated_gradients, smooth=True),
    "gradient-shap": Method("GradientSHAP", _gradient_shap, smooth=True),
    "deeplift": Method("DeepLIFT", _deep_lift, smooth=True),
    "lrp": Method("LRP", _lrp, smooth=False),
    "guided-backprop": Method("Guided backprop", _guided_backprop, smooth=True),
    "gradcam": Method("Grad-CAM", _gradcam, smooth=False),
    "guided-gradcam": Method("Guided Grad-CAM", _guided_gradcam, smooth=True),
    "layercam": Method("LayerCAM", _layercam, smooth=False),
    "lime": Method("LIME", _lime, smooth=False),
    "occlusion": Method("Occlusion", _occlusion, smooth=False),
}


def make_recipe(name: str, question: Question) -> Recipe:
    """Set up a method for one image.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    question : Question
        Network, image and class.

    Returns
    -------
    Recipe

    Raises
    ------
    ValueError
        The method cannot be used on this network; the message gives the reason.
    """
    method = METHODS[name]
    try:
        with extra_for("attribution methods need"):
            return method.build(question)
    except ValueError as error:
        raise InvalidValueError(f"{method.title} cannot be used on {type(question.model).__name__}: {error}") from error


def unusable_methods(names: Iterable[str], question: Question) -> dict[str, str]:
    """Return why methods cannot be used on a network, by name; those that can be used are left out."""
    reasons = {}
    for name in names:
        try:
            make_recipe(name, question)
        except InvalidValueError as error:
            reasons[name] = str(error)
    return reasons


def attribution_map(name: str, question: Question, smooth: SmoothGrad | None = None) -> Tensor:
    """Run a method on the network with its current weights; random numbers are seeded, so that runs are repeatable.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    question : Question
        Network, image and class.
    smooth : SmoothGrad, optional
        Take the mean of the maps of noisy copies of the image, if ``METHODS[name].smooth``; other methods give their
        plain map.

    Returns
    -------
    Tensor ``[H, W]``
        Non-negative attribution map, on the CPU.

    Raises
    ------
    TypeError, ValueError
        As in `make_recipe`; `smooth` is something else, or its noise is too large for the image's dtype.
    """
    if not isinstance(smooth, SmoothGrad | None):
        raise InvalidTypeError(f"smooth must be a SmoothGrad or None, got {smooth!r}")
    with extra_for("attribution methods need"):
        from spade_fast.attribution.asking import asking
    with stage("attribute"), _quiet(), seeded(question.image.device):
        recipe = make_recipe(name, question)
        with asking(recipe.attribution, question.model, recipe.arguments) as arguments:
            attribute = partial(recipe.attribution.attribute, **arguments)
            if smooth is None or not METHODS[name].smooth:
                attributions = attribute(question.image)
            else:
                # Each copy is several images already in GradientSHAP.
                batch_size = 1 if name == "gradient-shap" else min(_BATCH, images_per_batch(question.image.device))
                attributions = smooth_magnitudes(attribute, question.image, smooth, batch_size)
        return to_map(attributions, question.image).cpu()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting (backward|forward).*hooks")
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require gradients")
        yield


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Seed torch and NumPy (which Captum's GradientShap uses) during a ``with`` block, then restore their states."""
    state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        np.random.seed(_SEED)
        try:
            yield
        finally:
            np.random.set_state(state)


def _need_relu(question: Question) -> None:
    met, _ = rehearse(question.model, (question.image,), [RECTIFIER])
    if not met:
        raise InvalidValueError("it calls no ReLU, whose gradient the method modifies")
