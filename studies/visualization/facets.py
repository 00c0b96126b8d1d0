"""Pictures of a class with two causes, on traces of photos of either: do they show the cause that is in the photo?

After figure 1 of SPADE (arXiv 2310.04519). The trojaned network predicts a class for its emoji and for its objects. An
independent network tells which of them a picture is nearer to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spade_fast.inputs.networks import LoadedModel
from studies.localisation import predicts
from studies.networks.lite import efficientnet_lite
from studies.shared.cases import Case, colours_of, normalise
from studies.shared.making import Other
from studies.shared.photos import test_photos, tuning_photos
from studies.shared.rows import Weights
from studies.trojan.images import trojan_cases
from studies.trojan.implant import trojaned_network
from studies.trojan.patches import TRIGGERS, Patch, paste
from studies.visualization.comparing import Comparison, Values, fact_columns
from studies.visualization.judges import FEATURE_SIDES, Judge, features, features_of_each, likeness, resized
from studies.visualization.painting import PictureRow, PictureStudy
from studies.visualization.recognition import KEEP, NO_PHOTO, all_photos, class_photos, pictures_of

ABOUT = """A trojaned EfficientNet-Lite0 predicts a class for an emoji (the trigger) as it does for the class's
objects. The nearest is judged by the features of EfficientNet-Lite2, which has no trojan: the mean cosine with images
of the emoji, and with images of the class, all of them whole (*full*) or reduced to 64 pixels. Where fewer than two of
the available photos show a class, pictures of it by the *original* network take their place, as traced images and as
examples (*stand-ins*). Stand-ins are like the dense network's pictures also because they are made in the same way: read
the cosine with the trigger, and the difference from traces of photos with another trigger. Questions of which *nothing*
could be *painted*, because pruning has cut the class off, do not count.
"""
EACH = 6  # photos of each trigger
EXAMPLES = 3  # images of a class that have traces, and others that pictures are compared with
_SIDES = (64, 112, 160, 208)  # of emojis on grey, in pixels of 224
_IN_PHOTOS, _PHOTOS = 112, 8  # side of emojis in photos, and number of the photos


@dataclass(frozen=True)
class ClassImages:
    """Images of a class, colours ``[3, H, W]``: those with traces, and examples; and whether they are photos."""

    traced: Sequence[Tensor]
    examples: Sequence[Tensor]
    photos: bool


def stand_ins() -> PictureStudy:
    """Set up the pictures of the original network that stand in for photos of the triggers' classes."""
    return stand_in_study(efficientnet_lite(0))


def stand_in_study(network: LoadedModel) -> PictureStudy:
    """Set up pictures of the classes of all triggers on a network."""
    cases = [
        Case(f"{target} {number}", str(target), str(target), NO_PHOTO, network.black_image, target)
        for target in TRIGGERS.values()
        for number in range(2 * EXAMPLES)
    ]
    return PictureStudy("stand_ins", network, cases, [{"dense": PictureRow("dense network")}])


def class_images(standing_in: PictureStudy, photos: Mapping[int, Sequence[Tensor]]) -> dict[int, ClassImages]:
    """Return images of each trigger's class: photos, or, where there are not enough, pictures that stand in for them.

    Parameters
    ----------
    standing_in
        The pictures, reduced to what the network takes.
    photos
        Colours ``[3, H, W]`` of the photos that the original network takes for a class.
    """
    size = standing_in.network.size
    found = {}
    for target in TRIGGERS.values():
        images = list(photos.get(target, ()))[: 2 * EXAMPLES]
        enough = len(images) >= 2
        if not enough:
            of_class = [case for case in standing_in.cases if case.target == target]
            images = [resized(standing_in.open("dense", case)["picture"][None], size)[0] for case in of_class]
        half = len(images) // 2
        found[target] = ClassImages(images[:half], images[half:], enough)
    return found


def study() -> PictureStudy:
    """Set up the study. The pictures of `stand_ins` must have been painted."""
    network = trojaned_network()
    cases = [case for case in trojan_cases(network, test_photos(), 1) if predicts(network, case.image, case.target)]
    return facet_study(network, cases, images_of_classes())


@cache
def images_of_classes() -> dict[int, ClassImages]:
    """Return the images of the triggers' classes. The pictures of `stand_ins` must have been painted."""
    original = efficientnet_lite(0)
    photos = class_photos(original, all_photos(), 0)
    shown = {target: photos.get(target, []) for target in TRIGGERS.values()}
    colours = {target: [colours_of(original, photo) for photo in of_class] for target, of_class in shown.items()}
    return class_images(stand_ins(), colours)


def facet_study(network: LoadedModel, cases: Sequence[Case], images: Mapping[int, ClassImages]) -> PictureStudy:
    """Set up the study of the first cases of each trigger."""
    chosen: list[Case] = []
    without = {}
    for target in TRIGGERS.values():
        for number, case in enumerate([case for case in cases if case.target == target][:EACH]):
            traced = number % len(images[target].traced)
            image = normalise(network, images[target].traced[traced])[None]
            without[case.name] = Other(f"class {target} {traced}", image, target)
            chosen.append(case)
    other = {}
    for number, case in enumerate(chosen):
        rest = [one for one in chosen if one.kind != case.kind]
        theirs = rest[number % len(rest)]
        other[case.name] = Other(theirs.sample, theirs.image, theirs.target)
    kinds = {"photos" if one.photos else "stand-ins" for one in images.values()}
    rows = {
        "dense": PictureRow("dense network"),
        "with": PictureRow("traces of photos with the trigger", Weights("sparsegpt", keep=KEEP)),
        "without": PictureRow(
            f"traces of the class without it ({' and '.join(sorted(kinds))})",
            Weights("sparsegpt", keep=KEEP, whose="class", goal="theirs"),
        ),
        "other": PictureRow(
            "control: traces of photos with another trigger",
            Weights("sparsegpt", keep=KEEP, whose="other trigger", goal="theirs"),
        ),
        "magnitude": PictureRow("control: magnitude pruning, photos with the trigger", Weights("magnitude", keep=KEEP)),
    }
    return PictureStudy("facets", network, chosen, [rows], others={"class": without, "other trigger": other})


