"""Scores the dense network, its traces and controls on every case."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from cases import Case, clean_image, mosaic_cases, trojan_cases
from implant import trojaned_network
from records import Records
from rich.progress import track
from rows import EQUAL, Calibration, Sparsity, at_random, chosen, magnitude, shares_of, solve
from scoring import FAST, SLOW, Scorer
from sources import CONSOLE, imagenet_photos, test_photos
from torch import Tensor
from tuned import tuned_sparsity

from spade_fast._util.hashes import hash_tensors
from spade_fast.inputs.networks import LoadedModel, load_model
from spade_fast.pruning.exchange import WeightsApplied
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.tuning import Candidates

WITH_SLOW = ("dense", "fast", "exact")
TRIGGERS_EACH, MOSAICS = 3, 10
CALIBRATION = Calibration()
Images = Mapping[str, tuple[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One of the networks to compare.

    Attributes
    ----------
    title
        Name in the tables.
    pruning
        ``"sparsegpt"`` or ``"exact"`` (a trace), ``"magnitude"``, ``"random"``, or ``""`` for the dense network.
    sparsity
        Share of weights to remove, or one share per layer.
    others
        For each sample, name and image of the other sample whose trace is used; None for the sample's own trace.
    """

    title: str
    pruning: str = ""
    sparsity: Sparsity = 0.0
    others: Images | None = None


@dataclass(frozen=True)
class Experiment:
    """Cases for one network, and the networks compared on them.

    Attributes
    ----------
    name
        Name of the file of records.
    network, cases
        The dense network, and the cases to score.
    rows
        The networks to compare, by name.
    slow
        Names of the cases on which the slow methods also run.
    """

    name: str
    network: LoadedModel
    cases: Sequence[Case]
    rows: Mapping[str, Row]
    slow: frozenset[str] = frozenset()


def trojan_experiment() -> Experiment:
    """Set up the cases with a trigger that the network recognises, and the networks to compare on them."""
    network = trojaned_network()
    photos = test_photos()
    cases = [case for case in trojan_cases(network, photos, TRIGGERS_EACH) if predicts_target(network, case)]
    clean = [(photo.name, clean_image(network, photo)) for photo in photos]
    following = {name: clean[(number + 1) % len(clean)] for number, (name, _) in enumerate(clean)}
    without = {case.sample: following[case.source] for case in cases}
    with_trigger = {}
    for number, case in enumerate(cases):
        rest = cases[number + 1 :] + cases[:number]
        other = next(one for one in rest if one.kind == case.kind and one.source != case.source)
        with_trigger[case.sample] = (other.sample, other.image)
    fast, exact = (tuned_sparsity(network, solver, CALIBRATION) for solver in ("sparsegpt", "exact"))
    equal = {
        "fast-equal": Row(f"FastSPADE, {EQUAL:.0%}", "sparsegpt", EQUAL),
        "exact-equal": Row(f"SPADE, {EQUAL:.0%}", "exact", EQUAL),
        **_controls(f"{EQUAL:.0%}", EQUAL, {"with the trigger": with_trigger, "without it": without}),
        "random": Row(f"control, {EQUAL:.0%}: random pruning", "random", EQUAL),
    }
    rows = {
        "dense": Row("dense network"),
        "fast": Row("FastSPADE, tuned", "sparsegpt", fast),
        "exact": Row("SPADE, tuned", "exact", exact),
        **_controls("tuned", fast, {"with the trigger": with_trigger, "without it": without}),
        **equal,
    }
    first_of_photo = {case.source: case.name for case in reversed(cases)}
    return Experiment("trojan", network, cases, rows, frozenset(list(first_of_photo.values())[::2]))


