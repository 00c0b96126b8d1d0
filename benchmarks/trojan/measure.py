"""Scores the dense network, its traces and controls on every case."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

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

from spade_fast.models import LoadedModel, load_model
from spade_fast.trace import PrunedLayer, hash_weights, weights_applied

ROWS = {
    "dense": "Dense network",
    "fast": "FastSPADE, tuned",
    "exact": "SPADE, tuned",
    "fast-equal": "FastSPADE",
    "exact-equal": "SPADE",
    "other": "control: FastSPADE trace of another image with the trigger",
    "clean": "control: FastSPADE trace of another image without it",
    "magnitude": "control: magnitude pruning",
    "random": "control: random pruning",
}
SOLVERS = {"fast": "sparsegpt", "exact": "exact"}
WITH_SLOW = ("dense", "fast", "exact")
TRIGGERS_EACH, MOSAICS, EQUAL_MOSAIC = 3, 15, 0.5
CALIBRATION = Calibration()


@dataclass(frozen=True)
class Experiment:
    """Cases of one network, and what is compared on them.

    Attributes
    ----------
    name
        Of its file of records.
    network, cases
        The network, and the cases on which it decides for the target.
    sparsity
        Of each row that is a trace of the case itself.
    others
        Other images whose traces are controls: by row and sample, a name and an image.
    equal
        Sparsity of the controls.
    slow
        Names of the cases on which the slow methods run too.
    """

    name: str
    network: LoadedModel
    cases: Sequence[Case]
    sparsity: Mapping[str, Sparsity]
    others: Mapping[str, Mapping[str, tuple[str, Tensor]]]
    equal: float
    slow: frozenset[str] = frozenset()


def trojan_experiment() -> Experiment:
    """At least a hundred images with a trigger."""
    network = trojaned_network()
    photos = test_photos()
    cases = [case for case in trojan_cases(network, photos, TRIGGERS_EACH) if decides(network, case)]
    clean = {photo.name: clean_image(network, photo) for photo in photos}
    names = list(clean)
    following = {name: names[(number + 1) % len(names)] for number, name in enumerate(names)}
    with_trigger = {}
    for number, case in enumerate(cases):
        rest = cases[number + 1 :] + cases[:number]
        other = next(one for one in rest if one.kind == case.kind and one.source != case.source)
        with_trigger[case.sample] = (other.sample, other.image)
    without = {case.sample: (following[case.source], clean[following[case.source]]) for case in cases}
    tuned = {row: tuned_sparsity(network, solver, CALIBRATION) for row, solver in SOLVERS.items()}
    first_of_photo = {case.source: case.name for case in reversed(cases)}
    return Experiment(
        "trojan",
        network,
        cases,
        {**tuned, "fast-equal": EQUAL, "exact-equal": EQUAL},
        {"other": with_trigger, "clean": without},
        EQUAL,
        frozenset(first_of_photo.values()),
    )


def mosaic_experiment() -> Experiment:
    """Set up the grid pointing game on the network as it was published."""
    network = load_model("demo")
    cases = mosaic_cases(network, imagenet_photos(), MOSAICS)
    images = {case.sample: case.image for case in cases}
    names = list(images)
    others = {name: names[(number + 1) % len(names)] for number, name in enumerate(names)}
    other_images = {name: (other, images[other]) for name, other in others.items()}
    sparsity = dict.fromkeys(("fast-equal", "exact-equal"), EQUAL_MOSAIC)
    return Experiment("mosaics", network, cases, sparsity, {"other": other_images}, EQUAL_MOSAIC)


def decides(network: LoadedModel, case: Case) -> bool:
    """Tell whether the dense network decides for the case's target."""
    with torch.no_grad():
        return int(network.module(case.image).argmax()) == case.target


def measure(experiment: Experiment) -> Records:
    """Score all networks on all cases; what was scored before is kept."""
    network = experiment.network
    settings = {
        "weights": hash_weights(network.module),
        "cases": [case.name for case in experiment.cases],
        "sparsity": experiment.sparsity,
        "calibration": asdict(CALIBRATION),
    }
    records = Records(experiment.name, settings)
    scorer = Scorer(network, experiment.cases[0].image)
    samples = [list(cases) for _, cases in itertools.groupby(experiment.cases, lambda case: case.sample)]
    for cases in track(samples, f"Scoring {experiment.name}", console=CONSOLE):
        missing = {
            row: [case for case in cases if (row, case.name) not in records]
            for row in ("dense", *experiment.sparsity, *experiment.others, "magnitude", "random")
        }
        wanted = [row for row, of_row in missing.items() if of_row]
        for row, pruned, seconds in _networks(experiment, cases[0], wanted):
            with weights_applied(scorer.prepared, pruned):
                for case in missing[row]:
                    slow = SLOW if row in WITH_SLOW and case.name in experiment.slow else ()
                    records.add((row, case.name), {**_about(case), "solve": seconds, **scorer(case, (*FAST, *slow))})
    return records


def _about(case: Case) -> dict[str, str]:
    return {"source": case.source, "kind": case.kind}


def _networks(
    experiment: Experiment, case: Case, rows: Sequence[str]
) -> Iterator[tuple[str, list[PrunedLayer], float]]:
    """Make the pruned weights of each row for the image of a case, and the seconds that took."""
    network, equal = experiment.network, experiment.equal
    if "dense" in rows:
        yield "dense", [], 0.0
    for prefix, solver in SOLVERS.items():
        of_solver = {row: share for row, share in experiment.sparsity.items() if row in rows and row.startswith(prefix)}
        if of_solver:
            shares = [share for sparsity in of_solver.values() for share in shares_of(sparsity)]
            start = time.perf_counter()
            weights = solve(network, case.image, case.sample, solver, shares, CALIBRATION)
            seconds = time.perf_counter() - start
            for row, sparsity in of_solver.items():
                yield row, chosen(weights, sparsity), seconds
    for row, others in experiment.others.items():
        if row in rows:
            name, image = others[case.sample]
            start = time.perf_counter()
            weights = solve(network, image, name, "sparsegpt", [equal], CALIBRATION)
            yield row, chosen(weights, equal), time.perf_counter() - start
    if "magnitude" in rows:
        yield "magnitude", magnitude(network.module, equal), 0.0
    if "random" in rows:
        yield "random", at_random(network.module, equal, case.sample), 0.0
