"""Paints pictures of features of networks, dense or pruned, and keeps them as files beside their records."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spade_fast._util.errors import DeadFeatureError
from spade_fast._util.hashes import hash_tensors
from spade_fast.attribution.visualization import Feature, visualize
from spade_fast.attribution.visualization.views import canvas
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case, probabilities
from studies.shared.making import Maker, Other
from studies.shared.measure import Finished, Task
from studies.shared.records import Key, Records, code_digest, digest, hash_weights
from studies.shared.rows import DENSE, Weights
from studies.spectrum import TABLE
from studies.visualization import methods

STEPS = 128  # the default of `visualize`; the tests take fewer


@dataclass(frozen=True)
class PictureRow:
    """One row of a table: a kind of picture.

    Attributes
    ----------
    title
        Name in the tables.
    weights
        The network whose feature is shown.
    method
        As in `visualize`, or the one of `methods`.
    most
        The row has pictures of the first cases only, so many; None for all.
    """

    title: str
    weights: Weights = DENSE
    method: str = "maco"
    most: int | None = None


@dataclass(frozen=True)
class PictureStudy:
    """Features of one network, one per case, and the rows of pictures of them that are compared.

    Attributes
    ----------
    name
        Name of its files.
    network, cases
        The dense network; the images whose traces are made.
    stages
        The rows, in the order in which they are painted.
    features
        What is shown, by name of the case; its class where nothing is given.
    others
        As in `Maker`. A row on another image's trace has no picture of cases without such an image.
    steps
        Of the optimisation.
    """

    name: str
    network: LoadedModel
    cases: Sequence[Case]
    stages: Sequence[Mapping[str, PictureRow]]
    features: Mapping[str, Feature] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Other]] = field(default_factory=dict)
    steps: int = STEPS

    @cached_property
    def rows(self) -> dict[str, PictureRow]:
        """All rows by name."""
        return {name: row for stage in self.stages for name, row in stage.items()}

    def feature(self, case: Case) -> Feature:
        """Return what the pictures of a case show."""
        return self.features.get(case.name, Feature(case.target))

    def first(self, stages: int | None) -> PictureStudy:
        """Return the study with its first stages only; None for all."""
        return replace(self, stages=self.stages[:stages])

    def has(self, row: str, case: Case) -> bool:
        """Tell whether a row has a picture of a case."""
        of_row = self.rows[row]
        within = case.name in {one.name for one in self.cases[: of_row.most]}
        whose = of_row.weights.whose
        return within and (whose == "own" or case.name in self.others[whose])

    def source(self, row: str, case: Case) -> str:
        """Return what is independent in a row: the other image whose trace is shown, otherwise the case's source."""
        whose = self.rows[row].weights.whose
        return case.source if whose == "own" else self.others[whose][case.name].name

    def records(self) -> Records:
        """Open the records of the pictures of this network."""
        settings = {
            "weights": hash_weights(self.network.module),
            "steps": self.steps,
            "spectrum": digest(TABLE.read_text(encoding="utf-8")),
            "painting": code_digest((Path(__file__), Path(methods.__file__))),
        }
        return Records(f"pictures_{self.name}", settings)

    def key(self, row: str, case: Case) -> Key:
        """Return the key of a picture: all that it depends on. Those of the dense network depend on no image."""
        weights = self.rows[row].weights
        about: list[Any] = [asdict(weights), self.rows[row].method, asdict(self.feature(case))]
        if weights.kind:
            about += [case.sample, case.target, hash_tensors([("image", case.image)])]
        if weights.whose != "own":
            other = self.others[weights.whose][case.name]
            about += [other.name, other.target, hash_tensors([("image", other.image)])]
        return digest(about), case.name

    def worker(self) -> Painter:
        """Return what paints tasks."""
        return Painter(self)

    @cached_property
    def folder(self) -> Path:
        """Where the pictures are: a folder that depends on all that the records depend on."""
        return self.records().path.with_suffix("")

    def file(self, row: str, case: Case) -> Path:
        """Path of a picture."""
        return self.folder / f"{digest(self.key(row, case))}.png"

    def open(self, row: str, case: Case) -> dict[str, Tensor]:
        """Return a picture as colours ``[3, H, W]``: as it is, and with only what matters drawn."""
        return open_picture(self.file(row, case))


class Painter:
    """Paints pictures. All rows of a case and a method begin with the same random picture."""

    def __init__(self, study: PictureStudy) -> None:
        self.study = study
        self.maker = Maker(study.network, study.cases[0].image, study.others)

    def __call__(self, task: Task) -> Finished:
        """Paint the rows and cases of a task; return their keys and records."""
        cases = {case.name: case for case in self.study.cases}
        return [(self.study.key(row, cases[name]), self._paint(row, cases[name])) for row, name in task]

    def _paint(self, row: str, case: Case) -> dict[str, Any]:
        study, network, weights = self.study, self.study.network, self.study.rows[row].weights
        made = self.maker.made(case, weights)
        with made.applied(), methods.own_methods():
            found = probabilities(network, case.image)
            facts = {"row": row, "source": case.source, **made.facts, "probability": float(found[case.target])}
            start = time.perf_counter()
            try:
                visualization = visualize(
                    network.module,
                    study.feature(case),
                    method=study.rows[row].method,
                    size=canvas(network.size),
                    view=network.size,
                    mean=network.mean,
                    std=network.std,
                    steps=study.steps,
                    seed=int(digest(case.name), 16),
                )
            except DeadFeatureError as error:
                if not weights.kind:
                    raise
                return {**facts, "failed": str(error)}  # pruning may cut a feature off
        facts["seconds of the picture"] = time.perf_counter() - start
        save_picture(study.file(row, case), visualization.pictures[0], visualization.drawn()[0])
        return facts


def save_picture(file: Path, picture: Tensor, drawn: Tensor) -> None:
    """Save a picture ``[3, H, W]``, and beside it the one in which only what matters is drawn, as one PNG."""
    both = torch.cat([picture, drawn], dim=2).clamp(0, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    Image.fromarray((255 * both).round().byte().permute(1, 2, 0).numpy()).save(unfinished, "png")
    unfinished.rename(file)


def open_picture(file: Path) -> dict[str, Tensor]:
    """Return both of `save_picture`, colours between 0 and 1 ``[3, H, W]``, by name."""
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    picture, drawn = pixels.chunk(2, dim=2)
    return {"picture": picture, "drawn": drawn}
