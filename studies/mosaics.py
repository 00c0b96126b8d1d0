"""The grid pointing game on the network as it was published: does a map find the cell of the class in a mosaic?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spade_fast.inputs.networks import LoadedModel, load_model
from studies.shared.cases import Case, clean_image
from studies.shared.making import Other
from studies.shared.measure import Study
from studies.shared.photos import Photo, imagenet_photos
from studies.shared.rows import (
    DENSE,
    EIGHT,
    EQUAL,
    SMOOTH,
    Row,
    Source,
    fixed,
    row,
    two_levels,
)
from studies.shared.scores import localisation

_MOSAICS = 10


def study() -> Study:
    """Set up the study."""
    network = load_model("demo")
    cases = mosaic_cases(network, imagenet_photos(), _MOSAICS)
    first = {case.sample: case for case in reversed(cases)}
    samples = list(dict.fromkeys(case.sample for case in cases))
    following = dict(zip(samples, [*samples[1:], samples[0]], strict=True))
    others = {}
    for case in cases:
        other = first[following[case.sample]]
        others[case.name] = Other(other.sample, other.image, other.target)
    return Study(
        name="mosaics",
        title="Grid pointing game: % of a map inside the target's cell of 2 x 2, chance 25",
        network=network,
        cases=cases,
        stages=[_rows()],
        score=localisation,
        metric="energy",
        others={"another": others},
        pairs=[("two", "dense"), ("two", "smooth"), ("two", "another"), ("two", "magnitude"), ("fast", "dense")],
    )


def _rows() -> dict[str, Row]:
    traces = two_levels("sparsegpt")
    return {
        "dense": row("dense network", Source(DENSE), methods=EIGHT),
        "smooth": row("SmoothGrad", SMOOTH),
        "fast": row(f"FastSPADE, {EQUAL:.0%}", fixed("sparsegpt", EQUAL), methods=EIGHT),
        "auto": row("FastSPADE, automatic", traces[0], methods=EIGHT),
        "two": row("FastSPADE, two levels", *traces, methods=EIGHT),
        "another": row("control: another mosaic's trace", *two_levels("sparsegpt", whose="another")),
        "magnitude": row("control: magnitude pruning", *two_levels("magnitude")),
    }


def mosaic_cases(network: LoadedModel, photos: Sequence[Photo], count: int) -> list[Case]:
    """Ask for each cell of 2 x 2 mosaics where the evidence lies for the class that the network predicts for its photo.

    The four photos of a mosaic have different classes (Böhle, Fritz, Schiele, CVPR 2021, arXiv 2104.00032). A mosaic is
    as large as one photo: each cell is a photo at half its size.
    """
    images = torch.cat([clean_image(network, photo) for photo in photos])
    with torch.no_grad():
        probabilities = network.module(images).softmax(1)
    classes = probabilities.argmax(1)
    halves = torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
    rng = np.random.default_rng(0)
    side = halves.shape[-1]
    cases = []
    for number in range(count):
        chosen: list[int] = []
        for index in rng.permutation(len(photos)).tolist():
            if len(chosen) < 4 and classes[index] not in classes[chosen]:
                chosen.append(index)
        rows = [torch.cat(list(halves[chosen[row : row + 2]]), dim=2) for row in (0, 2)]
        image = torch.cat(rows, dim=1)[None]
        for cell, index in enumerate(chosen):
            mask = torch.zeros(image.shape[2:], dtype=torch.bool)
            top, left = side * (cell // 2), side * (cell % 2)
            mask[top : top + side, left : left + side] = True
            source = f"mosaic {number}"
            cases.append(Case(f"{source} cell {cell}", source, source, str(cell), image, int(classes[index]), mask))
    return cases
