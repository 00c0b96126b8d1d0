"""Do other networks recognise pictures of classes? Dense networks, traces and controls, by both picture methods.

The judge is of the same family and answers to the same high frequencies, so it also sees pictures reduced to few
pixels; `breeds` has judges of another family.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from spade_fast._util.hashes import hash_tensors
from spade_fast.inputs.networks import LoadedModel
from studies.networks.lite import efficientnet_lite
from studies.shared.cases import Case, clean_image, probabilities, undo_normalisation
from studies.shared.making import Other
from studies.shared.photos import (
    CONSOLE,
    Photo,
    animal_photos,
    imagenet_photos,
    test_photos,
    training_photos,
    tuning_photos,
)
from studies.shared.records import Records, code_digest, digest, hash_weights
from studies.shared.rows import EQUAL, Weights
from studies.visualization import judges as judges_module
from studies.visualization.comparing import Comparison, fact_columns
from studies.visualization.judges import SIDES, Judge, verdicts
from studies.visualization.methods import FOURIER_MACO_VIEWS
from studies.visualization.painting import PictureRow, PictureStudy

LEAST = 0.5  # probability of the predicted class in photos that are not foolbox's
KEEP = 0.9  # share of the probability that automatic traces keep, the package's default
TOP = 5
PHOTO, NO_PHOTO = "photo", "no photo"  # kinds of classes
ABOUT = f"""The network that looks at the pictures sees them whole, or reduced to so many pixels a side and enlarged
again; *drawn*: with only what matters drawn, the rest grey. *Automatic* pruning goes as far as the probability of the
class in the photo stays above {KEEP:.0%} of the dense network's. Traces of other photos keep that of their own class. A
class of which *nothing* could be *painted*, because pruning has cut it off, counts as not recognised.
"""


@dataclass(frozen=True)
class Sizes:
    """How many classes have pictures: of the main rows, of the other rows, and of another photo's trace."""

    classes: int
    controls: int
    same: int


NETWORKS: Mapping[str, tuple[Callable[[], LoadedModel], Sizes]] = {
    "lite0": (partial(efficientnet_lite, 0), Sizes(50, 18, 10)),
    "lite1": (partial(efficientnet_lite, 1), Sizes(30, 14, 8)),
}  # sizes so that each takes about an hour on two cores


def study(which: str) -> PictureStudy:
    """Set up the study of one of the networks."""
    make_network, sizes = NETWORKS[which]
    network = make_network()
    return class_study(which, network, class_photos(network, all_photos(), len(imagenet_photos())), sizes)


STUDIES: Mapping[str, Callable[[], PictureStudy]] = {which: partial(study, which) for which in NETWORKS}


def all_photos() -> list[Photo]:
    """Return all photos, foolbox's first: these networks have been trained on none of them here."""
    photos = [*imagenet_photos(), *test_photos(), *tuning_photos(), *animal_photos(), *training_photos()]
    return list({photo.name: photo for photo in photos}.values())


def class_photos(network: LoadedModel, photos: Iterable[Photo], always: int) -> dict[int, list[Photo]]:
    """Return photos by the class that a network predicts for them.

    The first `always` photos are taken as they are, of the others those whose class has a probability of at least one
    half. The classes of the first come first, then those with two photos.
    """
    found: dict[int, list[Photo]] = {}
    first: set[int] = set()
    for number, (photo, target, probability) in enumerate(_predictions(network, photos)):
        if number < always:
            first.add(target)
        if number < always or probability >= LEAST:
            found.setdefault(target, []).append(photo)
    order = sorted(found, key=lambda target: (target not in first, len(found[target]) < 2))
    return {target: found[target] for target in order}


