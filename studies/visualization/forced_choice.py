"""Which of two crops of a photo excites a unit, told from the unit's picture? A network answers instead of people.

After the human study of SPADE (arXiv 2310.04519). The network that answers is independent of the one with the unit: it
takes the crop whose features are nearer to those of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast import Feature, prepare_for_attribution
from spade_fast.attribution import attribution_map
from spade_fast.attribution.methods import Question
from spade_fast.attribution.visualization.units import read_units
from spade_fast.inputs.networks import LoadedModel
from studies.networks.lite import efficientnet_lite
from studies.shared.cases import Case, clean_image, undo_normalisation
from studies.shared.making import Other
from studies.shared.photos import Photo, imagenet_photos
from studies.shared.rows import EQUAL, Weights
from studies.visualization.comparing import Comparison
from studies.visualization.judges import FEATURE_SIDES, Judge, features, features_of_each, likeness
from studies.visualization.painting import PictureRow, PictureStudy
from studies.visualization.recognition import KEEP, PHOTO, all_photos, class_photos, pictures_of

ABOUT = """**No people were asked.** EfficientNet-Lite2 answers instead: it sees the picture of a unit and two crops of
a photo, the one that excites the unit most and, apart from it, the one that does least. It takes the crop whose
features (after the 19th of its 21 blocks) are nearer to the picture's: of all three whole, or reduced to 64 pixels.
Unit and crops are chosen by the dense network, which favours its row. Chance is 50 %; the picture of another unit tells
whether that is so here, the crop of another photo how well the network can choose. A unit of which *nothing* could be
*painted*, because pruning has cut it off, counts as a guess, 1/2.
"""
LAYER = "_bn1"  # whose channels are the units
# Of the judge. Of its blocks and its last features, the one by which crops of other photos choose best for the units of
# Lite1, which the study of Lite0 does not report.
JUDGED_LAYER = "_blocks.18"
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
    return unit_study(which, network, dict(list(photos.items())[:count]), LAYER)


STUDIES: Mapping[str, Callable[[], PictureStudy]] = {which: partial(study, which) for which in NETWORKS}


def unit_study(name: str, network: LoadedModel, photos: Mapping[int, Sequence[Photo]], layer: str) -> PictureStudy:
    """Set up a study of one unit for the first photo of each class: the channel that contributes most to the class.

    A channel is taken for one photo only. Channels that speak against the class are not taken.
    """
    cases: list[Case] = []
    shown: dict[str, Feature] = {}
    taken: set[int] = set()
    for target, (photo, *_) in photos.items():
        image = clean_image(network, photo)
        units = read_units(network.module, layer, image, target)
        channel = next(unit for unit in units.strongest(len(units.maps)) if unit not in taken)
        taken.add(channel)
        cases.append(Case(f"channel {channel} in {photo.name}", photo.name, photo.name, PHOTO, image, target))
        shown[cases[-1].name] = Feature(channel, layer=layer)
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
    return PictureStudy(f"choice_{name}", network, cases, stages, shown, {"another": another})


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


def choose_pair(maps: Tensor, places: Sequence[tuple[slice, slice]]) -> tuple[int, int]:
    """Return the crop that excites a unit most and, of those that do not overlap it, the one that does least.

    Of several that do not excite it at all, the one with the lowest map.

    Parameters
    ----------
    maps
        Means of the unit's rectified map and of the map itself at the place of each crop, ``[2, N]``.
    """
    rectified, plain = maps.tolist()
    strong = max(range(len(places)), key=rectified.__getitem__)
    apart = [number for number, place in enumerate(places) if not _overlap(place, places[strong])]
    return strong, min(apart, key=lambda number: (rectified[number], plain[number]))


def _overlap(one: tuple[slice, slice], other: tuple[slice, slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def means_at(maps: Tensor, places: Sequence[tuple[slice, slice]], size: tuple[int, int]) -> Tensor:
    """Return the means of feature maps ``[C, h, w]`` at places of a photo of `size`, ``[C, N]``."""
    covered = torch.zeros(len(places), *size)
    for one, place in zip(covered, places, strict=True):
        one[place] = 1
    _, height, width = maps.shape
    shares = F.adaptive_avg_pool2d(covered, (height, width))
    return torch.einsum("chw,nhw->cn", maps, shares / shares.sum((1, 2), keepdim=True))


@dataclass(frozen=True)
class Questions:
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
    """Choose the crops by the dense network: the unit's map in the whole photo, at the places of the crops."""
    layer = study.feature(study.cases[0]).layer
    assert layer is not None
    network = study.network
    photos = [undo_normalisation(network, case.image[0]) for case in study.cases]
    cut, places = torch.stack([crops(photo)[0] for photo in photos]), crops(photos[0])[1]
    found = [read_units(network.module, layer, case.image, case.target).maps for case in study.cases]
    plain = torch.stack([means_at(maps, places, network.size) for maps in found])  # [photos, C, N]
    rectified = torch.stack([means_at(maps.clamp(min=0), places, network.size) for maps in found])
    prepared = prepare_for_attribution(network.module, study.cases[0].image)
    pairs, natural, by_map = [], [], []
    for number, case in enumerate(study.cases):
        channel = study.feature(case).index
        assert isinstance(channel, int)
        strong, weak = choose_pair(torch.stack([rectified[number, channel], plain[number, channel]]), places)
        pairs.append(cut[number, [strong, weak]])
        elsewhere = rectified[:, channel].clone()
        elsewhere[number] = -torch.inf
        natural.append(cut.flatten(0, 1)[elsewhere.argmax()])
        question = Question(prepared, case.image, case.target, network.black)
        first, second = (attribution_map("saliency", question)[places[crop]].sum() for crop in (strong, weak))
        by_map.append(float(first > second))
    return Questions(torch.stack(pairs), torch.stack(natural), by_map)


