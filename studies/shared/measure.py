"""Measures a study: the scores of all its rows on all its cases, in several processes, each measurement once."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich.progress import Progress

from spade_fast._util.hashes import hash_tensors
from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case
from studies.shared.making import Maker, Other
from studies.shared.photos import CONSOLE
from studies.shared.records import Key, Records, digest
from studies.shared.rows import Row, Rows
from studies.shared.scores import Scores

Score = Callable[[LoadedModel, Case, torch.Tensor], Scores]


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

    def records(self) -> Records:
        """Open the records of this network and score."""
        weights = hash_tensors([*self.network.module.named_parameters(), *self.network.module.named_buffers()])
        return Records(self.name, {"weights": weights, "score": self.score.__name__, "neurons": list(self.neurons)})

    def key(self, row: str, case: Case) -> Key:
        """Return the key of a measurement: all of the row except its title, and all of the case."""
        settings = {name: value for name, value in asdict(self.rows[row]).items() if name != "title"}
        return digest(settings), case.name, self.images[case.name]


def measure(make_study: Callable[[], Study], workers: int = 2) -> tuple[Study, Records]:
    """Score what no earlier run has scored; return the study and all records.

    Each process runs one thread, so that the numbers depend neither on their number nor on the machine's cores.
    """
    study = make_study()
    records = study.records()
    with Progress(console=CONSOLE) as progress:
        for number, stage in enumerate(study.stages):
            tasks = [(number, source) for source in _sources(study) if _missing(study, records, number, source)]
            bar = progress.add_task(f"{study.name}, stage {number + 1} of {len(study.stages)}", total=len(tasks))
            for of_task in _run(make_study, study, tasks, workers):
                for key, record in of_task:
                    if key not in records:
                        records.add(key, record)
                progress.advance(bar)
            assert all((study.key(name, case)) in records for name in stage for case in study.cases)
    return study, records


Task = tuple[int, str]
Finished = list[tuple[Key, dict[str, Any]]]


def _sources(study: Study) -> list[str]:
    return list(dict.fromkeys(case.source for case in study.cases))


def _missing(study: Study, records: Records, stage: int, source: str) -> bool:
    cases = [case for case in study.cases if case.source == source]
    return any(study.key(name, case) not in records for case in cases for name in study.stages[stage])


def _run(make_study: Callable[[], Study], study: Study, tasks: Sequence[Task], workers: int) -> Iterator[Finished]:
    if workers == 1 or len(tasks) < 2:
        worker = Worker(study)
        yield from map(worker, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start, (make_study,)) as pool:
        yield from pool.imap_unordered(_in_process, tasks)


class Worker:
    """Measures tasks: the rows of a stage on all cases of a source."""

    def __init__(self, study: Study) -> None:
        torch.set_num_threads(1)
        self.study = study
        self.maker = Maker(study.network, study.cases[0].image, study.others, study.neurons)

    def __call__(self, task: Task) -> Finished:
        """Return the keys and records of a task; what earlier runs have measured is left out."""
        study, records = self.study, self.study.records()
        finished: Finished = []
        for case in (case for case in study.cases if case.source == task[1]):
            rows = {name: row for name, row in study.stages[task[0]].items() if study.key(name, case) not in records}
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


_worker: Worker | None = None


def _start(make_study: Callable[[], Study]) -> None:
    global _worker
    _worker = Worker(make_study())


def _in_process(task: Task) -> Finished:
    assert _worker is not None
    return _worker(task)
