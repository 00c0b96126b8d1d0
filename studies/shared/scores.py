"""Scores of maps: where they point, if the evidence is known, and what the dense network makes of their pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from spade_fast.attribution.metrics import (
    auc,
    deletion_curve,
    energy_inside,
    insertion_curve,
    localisation_auc,
    pointing_game,
)
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case

Scores = dict[str, float]
STEPS = 16  # of insertion and deletion


def localisation(network: LoadedModel, case: Case, attributions: Tensor) -> Scores:
    """Score a map ``[H, W]`` against the mask of the evidence."""
    maps, masks = attributions[None], _mask(case.mask)[None]
    return {
        "auc": float(localisation_auc(maps, masks)),
        "pointing": float(pointing_game(maps, masks)),
        "energy": float(energy_inside(maps, masks)),
    }


def separation(network: LoadedModel, case: Case, attributions: Tensor) -> Scores:
    """Score whether a map prefers the evidence for the class explained to that for its rival.

    ``share``: of the map's sum inside both, the part inside the first. ``auc``: the probability that a random pixel
    of the first has a larger value than one of the other. Maps that do not depend on the class score 50 % on average
    over both questions about an image.
    """
    mine, other = (attributions[_mask(mask)] for mask in (case.mask, case.rival_mask))
    pixels = torch.cat([mine, other])[None, None]
    first = torch.arange(pixels.numel()).view_as(pixels) < len(mine)
    return {"share": float(energy_inside(pixels, first)), "auc": float(localisation_auc(pixels, first))}


def perturbation(network: LoadedModel, case: Case, attributions: Tensor) -> Scores:
    """Score a map by the probability of the class in the *dense* network while its pixels are inserted or removed."""
    given = (network.module, case.image, attributions[None], case.target)
    return {
        "insertion": float(auc(insertion_curve(*given, steps=STEPS))),
        "deletion": float(auc(deletion_curve(*given, steps=STEPS))),
    }


def _mask(mask: Tensor | None) -> Tensor:
    if mask is None:
        raise ValueError("the case has no mask of the evidence")
    return mask