def _predictions(network: LoadedModel, photos: Iterable[Photo]) -> Iterator[tuple[Photo, int, float]]:
    """Yield each photo, its class and the probability of that; they are kept, since every process asks for them."""
    records = Records("classes", {"weights": hash_weights(network.module), **network.preprocessing})
    for photo in photos:
        key = photo.name, hashlib.blake2b(photo.image.tobytes(), digest_size=5).hexdigest()
        if key not in records:
            predicted = probabilities(network, clean_image(network, photo))
            records.add(key, {"class": int(predicted.argmax()), "probability": float(predicted.max())})
        yield photo, records[key]["class"], records[key]["probability"]


def class_study(name: str, network: LoadedModel, photos: Mapping[int, Sequence[Photo]], sizes: Sizes) -> PictureStudy:
    """Set up the study of the first of some classes; the first photo of each is its own."""
    cases: list[Case] = []
    same: dict[str, Other] = {}
    for target, of_class in list(photos.items())[: sizes.classes]:
        about = f"{target} {network.class_name(target)}"
        cases.append(Case(about, of_class[0].name, about, PHOTO, clean_image(network, of_class[0]), target))
        if len(of_class) > 1 and len(same) < sizes.same:
            same[about] = Other(of_class[1].name, clean_image(network, of_class[1]), target)
    another = {
        case.name: Other(following.sample, following.image, following.target)
        for case, following in zip(cases, [*cases[1:], cases[0]], strict=True)
    }
    return PictureStudy(name, network, cases, _stages(sizes.controls), others={"another": another, "same": same})


def _stages(most: int) -> list[dict[str, PictureRow]]:
    automatic = Weights("sparsegpt", keep=KEEP)
    theirs = {whose: Weights("sparsegpt", keep=KEEP, whose=whose, goal="theirs") for whose in ("another", "same")}
    return [
        {"dense": PictureRow("dense network"), "auto": PictureRow("own trace, automatic", automatic)},
        {"another": PictureRow("trace of a photo of another class", theirs["another"], most=most)},
        {"half": PictureRow(f"own trace, {EQUAL:.0%}", Weights("sparsegpt", sparsity=EQUAL), most=most)},
        {"magnitude": PictureRow("magnitude pruning, automatic", Weights("magnitude", keep=KEEP), most=most)},
        {
            "fourier": PictureRow("Fourier: dense network", method="fourier", most=most),
            "fourier views": PictureRow(
                "Fourier with MACO's views: dense network", method=FOURIER_MACO_VIEWS, most=most
            ),
            "fourier auto": PictureRow("Fourier: own trace, automatic", automatic, method="fourier", most=most),
        },
        {"same": PictureRow("trace of another photo of the class", theirs["same"])},
    ]


Compared = Mapping[str, tuple[Sequence[str], Sequence[tuple[str, str]]]]  # by title: rows, and pairs of them
COMPARISONS: Compared = {
    "Own traces": (("dense", "auto"), (("auto", "dense"),)),
    "Controls": (
        ("dense", "auto", "another", "half", "magnitude"),
        (("auto", "dense"), ("auto", "another"), ("half", "dense"), ("auto", "magnitude")),
    ),
    "Methods": (
        ("dense", "fourier views", "fourier", "auto", "fourier auto"),
        (
            ("dense", "fourier views"),
            ("fourier views", "fourier"),
            ("auto", "fourier auto"),
            ("fourier auto", "fourier"),
        ),
    ),
    "Photos of the same class": (("dense", "auto", "same"), (("auto", "dense"), ("auto", "same"))),
}


def look(study: PictureStudy, judge: Judge) -> Records:
    """Let a judge see all pictures, each once, and the photos; return records by key of the picture or photo."""
    painted = study.records()
    code = code_digest((Path(judges_module.__file__),))
    settings = {"pictures": painted.path.stem, "judge": hash_weights(judge.network.module), "code": code}
    records = Records(f"verdicts_{study.name}", settings)
    for case in track(study.cases, f"{judge.network.name} looks at pictures", console=CONSOLE):
        if not judge.knows(case.target):
            continue
        if case.kind == PHOTO and photo_key(case) not in records:
            colours = undo_normalisation(study.network, case.image[0])
            records.add(photo_key(case), {"picture": verdicts(judge, colours, case.target)})
        for key, row in ((study.key(row, case), row) for row in study.rows if study.has(row, case)):
            if key not in records and "failed" not in painted[key]:
                shown = study.open(row, case)
                records.add(key, {version: verdicts(judge, one, case.target) for version, one in shown.items()})
    return records


