"""Scores of a network on a case: the target's probability, and how well each method's map finds the evidence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor

from spade_fast import prepare_for_attribution
from spade_fast.attribution import attribution_map
from spade_fast.attribution.methods import METHODS, Question
from spade_fast.attribution.metrics import energy_inside, localisation_auc, pointing_game
from spade_fast.inputs.networks import LoadedModel

FAST = (
    *("saliency", "input-x-gradient", "deeplift", "lrp"),
    *("guided-backprop", "guided-gradcam", "gradcam", "layercam"),
)
SLOW = tuple(name for name in METHODS if name not in FAST)
METRICS = {"auc": localisation_auc, "pointing": pointing_game, "energy": energy_inside}


class Scorer:
    """Scores a network with the weights that are applied to it at the time.

    Attributes
    ----------
    prepared
        The network, prepared for attribution; weights are applied to this module.
    """

    def __init__(self, network: LoadedModel, example: Tensor) -> None:
        self.prepared = prepare_for_attribution(network.module, example)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (network.mean, network.std))
        self._black = -mean / std

    def __call__(self, case: Case, methods: Sequence[str]) -> dict[str, Any]:
        """Score the network on a case.

        Returns
        -------
        dict
            ``probability`` of the target; ``predicted``, whether it is the most probable class; and ``auc``,
            ``pointing``, ``energy`` and ``seconds`` by method.
        """
        with torch.no_grad():
            probabilities = self.prepared(case.image).softmax(1)[0]
        scores: dict[str, dict[str, float]] = {name: {} for name in ("auc", "pointing", "energy", "seconds")}
        question, mask = self.question(case), case.mask[None]
        for method in methods:
            start = time.perf_counter()
            maps = attribution_map(method, question)[None]
            scores["seconds"][method] = time.perf_counter() - start
            for name, metric in METRICS.items():
                scores[name][method] = float(metric(maps, mask))
        predicted = int(probabilities.argmax()) == case.target
        return {"probability": float(probabilities[case.target]), "predicted": predicted, **scores}

    def question(self, case: Case) -> Question:
        """Return what the methods are asked to explain."""
        return Question(self.prepared, case.image, case.target, self._black)
