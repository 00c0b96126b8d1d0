"""Which of two crops of a photo excites a unit, told from the unit's picture? A network answers instead of people.

After the human study of SPADE (arXiv 2310.04519). The network that answers is independent of the one with the unit: it
takes the crop whose features are nearer to those of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spade_fast import Feature, prepare_for_attribution
from spade_fast.attribution import attribution_map
from spade_fast.attribution.methods import Question
from spade_fast.inputs.networks import LoadedModel
from studies.networks.lite import efficientnet_lite
from studies.shared.cases import Case, clean_image, undo_normalisation
from studies.shared.making import Other
from studies.shared.pathways import neuron_contributions
from studies.shared.photos import Photo, imagenet_photos
from studies.shared.rows import EQUAL, Weights
from studies.visualization.comparing import Comparison
from studies.visualization.judges import Judge, features, likeness
from studies.visualization.painting import PictureRow, PictureStudy
from studies.visualization.recognition import KEEP, PHOTO, all_photos, class_photos

ABOUT = """**No people were asked.** EfficientNet-Lite2 answers instead: it sees the picture of a unit and two crops of
a photo, the one that excites the unit most (in the dense network) and, apart from it, the one that does least. It takes
the crop whose features are nearer to the picture's. Chance is 50 %. A unit that pruning has cut off has no picture and
counts as a guess.
"""
LAYER, ACTIVATED = "_bn1", "_avg_pooling"  # the layer of the units, and the module that takes their activations
GRID, PARTS = 5, 3  # crops per side of a photo; a crop's side is this part of the photo's
NETWORKS: Mapping[str, tuple[Callable[[], LoadedModel], int]] = {
    "lite0": (partial(efficientnet_lite, 0), 48),
    "lite1": (partial(efficientnet_lite, 1), 30),
}  # and the number of units, so that each takes less than an hour on two cores


def study(which: str) -> PictureStudy:
    """Set up the study of one of the networks."""
    make_network, count = NETWORKS[which]
    network = make_network()
    photos = class_photos(network, all_photos(), len(imagenet_photos()))
    return unit_study(which, network, dict(list(photos.items())[:count]), LAYER, ACTIVATED)


STUDIES: Mapping[str, Callable[[], PictureStudy]] = {which: partial(study, which) for which in NETWORKS}


def unit_study(
    name: str, network: LoadedModel, photos: Mapping[int, Sequence[Photo]], layer: str, activated: str
) -> PictureStudy:
    """Set up a study of one unit for the first photo of each class: the channel that contributes most to the class.

    A channel is taken for one photo only.
    """
    cases: list[Case] = []
    units: dict[str, Feature] = {}
    taken: set[int] = set()
    for target, (photo, *_) in photos.items():
        image = clean_image(network, photo)
        contributions = neuron_contributions(network.module, image, target, [activated])[activated]
        order = contributions[0].flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
        channel = next(one for one in order if one not in taken)
        taken.add(channel)
        cases.append(Case(f"channel {channel} in {photo.name}", photo.name, photo.name, PHOTO, image, target))
        units[cases[-1].name] = Feature(channel, layer=layer)
    another = {
        case.name: Other(following.sample, following.image, following.target)
        for case, following in zip(cases, [*cases[1:], cases[0]], strict=True)
    }
    automatic = Weights("sparsegpt", keep=KEEP)
    stages = [
        {"dense": PictureRow("dense network"), "auto": PictureRow("own trace, automatic", automatic)},
        {
            "half": PictureRow(f"own trace, {EQUAL:.0%}", Weights("sparsegpt", sparsity=EQUAL)),
            "another": PictureRow(
                "trace of another photo", Weights("sparsegpt", keep=KEEP, whose="another", goal="theirs")
            ),
        },
    ]
    return PictureStudy(f"choice_{name}", network, cases, stages, units, {"another": another})


def crops(colours: Tensor) -> tuple[Tensor, list[tuple[slice, slice]]]:
    """Cut a photo ``[3, H, W]`` into overlapping crops ``[N, 3, h, w]``, with the place of each."""
    height, width = (size // PARTS for size in colours.shape[1:])
    places = []
    for row in range(GRID):
        for column in range(GRID):
            top = row * (colours.shape[1] - height) // (GRID - 1)
            left = column * (colours.shape[2] - width) // (GRID - 1)
            places.append((slice(top, top + height), slice(left, left + width)))
    return torch.stack([colours[:, rows, columns] for rows, columns in places]), places


def choose_pair(activations: Tensor, places: Sequence[tuple[slice, slice]]) -> tuple[int, int]:
    """Return the crop that excites a unit most and, of those that do not overlap it, the one that does least.

    Parameters
    ----------
    activations
        Of the unit, ``[N]``.
    """
    strong = int(activations.argmax())
    apart = [number for number, place in enumerate(places) if not _overlap(place, places[strong])]
    return strong, min(apart, key=lambda number: float(activations[number]))


def _overlap(one: tuple[slice, slice], other: tuple[slice, slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


@torch.no_grad()
def unit_activations(network: LoadedModel, layer: str, cut: Tensor) -> Tensor:
    """Return the mean activation of each channel of a layer ``[N, C]`` in crops ``[N, 3, h, w]`` enlarged to photos."""
    judge = Judge(network)
    found: list[Tensor] = []

    def read(module: nn.Module, inputs: object, output: Tensor) -> None:
        found.append(output.flatten(2).mean(2))

    handle = network.module.get_submodule(layer).register_forward_hook(read)
    try:
        for one in cut.split(1):
            network.module(judge.sees(one))
    finally:
        handle.remove()
    return torch.cat(found)


class Questions(NamedTuple):
    """What is asked about the units of a study, one by one.

    Attributes
    ----------
    pairs
        The crops to choose from, the one that excites the unit first, ``[units, 2, 3, h, w]``.
    natural
        The crop of another photo that excites it most, ``[units, 3, h, w]``.
    by_map
        1 where the dense network's saliency map of the class has more of its sum in the first crop, otherwise 0.
    """

    pairs: Tensor
    natural: Tensor
    by_map: list[float]


def questions(study: PictureStudy) -> Questions:
    """Choose the crops, by the dense network."""
    layer = study.feature(study.cases[0]).layer
    assert layer is not None
    photos = [undo_normalisation(study.network, case.image[0]) for case in study.cases]
    cut, places = torch.stack([crops(photo)[0] for photo in photos]), crops(photos[0])[1]
    excited = torch.stack([unit_activations(study.network, layer, of_photo) for of_photo in cut])  # [units, N, C]
    prepared = prepare_for_attribution(study.network.module, study.cases[0].image)
    pairs, natural, by_map = [], [], []
    for number, case in enumerate(study.cases):
        channel = study.feature(case).index
        assert isinstance(channel, int)
        of_unit = excited[:, :, channel]
        strong, weak = choose_pair(of_unit[number], places)
        pairs.append(cut[number, [strong, weak]])
        elsewhere = of_unit.clone()
        elsewhere[number] = -torch.inf
        natural.append(cut.flatten(0, 1)[elsewhere.argmax()])
        question = Question(prepared, case.image, case.target, study.network.black)
        first, second = (attribution_map("saliency", question)[places[crop]].sum() for crop in (strong, weak))
        by_map.append(float(first > second))
    return Questions(torch.stack(pairs), torch.stack(natural), by_map)


def compare(study: PictureStudy, judge: Judge) -> Comparison:
    """Compare the rows: how often is the picture nearer to the crop that excites the unit?

    Beside them, the crop of another photo takes the place of the picture, and the saliency map chooses.
    """
    asked = questions(study)
    pairs = torch.stack([features(judge, pair) for pair in asked.pairs])  # [units, 2, F]
    painted = study.records()
    titles = {row: of_row.title for row, of_row in study.rows.items()}
    values = {}
    for row in study.rows:
        shown = [
            None if "failed" in painted[study.key(row, case)] else study.open(row, case)["picture"]
            for case in study.cases
        ]
        seen = [None if one is None else features(judge, one[None])[0] for one in shown]
        values[row] = _values(choices(seen, pairs), asked.by_map)
    titles["natural"] = "crop of another photo that excites it most"
    values["natural"] = _values(choices(list(features(judge, asked.natural)), pairs), asked.by_map)
    titles["map"] = "saliency map of the class, dense network"
    values["map"] = _values(asked.by_map, asked.by_map)
    wanted = [("auto", "dense"), ("half", "dense"), ("auto", "another"), ("natural", "dense")]
    known = [pair for pair in wanted if set(pair) <= set(values)]
    return Comparison("Forced choice", titles, values, [case.name for case in study.cases], "units", known)


def _values(right: Sequence[float], by_map: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    agrees = [1 - abs(mine - other) for mine, other in zip(right, by_map, strict=True)]
    return {"forced choice, %": {"right": list(right), "as the saliency map": agrees}}


def choices(shown: Sequence[Tensor | None], pairs: Tensor) -> list[float]:
    """Return 1 where a picture is nearer to the first crop of its pair, 0 where to the second, and 1/2 without picture.

    From the features of pictures and of crops their own mean is subtracted: what all have in common tells nothing.

    Parameters
    ----------
    shown
        Features ``[F]`` of the pictures.
    pairs
        Features of the crops, ``[len(shown), 2, F]``.
    """
    known = [one for one in shown if one is not None]
    if not known:
        return [0.5] * len(shown)
    centre, of_crops = torch.stack(known).mean(0), pairs - pairs.flatten(0, 1).mean(0)
    found = []
    for one, (first, second) in zip(shown, of_crops, strict=True):
        if one is None:
            found.append(0.5)
        else:
            found.append(float(likeness(one - centre, first[None]) > likeness(one - centre, second[None])))
    return found