def mosaic_experiment() -> Experiment:
    """Set up the grid pointing game on the original network."""
    network = load_model("demo")
    cases = mosaic_cases(network, imagenet_photos(), MOSAICS)
    images = list({case.sample: case.image for case in cases}.items())
    following = {name: images[(number + 1) % len(images)] for number, (name, _) in enumerate(images)}
    rows = {
        "dense": Row("dense network"),
        "fast-equal": Row(f"FastSPADE, {EQUAL:.0%}", "sparsegpt", EQUAL),
        "exact-equal": Row(f"SPADE, {EQUAL:.0%}", "exact", EQUAL),
        **_controls(f"{EQUAL:.0%}", EQUAL, {"": following}),
        "random": Row(f"control, {EQUAL:.0%}: random pruning", "random", EQUAL),
    }
    return Experiment("mosaics", network, cases, rows)


def _controls(label: str, sparsity: Sparsity, others: Mapping[str, Images]) -> dict[str, Row]:
    """Return the controls: networks with FastSPADE's sparsities whose weights are not chosen for the sample."""
    controls = {
        f"another image {which}".strip(): Row("", "sparsegpt", sparsity, images) for which, images in others.items()
    }
    controls["magnitude pruning"] = Row("", "magnitude", sparsity)
    return {f"{label}: {name}": replace(row, title=f"control, {label}: {name}") for name, row in controls.items()}


def predicts_target(network: LoadedModel, case: Case) -> bool:
    """Tell whether the dense network predicts the case's target."""
    with torch.no_grad():
        return int(network.module(case.image).argmax()) == case.target


def measure(experiment: Experiment) -> Records:
    """Score all networks on all cases; what earlier runs have scored is taken from their records."""
    network = experiment.network
    settings = {
        "weights": hash_tensors(network.module.named_parameters()),
        "cases": [case.name for case in experiment.cases],
        "rows": {name: [row.pruning, row.sparsity] for name, row in experiment.rows.items()},
        "slow": sorted(experiment.slow),
        "calibration": asdict(CALIBRATION),
    }
    records = Records(experiment.name, settings)
    scorer = Scorer(network, experiment.cases[0].image)
    networks = _Networks(experiment)
    samples = [list(cases) for _, cases in itertools.groupby(experiment.cases, lambda case: case.sample)]
    for cases in track(samples, f"Scoring {experiment.name}", console=CONSOLE):
        for name, row in experiment.rows.items():
            missing = [case for case in cases if (name, case.name) not in records]
            if missing:
                pruned, seconds = networks(cases[0], row)
                with WeightsApplied(scorer.prepared, pruned):
                    for case in missing:
                        about = {"source": case.source, "kind": case.kind}
                        slow = SLOW if name in WITH_SLOW and case.name in experiment.slow else ()
                        records.add((name, case.name), {**about, "solve": seconds, **scorer(case, (*FAST, *slow))})
    return records


class _Networks:
    """Makes the pruned weights of each row. A trace that also serves as a control for another case is solved once."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.images = {case.sample: case.image for case in experiment.cases}
        for row in experiment.rows.values():
            self.images.update((row.others or {}).values())
        self.solved = lru_cache(maxsize=16)(self._solve)

    def __call__(self, case: Case, row: Row) -> tuple[list[PrunedLayer], float]:
        """Return the weights of a row for the image of a case, and the seconds of their calibration and solving."""
        module = self.experiment.network.module
        if not row.pruning:
            return [], 0.0
        if row.pruning == "magnitude":
            return magnitude(module, row.sparsity), 0.0
        if row.pruning == "random":
            return at_random(module, row.sparsity, case.sample), 0.0
        weights, seconds = self.solved(row.pruning, row.others[case.sample][0] if row.others else case.sample)
        return chosen(weights, row.sparsity), seconds

    def _solve(self, solver: str, sample: str) -> tuple[Candidates, float]:
        sparsities = [row.sparsity for row in self.experiment.rows.values() if row.pruning == solver]
        shares = {share for sparsity in sparsities for share in shares_of(sparsity)}
        start = time.perf_counter()
        network, image = self.experiment.network, self.images[sample]
        return solve(network, image, sample, solver, sorted(shares), CALIBRATION), time.perf_counter() - start
