"""A sparsity per block, tuned with the masks of the triggers on photos that are not reported on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from rich.progress import Progress
from torch import nn

from spade_fast import prepare_for_attribution, tune
from spade_fast._util.hashes import hash_tensors
from spade_fast.attribution import attribution_map
from spade_fast.attribution.methods import Question
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case
from studies.shared.ladders import Calibration
from studies.shared.photos import CONSOLE, tuning_photos
from studies.shared.records import Records
from studies.shared.scores import localisation
from studies.trojan.images import trojan_cases

METHODS = ("saliency", "guided-backprop")
CANDIDATES = (0.3, 0.5, 0.6, 0.7, 0.85)  # levels of the ladders
_PHOTOS = 8


def tuned_sparsity(network: LoadedModel, solver: str, calibration: Calibration) -> Mapping[str, float]:
    """Tune with the mean localisation AUC of two methods.

    The score of a trace that gives the target a probability below one half falls in proportion.
    """
    cases = trojan_cases(network, tuning_photos()[:_PHOTOS], each=1)
    settings = {
        "weights": hash_tensors(network.module.named_parameters()),
        "calibration": asdict(calibration),
        "cases": [case.name for case in cases],
        "methods": METHODS,
        "candidates": CANDIDATES,
        "score": "auc * min(1, 2 * probability)",
    }
    records = Records("tuning", settings)
    if (solver,) not in records:
        records.add((solver,), _tune(network, solver, calibration, cases))
    return records[(solver,)]["sparsity"]


def _tune(network: LoadedModel, solver: str, calibration: Calibration, cases: list[Case]) -> dict:
    prepared = prepare_for_attribution(network.module, cases[0].image)

    def score(model: nn.Module, index: int) -> float:
        case = cases[index]
        question = Question(prepared, case.image, case.target, network.black)
        scores = [localisation(network, case, attribution_map(method, question))["auc"] for method in METHODS]
        with torch.no_grad():
            probability = float(prepared(case.image).softmax(1)[0, case.target])
        return sum(scores) / len(METHODS) * min(1.0, 2 * probability)

    with Progress(console=CONSOLE) as progress:
        task = progress.add_task("")

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"Tuning {solver}: {stage}", completed=done, total=total)

        tuning = tune(
            prepared,
            [calibration.augmented(network, case.image, case.sample) for case in cases],
            score,
            candidates=CANDIDATES,
            stages="blocks",
            solver=solver,
            layers=calibration.layers,
            progress=show,
        )
    return {"sparsity": tuning.sparsity, "before": tuning.before, "after": tuning.after}
