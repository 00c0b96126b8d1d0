"""Measures a study: the scores of all its rows on all its cases, in several processes, each measurement once."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from rich.progress import Progress

from spade_fast._util.hashes import hash_tensors
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case
from studies.shared.making import Maker, Other
from studies.shared.photos import CONSOLE
from studies.shared.records import Key, Records, digest, hash_weights
from studies.shared.rows import Row, Rows
from studies.shared.scores import Scores

Score = Callable[[LoadedModel, Case, torch.Tensor], Scores]
Task = list[tuple[str, str]]  # names of rows and cases, all of one stage and source
Finished = list[tuple[Key, dict[str, Any]]]


S = TypeVar("S", bound="Measurable")


class Measurable(Protocol):
    """Rows, stage by stage, that are measured on cases."""

    @property
    def name(self) -> str:
        """Name of its files."""

    @property
    def cases(self) -> Sequence[Case]:
        """What each row is measured on."""

    @property
    def stages(self) -> Sequence[Mapping[str, Any]]:
        """The rows by name, in the order in which they are measured."""

    def first(self: S, stages: int | None) -> S:
        """Return the study with its first stages only; None for all."""

    def has(self, row: str, case: Case) -> bool:
        """Tell whether a row is measured on a case."""

    def records(self) -> Records:
        """Open the records."""

    def key(self, row: str, case: Case) -> Key:
        """Return the key of a measurement: all that it depends on and the records do not."""

    def worker(self) -> Callable[[Task], Finished]:
        """Return what measures tasks."""


@dataclass(frozen=True)
class Study:
    """Cases for one network, and the rows compared on them.

    Attributes
    ----------
    name, title
        Name of its files; what its tables show.
    network, cases
        The dense network, and the cases to score.
    stages
        The rows, in the order in which they are measured: each stage on all cases before the next one.
    score
        Returns the scores of a map.
    metric
        The score of the main column.
    others, neurons
        As in `Maker`.
    pairs
        Names of rows whose difference is reported.
    """

    name: str
    title: str
    network: LoadedModel
    cases: Sequence[Case]
    stages: Sequence[Rows]
    score: Score
    metric: str
    others: Mapping[str, Mapping[str, Other]] = field(default_factory=dict)
    neurons: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()

    @cached_property
    def rows(self) -> dict[str, Row]:
        """All rows by name."""
        return {name: row for stage in self.stages for name, row in stage.items()}

    @cached_property
    def images(self) -> dict[str, str]:
        """A short name for everything that is known about each case and the others it may meet."""
        found = {}
        for case in self.cases:
            tensors = {"image": case.image, "mask": case.mask, "rival": case.rival_mask}
            others = {whose: of[case.name] for whose, of in self.others.items() if case.name in of}
            tensors |= {f"other {whose}": other.image for whose, other in others.items()}
            named = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
            classes = [case.target, case.rival, [[other.name, other.target] for other in others.values()]]
            found[case.name] = digest([hash_tensors(named), classes])
        return found

    def first(self, stages: int | None) -> Study:
        """Return the study with its first stages only, and the pairs that they have; None for all."""
        rows = {name for stage in self.stages[:stages] for name in stage}
        pairs = [pair for pair in self.pairs if rows.issuperset(pair)]
        return replace(self, stages=self.stages[:stages], pairs=pairs)

    def has(self, row: str, case: Case) -> bool:
        """Every row is measured on all cases."""
        return True

    def records(self) -> Records:
        """Open the records of this network and score."""
        weights = hash_weights(self.network.module)
        return Records(self.name, {"weights": weights, "score": self.score.__name__, "neurons": list(self.neurons)})

    def key(self, row: str, case: Case) -> Key:
        """Return the key of a measurement: all of the row except its title, and all of the case."""
        settings = {name: value for name, value in asdict(self.rows[row]).items() if name != "title"}
        return digest(settings), case.name, self.images[case.name]

    def worker(self) -> Worker:
        """Return what scores tasks."""
        return Worker(self)


def measure(make_study: Callable[[], S], workers: int = 2, stages: int | None = None) -> tuple[S, Records]:
    """Measure what no earlier run has measured, in the first stages or in all; return the study and all records.

    Each process runs one thread, so that the numbers do not depend on how many there are.
    """
    torch.set_num_threads(1)
    study = make_study().first(stages)
    records = study.records()
    with Progress(console=CONSOLE) as progress:
        for number, stage in enumerate(study.stages):
            tasks = _tasks(study, stage, records)
            title = f"{study.name}, stage {number + 1} of {len(study.stages)}"
            bar = progress.add_task(title, total=len(tasks))
            for finished in _run(make_study, study, tasks, workers):
                for key, record in finished:
                    records.add(key, record)
                progress.advance(bar)
    return study, records


def _tasks(study: Measurable, stage: Mapping[str, Any], records: Records) -> list[Task]:
    tasks: dict[str, Task] = {}
    for case in study.cases:
        names = [name for name in stage if study.has(name, case)]
        missing = [(name, case.name) for name in names if study.key(name, case) not in records]
        if missing:
            tasks.setdefault(case.source, []).extend(missing)
    return list(tasks.values())


def _run(make_study: Callable[[], S], study: S, tasks: Sequence[Task], workers: int) -> Iterator[Finished]:
    if workers == 1 or len(tasks) < 2:
        yield from map(study.worker(), tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start, (make_study,)) as pool:
        yield from pool.imap_unordered(_in_process, tasks)


class Worker:
    """Measures tasks."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.maker = Maker(study.network, study.cases[0].image, study.others, study.neurons)

    def __call__(self, task: Task) -> Finished:
        """Return keys and records of the rows and cases of a task."""
        study, finished = self.study, []
        for case in study.cases:
            rows = {row: study.rows[row] for row, of_case in task if of_case == case.name}
            for name, maps, facts in self.maker.maps(case, rows):
                scored = {method: study.score(study.network, case, one) for method, one in _distinct(maps).items()}
                of_methods = {method: scored.get(method, next(iter(scored.values()))) for method in maps}
                metrics = next(iter(of_methods.values()))
                scores = {metric: {method: of[metric] for method, of in of_methods.items()} for metric in metrics}
                finished.append((study.key(name, case), {"row": name, "source": case.source, **facts, **scores}))
        return finished


def _distinct(maps: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out maps that are the same object, as those without a network are for all methods."""
    first = next(iter(maps.values()))
    if all(one is first for one in maps.values()):
        return dict(itertools.islice(maps.items(), 1))
    return dict(maps)


_worker: Callable[[Task], Finished] | None = None


def _start(make_study: Callable[[], Measurable]) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = make_study().worker()


def _in_process(task: Task) -> Finished:
    assert _worker is not None
    return _worker(task)
