"""What makes traces localise better: one setting is changed at a time, on photos that are not reported on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import mean

from cases import trojan_cases
from measure import predicts_target
from records import Records
from rich.progress import track
from rows import EQUAL, LAYERS, Calibration
from scoring import Scorer
from sources import CONSOLE, tuning_photos

from spade_fast import trace
from spade_fast._util.hashes import hash_tensors
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.layers import find_layers

METHODS = ("saliency", "input-x-gradient", "deeplift", "lrp", "guided-backprop")
_PHOTOS = 10
BASE = Calibration(augmentations=64)


@dataclass(frozen=True)
class Setting:
    """One line of the study's table."""

    question: str
    answer: str
    solver: str = "sparsegpt"
    sparsity: float = EQUAL
    calibration: Calibration = BASE

    @property
    def key(self) -> str:
        """Key of its records: equal settings are measured once."""
        return json.dumps([self.solver, self.sparsity, asdict(self.calibration)])


def settings(network: LoadedModel) -> Iterator[Setting]:
    """Yield all settings, question by question."""
    for solver, sparsities in (("sparsegpt", (0.3, 0.5, 0.65, 0.75, 0.85)), ("exact", (0.5, 0.65, 0.75, 0.85))):
        for sparsity in sparsities:
            yield Setting(f"sparsity, {solver}", f"{sparsity:.0%}", solver, sparsity)
    for low in (0.08, 0.2, 0.5, 0.8):
        yield Setting("crops of at least this share of the image", f"{low:.0%}", calibration=_with(scale=(low, 1.0)))
    for count in (16, 48, 128, 512):
        yield Setting("augmentations", str(count), calibration=_with(augmentations=count))
    for damping in (0.001, 0.01, 0.1, 1.0):
        yield Setting("damping", f"{damping:g}", calibration=_with(damping=damping))
    every = find_layers(network.module)[0]
    pointwise = [layer.name for layer in find_layers(network.module, list(LAYERS))[0]]
    half = len(pointwise) // 2
    groups = {
        "1x1": LAYERS,
        "1x1, first half": tuple(pointwise[:half]),
        "1x1, second half": tuple(pointwise[half:]),
        "1x1 and the last linear layer": (*LAYERS, "_fc"),
        "depthwise": ("*_depthwise_conv",),
        "100 columns and more": tuple(layer.name for layer in every if layer.columns >= 100),
        "all": tuple(layer.name for layer in every),
    }
    for name, layers in groups.items():
        yield Setting("layers", name, calibration=_with(layers=layers))
    for solver, sparsity in (("sparsegpt", 0.5), ("sparsegpt", 0.6), ("exact", 0.65), ("exact", 0.8)):
        wide = _with(layers=groups["100 columns and more"])
        yield Setting("layers of 100 columns and more", f"{solver}, {sparsity:.0%}", solver, sparsity, wide)
    for block in (None, 2, 8):  # None is 1 here, and 8 divides the columns of all layers
        name = str(block or 1)
        yield Setting("columns whose mask SparseGPT chooses together", name, calibration=_with(block=block))
    for block in (None, 4, 8):
        name = str(block or 1)
        yield Setting("columns that exact OBS removes together", name, "exact", calibration=_with(block=block))


def _with(**changes) -> Calibration:
    return replace(BASE, **changes)


def study(network: LoadedModel) -> tuple[list[str], Records]:
    """Score all settings that no earlier run has scored; return the names of the cases, and the records."""
    cases = [
        case for case in trojan_cases(network, tuning_photos()[:_PHOTOS], each=1) if predicts_target(network, case)
    ]
    records = Records("study", {"weights": hash_tensors(network.module.named_parameters()), "methods": METHODS})
    scorer = Scorer(network, cases[0].image)
    for case in cases:
        if ("dense", case.name) not in records:
            records.add(("dense", case.name), {"source": case.source, **scorer(case, METHODS)})
    cheapest_first = sorted(settings(network), key=lambda one: (one.solver == "exact", one.calibration.augmentations))
    for setting in track(cheapest_first, "Study", console=CONSOLE):
        calibration = setting.calibration
        for case in cases:
            if (setting.key, case.name) in records:
                continue
            start = time.perf_counter()
            made = trace(
                network.module,
                calibration.augmented(network, case.image, case.sample),
                sparsity=setting.sparsity,
                solver=setting.solver,
                layers=calibration.layers,
                block=calibration.block,
                damping=calibration.damping,
            )
            seconds = time.perf_counter() - start
            error = mean(report.measured_error for report in made.reports)
            with made.applied(scorer.prepared):
                scores = scorer(case, METHODS)
            records.add((setting.key, case.name), {"source": case.source, "solve": seconds, "error": error, **scores})
    return [case.name for case in cases], records
