"""Does a map find the trigger? Dense network, traces, SmoothGrad and controls on photos with a trojan's trigger."""

from __future__ import annotations

from torch import Tensor

from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import clean_image, probabilities
from studies.shared.ladders import Calibration
from studies.shared.making import Other
from studies.shared.measure import Study
from studies.shared.photos import test_photos
from studies.shared.rows import (
    DENSE,
    EIGHT,
    EQUAL,
    SIGNED,
    SMOOTH,
    Row,
    Rows,
    Source,
    draws,
    fixed,
    kept,
    row,
    smoothed,
    two_levels,
)
from studies.shared.scores import localisation
from studies.trojan.images import trojan_cases
from studies.trojan.implant import trojaned_network
from studies.trojan.tuned import tuned_sparsity

TRIGGERS_EACH = 3
NEURONS = ("*_depthwise_conv", "*_project_conv", "_avg_pooling")  # modules that take the output of a ReLU
_DRAWS, _IMAGES_PER_DRAW = 4, 8


def study() -> Study:
    """Set up the study, tuning on other photos if no earlier run has."""
    network = trojaned_network()
    photos = test_photos()
    cases = trojan_cases(network, photos, TRIGGERS_EACH)
    cases = [case for case in cases if predicts(network, case.image, case.target)]
    clean = [(photo.name, clean_image(network, photo)) for photo in photos]
    following = {name: clean[(number + 1) % len(clean)] for number, (name, _) in enumerate(clean)}
    without = {}
    for case in cases:
        name, image = following[case.source]
        without[case.name] = Other(name, image, int(probabilities(network, image).argmax()))
    others = {"same trigger": {}, "other trigger": {}, "clean": without}
    for number, case in enumerate(cases):
        rest = [one for one in cases[number + 1 :] + cases[:number] if one.source != case.source]
        same = next(one for one in rest if one.kind == case.kind)
        rest.sort(key=lambda one: one.source != same.source)  # the same photo, if it can be: its ladder is at hand
        different = next(one for one in rest if one.kind != case.kind)
        for whose, one in (("same trigger", same), ("other trigger", different)):
            others[whose][case.name] = Other(one.sample, one.image, one.target)
    return Study(
        name="trojan",
        title="Localisation AUC, %, of the trigger",
        network=network,
        cases=cases,
        stages=[{**_main(network), **_means()}, _controls(), _exact(network)],
        score=localisation,
        metric="auc",
        others=others,
        neurons=NEURONS,
        pairs=_PAIRS,
    )


def predicts(network: LoadedModel, image: Tensor, target: int) -> bool:
    """Tell whether the dense network predicts a class for an image."""
    return int(probabilities(network, image).argmax()) == target


def _main(network: LoadedModel) -> Rows:
    tuned = tuned_sparsity(network, "sparsegpt", Calibration())
    traces = two_levels("sparsegpt")
    return {
        "dense": row("dense network", Source(DENSE), methods=EIGHT),
        "edges": Row("edge detector", plain="edges"),
        "centre": Row("centre of the image", plain="centre"),
        "smooth": row("SmoothGrad", SMOOTH),
        "signed": row("SmoothGrad of signed attributions", SIGNED),
        "fast 50": row(f"FastSPADE, {EQUAL:.0%}", fixed("sparsegpt", EQUAL), methods=EIGHT),
        "fast tuned": row("FastSPADE, tuned with masks", fixed("sparsegpt", tuned)),
        "fast auto": row("FastSPADE, automatic", traces[0], methods=EIGHT),
        "fast two": row("FastSPADE, two levels", *traces, methods=EIGHT),
        "fast two, smooth": Row("mean of SmoothGrad and FastSPADE, two levels", ((SMOOTH,), traces)),
        "magnitude": row("control: magnitude pruning, two levels", *two_levels("magnitude")),
        "random": row("control: random pruning, two levels", *two_levels("random")),
        "pathway": row("control: neurons of NeuronMCT's pathway, two levels", *two_levels("pathway")),
    }


def _controls() -> Rows:
    return {
        whose: row(f"control: {title}, two levels", *two_levels("sparsegpt", whose=whose))
        for whose, title in (
            ("same trigger", "trace of another photo with the same trigger"),
            ("other trigger", "trace of another photo with another trigger"),
            ("clean", "trace of another photo without a trigger"),
        )
    }


def _means() -> Rows:
    over_draws = draws("sparsegpt", _DRAWS, _IMAGES_PER_DRAW)
    (inside,) = smoothed(kept("sparsegpt", 0.9))
    return {
        "fast draws": row(f"FastSPADE, two levels, {_DRAWS} draws of {_IMAGES_PER_DRAW} crops", *over_draws),
        "fast draws, smooth": Row("mean of SmoothGrad and FastSPADE, two levels, draws", ((SMOOTH,), over_draws)),
        "smooth inside": row("SmoothGrad inside FastSPADE, automatic", inside),
    }


def _exact(network: LoadedModel) -> Rows:
    tuned = tuned_sparsity(network, "exact", Calibration())
    traces = two_levels("exact")
    return {
        "exact 50": row(f"SPADE, {EQUAL:.0%}", fixed("exact", EQUAL)),
        "exact tuned": row("SPADE, tuned with masks", fixed("exact", tuned)),
        "exact auto": row("SPADE, automatic", traces[0], methods=EIGHT),
        "exact two": row("SPADE, two levels", *traces, methods=EIGHT),
        "exact two, smooth": Row("mean of SmoothGrad and SPADE, two levels", ((SMOOTH,), traces)),
    }


_CONTROLS = ("same trigger", "other trigger", "clean", "magnitude", "random", "pathway")
_PAIRS = (
    ("fast two", "dense"),
    ("fast auto", "dense"),
    ("fast draws", "dense"),
    ("exact two", "dense"),
    ("smooth", "dense"),
    ("signed", "smooth"),
    ("fast two", "smooth"),
    ("fast two, smooth", "smooth"),
    ("fast draws, smooth", "smooth"),
    ("exact two, smooth", "smooth"),
    ("smooth inside", "smooth"),
    ("fast auto", "fast 50"),
    ("fast auto", "fast tuned"),
    ("fast two", "fast auto"),
    ("exact two", "fast two"),
    *(("fast two", control) for control in _CONTROLS),
)