def pictures_of(study: PictureStudy, row: str) -> list[Tensor | None]:
    """Return a row's picture ``[3, H, W]`` of each case; None where pruning has cut the feature off."""
    painted = study.records()
    keys = [(study.key(row, case), case) for case in study.cases]
    return [None if "failed" in painted[key] else study.open(row, case)["picture"] for key, case in keys]


def photo_key(case: Case) -> tuple[str, ...]:
    """Return the key of the verdicts on the photo of a case."""
    return "photo", case.sample, str(case.target), digest(hash_tensors([("image", case.image)]))


def comparisons(study: PictureStudy, judge: Judge, compared: Compared = COMPARISONS) -> list[Comparison]:
    """Compare rows on the classes that have pictures of all of them and that the judge knows."""
    painted, seen = study.records(), look(study, judge)
    found = []
    for title, (rows, pairs) in compared.items():
        if not set(study.rows).issuperset(rows):
            continue
        cases = [case for case in study.cases if judge.knows(case.target) and all(study.has(row, case) for row in rows)]
        if not cases:
            continue
        titles, values, sources, unpainted = {}, {}, {}, {}
        if all(case.kind == PHOTO for case in cases):
            titles["photo"] = "the photos themselves"
            values["photo"] = scores([seen[photo_key(case)] for case in cases], [None] * len(cases))
            sources["photo"] = [case.source for case in cases]
        for row in rows:
            keys = [study.key(row, case) for case in cases]
            facts = [_facts(painted[key], case) for key, case in zip(keys, cases, strict=True)]
            titles[row] = study.rows[row].title
            values[row] = scores([seen.get(key) for key in keys], facts)
            sources[row] = [study.source(row, case) for case in cases]
            unpainted[row] = ["failed" in one for one in facts]
        about = f"{title}: {study.network.name} seen by {judge.network.name}"
        found.append(Comparison(about, titles, values, sources, unpainted, "classes", pairs))
    return found


def _facts(painted: Mapping[str, Any], case: Case) -> Mapping[str, Any]:
    """Return what is known of a picture's network; without a photo of the class it has no probability there."""
    return painted if case.kind == PHOTO else {**painted, "probability": math.nan}


def scores(
    seen: Sequence[Mapping[str, Any] | None], facts: Sequence[Mapping[str, Any] | None]
) -> dict[str, dict[str, list[float]]]:
    """Return values of columns: what a judge made of pictures, and facts about the networks that they show.

    Nothing is seen where no picture could be painted: the class is not recognised then. Photos have no facts, and no
    version with only what matters drawn.
    """

    def columns(measure: Callable[[Mapping[str, float]], float]) -> dict[str, list[float]]:
        whole = {side: [_measured(one, measure, "picture", side) for one in seen] for side in SIDES}
        return {**whole, "64, drawn": [_measured(one, measure, "drawn", "64") for one in seen]}

    return {
        f"top-{TOP}, %": columns(lambda verdict: float(verdict["rank"] < TOP)),
        "top-1, %": columns(lambda verdict: float(verdict["rank"] < 1)),
        "probability, %": columns(lambda verdict: verdict["probability"]),
        "networks, %": fact_columns(facts),
    }


def _measured(
    one: Mapping[str, Any] | None, measure: Callable[[Mapping[str, float]], float], version: str, side: str
) -> float:
    if one is None:
        return 0.0
    return measure(one[version][side]) if version in one else math.nan
