"""A sparsity per block, tuned for localisation on photos that are not reported on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from cases import Case, trojan_cases
from records import Records
from rich.progress import Progress
from rows import Calibration
from scoring import Scorer
from sources import CONSOLE, tuning_photos
from torch import nn

from spade_fast import tune
from spade_fast._util.hashes import hash_tensors
from spade_fast.inputs.networks import LoadedModel

METHODS = ("saliency", "guided-backprop")
CANDIDATES = (0.2, 0.5, 0.8, 0.9, 0.95)
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
    scorer = Scorer(network, cases[0].image)

    def score(model: nn.Module, index: int) -> float:
        found = scorer(cases[index], METHODS)
        return sum(found["auc"].values()) / len(METHODS) * min(1.0, 2 * found["probability"])

    with Progress(console=CONSOLE) as progress:
        task = progress.add_task("")

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"Tuning {solver}: {stage}", completed=done, total=total)

        tuning = tune(
            scorer.prepared,
            [calibration.augmented(network, case.image, case.sample) for case in cases],
            score,
            candidates=CANDIDATES,
            stages="blocks",
            solver=solver,
            layers=calibration.layers,
            progress=show,
        )
    return {"sparsity": tuning.sparsity, "before": tuning.before, "after": tuning.after}