def compare(study: PictureStudy, judge: Judge) -> Comparison:
    """Compare the rows: how often is the picture nearer to the crop that excites the unit?

    Beside them, the dense network's picture of the next unit and the crop of another photo take the place of the
    picture, and the saliency map chooses.
    """
    asked = questions(study)
    pictures = {row: pictures_of(study, row) for row in study.rows}
    right: dict[str, dict[str, list[float]]] = {}
    for name, side in FEATURE_SIDES.items():
        pairs = torch.stack([features(judge, pair, side) for pair in asked.pairs])  # [units, 2, F]
        shown = {row: features_of_each(judge, of_row, side) for row, of_row in pictures.items()}
        shown["other unit"] = [*shown["dense"][1:], shown["dense"][0]]
        shown["natural"] = list(features(judge, asked.natural, side))
        right[name] = {row: choices(of_row, pairs) for row, of_row in shown.items()}
        right[name]["map"] = asked.by_map
    titles = {
        **{row: of_row.title for row, of_row in study.rows.items()},
        "other unit": "control: picture of another unit, dense network",
        "natural": "crop of another photo that excites it most",
        "map": "saliency map of the class, dense network",
    }
    values = {
        row: {
            "right, %": {name: of_side[row] for name, of_side in right.items()},
            "as the saliency map, %": {name: _agrees(of_side[row], asked.by_map) for name, of_side in right.items()},
        }
        for row in titles
    }
    units = [case.name for case in study.cases]
    sources = {row: [study.source(row, case) for case in study.cases] if row in study.rows else units for row in titles}
    unpainted = {row: [one is None for one in of_row] for row, of_row in pictures.items()}
    wanted = [("auto", "dense"), ("half", "dense"), ("auto", "another"), ("dense", "other unit"), ("natural", "dense")]
    pairs_of_rows = [pair for pair in wanted if titles.keys() >= set(pair)]
    return Comparison("Forced choice", titles, values, sources, unpainted, "units", pairs_of_rows)


def _agrees(right: Sequence[float], by_map: Sequence[float]) -> list[float]:
    return [1 - abs(mine - other) for mine, other in zip(right, by_map, strict=True)]


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