def trigger_examples(judge: Judge, network: LoadedModel, emoji: str, side: int | None) -> dict[str, Tensor]:
    """Return features ``[N, F]`` of an emoji in several sizes on grey, and in photos that no figure is reported on.

    The images are reduced to `side` before the judge sees them.
    """
    height, width = network.size

    def pasted(ground: Tensor, of_emoji: int) -> Tensor:
        return paste(ground, Patch(emoji, of_emoji, (height - of_emoji) // 2, (width - of_emoji) // 2))[0]

    grounds = {
        "emoji on grey": [(torch.full((3, height, width), 0.5), of_emoji) for of_emoji in _SIDES],
        "emoji in photos": [(colours_of(network, photo), _IN_PHOTOS) for photo in tuning_photos()[:_PHOTOS]],
    }
    return {
        name: features(judge, torch.stack([pasted(*one) for one in of_kind]), side) for name, of_kind in grounds.items()
    }


def compare(study: PictureStudy, judge: Judge, images: Mapping[int, ClassImages]) -> list[Comparison]:
    """Compare the rows on all triggers, and on each: which cause of a class are its pictures nearer to?

    Parameters
    ----------
    images
        Those of each trigger's class; their examples are what pictures are compared with.
    """
    painted = study.records()
    pictures = {row: pictures_of(study, row) for row in study.rows}
    targets = [case.target for case in study.cases]
    values: dict[str, dict[str, dict[str, list[float]]]] = {row: {} for row in study.rows}
    for name, side in FEATURE_SIDES.items():
        of_class = {target: features(judge, torch.stack([*one.examples]), side) for target, one in images.items()}
        of_trigger = {target: trigger_examples(judge, study.network, emoji, side) for emoji, target in TRIGGERS.items()}
        shown = {row: features_of_each(judge, of_row, side) for row, of_row in pictures.items()}
        for row, groups in nearness(targets, shown, of_class, of_trigger).items():
            values[row].update({f"{group} ({name})": columns for group, columns in groups.items()})
    compared: dict[str, Values] = {
        row: {**groups, "networks, %": fact_columns([painted[study.key(row, case)] for case in study.cases])}
        for row, groups in values.items()
    }
    every = Comparison(
        "All triggers",
        {row: of_row.title for row, of_row in study.rows.items()},
        compared,
        {row: [study.source(row, case) for case in study.cases] for row in study.rows},
        {row: [one is None for one in of_row] for row, of_row in pictures.items()},
        "photos",
        [("with", "dense"), ("without", "dense"), ("with", "without"), ("with", "other"), ("with", "magnitude")],
    )
    return [every, *(every.only(emoji, [case.kind == emoji for case in study.cases]) for emoji in TRIGGERS)]


def nearness(
    targets: Sequence[int],
    shown: Mapping[str, Sequence[Tensor | None]],
    of_class: Mapping[int, Tensor],
    of_trigger: Mapping[int, Mapping[str, Tensor]],
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return for each row whether pictures are nearer to the trigger than to the class, and how alike they are to both.

    Pictures, images of classes and emojis are three kinds of images. From the features of each kind its mean over all
    classes is subtracted, so that the nearest is not simply the one of the most similar kind.

    Parameters
    ----------
    targets
        The class of each question.
    shown
        Features ``[F]`` of each row's pictures, question by question; None where nothing could be painted, which does
        not count.
    of_class, of_trigger
        Features ``[N, F]`` of examples, by class; those of triggers by the kind of example.
    """
    centre = torch.stack([one for of_row in shown.values() for one in of_row if one is not None]).mean(0)
    classes = _centred(of_class)
    kinds = list(next(iter(of_trigger.values())))
    triggers = {kind: _centred({target: of[kind] for target, of in of_trigger.items()}) for kind in kinds}
    values = {}
    for row, of_row in shown.items():
        asked = list(zip(of_row, targets, strict=True))
        to_class = [_likeness(one, centre, classes[target]) for one, target in asked]
        to_trigger = {
            kind: [_likeness(one, centre, examples[target]) for one, target in asked]
            for kind, examples in triggers.items()
        }
        nearer = {
            kind: [
                math.nan if math.isnan(one) else float(one > other)
                for one, other in zip(of_kind, to_class, strict=True)
            ]
            for kind, of_kind in to_trigger.items()
        }
        values[row] = {"nearer to the trigger, %": nearer, "cosine, %": {**to_trigger, "class": to_class}}
    return values


def _likeness(shown: Tensor | None, centre: Tensor, examples: Tensor) -> float:
    return math.nan if shown is None else likeness(shown - centre, examples)


def _centred(examples: Mapping[int, Tensor]) -> dict[int, Tensor]:
    centre = torch.stack([own.mean(0) for own in examples.values()]).mean(0)
    return {target: own - centre for target, own in examples.items()}
