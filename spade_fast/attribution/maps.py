"""One map of importance for a picture, by any of the methods, the same in every run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.ranges import stage
from spade_fast.attribution.methods import Question, make_recipe

_SEED = 0


def attribution_map(name: str, question: Question) -> Tensor:
    """Run a method on the network as it is; a second run gives the same map.

    Parameters
    ----------
    name
        A key of `METHODS`.

    Returns
    -------
    Tensor ``[H, W]``
        Strength of evidence, never negative.

    Raises
    ------
    ValueError
        As in `make_recipe`.
    """
    with stage("attribute"), _quiet(), seeded(question.image.device):
        recipe = make_recipe(name, question)
        return to_map(recipe.attribution.attribute(question.image, **recipe.arguments), question.image).cpu()


def to_map(attributions: Tensor, image: Tensor) -> Tensor:
    """Make one map ``[H, W]`` of attributions: absolute values, summed over channels, enlarged to the picture."""
    strength = attributions.detach().abs().sum(1, keepdim=True)
    if strength.shape[-2:] != image.shape[-2:]:
        strength = F.interpolate(strength, image.shape[-2:], mode="bicubic", align_corners=False).clamp(min=0)
    return strength[0, 0]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting (backward|forward).*hooks")
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require gradients")
        yield


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Fix the seeds of torch and of numpy, from which Captum's GradientShap draws, inside; both are put back."""
    state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        np.random.seed(_SEED)
        try:
            yield
        finally:
            np.random.set_state(state)
