"""SmoothGrad as its paper has it: the map of the mean signed attribution, which the package does not offer."""

from __future__ import annotations

from torch import Tensor

from spade_fast._util.draws import add_noise, noise_deviation
from spade_fast.attribution.maps import to_map
from spade_fast.attribution.methods import Question, make_recipe
from spade_fast.attribution.smoothgrad import SmoothGrad

_BATCH = 8


def signed_smoothgrad(method: str, question: Question, smooth: SmoothGrad) -> Tensor:
    """Return the map ``[H, W]`` of the mean attribution of the noisy copies that the package's SmoothGrad makes."""
    recipe = make_recipe(method, question)
    signed = {"abs": False} if method == "saliency" else {}  # Captum's Saliency returns magnitudes otherwise
    deviation = noise_deviation(question.image, smooth.noise)
    total = 0.0
    for start in range(0, smooth.copies, _BATCH):
        names = [f"smoothgrad/{index}" for index in range(start, min(start + _BATCH, smooth.copies))]
        copies = add_noise(question.image.expand(len(names), -1, -1, -1), deviation, names, question.image.dtype)
        found = recipe.attribution.attribute(copies, **recipe.arguments, **signed)
        total = total + found.detach().sum(0, keepdim=True)
    return to_map(total / smooth.copies, question.image)
