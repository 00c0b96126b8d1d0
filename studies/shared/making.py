"""Makes the maps of all rows for a case: solves ladders, searches, applies weights, runs methods, averages."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from spade_fast import prepare_for_attribution
from spade_fast._util.errors import AssumptionWarning
from spade_fast.attribution import SmoothGrad, attribution_map, mean_map
from spade_fast.attribution.methods import Question
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.auto_sparsity import Search
from spade_fast.pruning.exchange import WeightsApplied
from spade_fast.pruning.goals import NOISY_COPIES, Goal, output_score, sample_goal
from spade_fast.pruning.ladders import Level
from spade_fast.pruning.pruned_layer import PrunedLayer
from studies.shared.cases import Case, probabilities
from studies.shared.ladders import Calibration, Ladders, Solved, make_ladders
from studies.shared.pathways import neuron_contributions, silenced_but, strongest
from studies.shared.plain_maps import PLAIN_MAPS
from studies.shared.rows import NOISE, Row, Rows, Weights
from studies.shared.signed_smoothgrad import signed_smoothgrad

_PATHWAY_SHARES = tuple(0.97**step for step in range(150))  # of the neurons to keep: from all to 1 %
_LADDERS_HELD = 12
LadderKey = tuple[str, Calibration, bool]  # whose it is, how it is made, and whether by exact OBS


@dataclass(frozen=True)
class Other:
    """Another image whose trace is tried: its name, input of the network and class."""

    name: str
    image: Tensor
    target: int


@dataclass(frozen=True)
class Made:
    """What is known about weights made for a case, a context that gives them to the network, and their ladder."""

    facts: dict[str, Any]
    applied: Callable[[], AbstractContextManager[object]]
    ladder: LadderKey | None = None


class Maker:
    """Makes the maps of rows. Ladders are kept for a while, since several cases need the same.

    Parameters
    ----------
    network, example
        The dense network and one of its inputs.
    others
        By the word for them in `Weights`: another image for each case, by the case's name.
    neurons
        Names or patterns of the modules whose inputs are the neurons of pathways.
    """

    def __init__(
        self,
        network: LoadedModel,
        example: Tensor,
        others: Mapping[str, Mapping[str, Other]] | None = None,
        neurons: Sequence[str] = (),
    ) -> None:
        self.network, self.others = network, others or {}
        names = [name for name, _ in network.module.named_modules()]
        self._neurons = [name for name in names if any(fnmatchcase(name, pattern) for pattern in neurons)]
        self.prepared = prepare_for_attribution(network.module, example)
        self._images: dict[str, Tensor] = {}
        self._searches: dict[Weights, Search] = {}
        self._ladders = lru_cache(maxsize=_LADDERS_HELD)(self._make_ladders)

    def maps(self, case: Case, rows: Rows) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        """Yield for each row its name, its map for each method, and what is known about its networks."""
        self._begin(case)
        wanted: dict[Weights, dict[tuple[str, str], None]] = defaultdict(dict)
        for one in rows.values():
            for source in one.sources():
                wanted[source.weights].update(dict.fromkeys((source.smooth, method) for method in one.methods))
        kinds = _kinds_by_ladder(wanted)
        made, found, seconds = {}, {}, {}
        for weights, maps in wanted.items():
            made[weights] = self._made(case, weights, kinds)
            with made[weights].applied():
                made[weights].facts.update(self._decision(case))
                for smooth, method in maps:
                    start = time.perf_counter()
                    found[weights, smooth, method] = self._map(case, method, smooth)
                    seconds[weights, smooth, method] = time.perf_counter() - start
        for name, one in rows.items():
            if one.plain:
                yield name, dict.fromkeys(one.methods, PLAIN_MAPS[one.plain](case.image)), {}
                continue
            of_methods = {method: _mean(one, method, found) for method in one.methods}
            networks = list(dict.fromkeys(source.weights for source in one.sources()))
            facts = _together([made[weights] for weights in networks])
            spent = sum(seconds[s.weights, s.smooth, method] for s in one.sources() for method in one.methods)
            yield name, of_methods, {**facts, "seconds of maps": spent / len(one.methods)}

    def made(self, case: Case, weights: Weights) -> Made:
        """Make single weights for a case."""
        self._begin(case)
        return self._made(case, weights, _kinds_by_ladder([weights]))

    def _begin(self, case: Case) -> None:
        self._searches = {}
        self._images = {case.sample: case.image, **{one.name: one.image for one in self._others_of(case)}}

    def _map(self, case: Case, method: str, smooth: str) -> Tensor:
        question = Question(self.prepared, case.image, case.target, self.network.black)
        if smooth == "signed":
            return signed_smoothgrad(method, question, SmoothGrad(noise=NOISE))
        return attribution_map(method, question, smooth=SmoothGrad(noise=NOISE) if smooth else None)

    @torch.no_grad()
    def _decision(self, case: Case) -> dict[str, Any]:
        found = self.prepared(case.image).softmax(1)[0]
        return {"probability": float(found[case.target]), "predicted": int(found.argmax()) == case.target}

    def _made(self, case: Case, weights: Weights, kinds: Mapping[LadderKey, frozenset[str]]) -> Made:
        start = time.perf_counter()
        if not weights.kind:
            return Made({}, nullcontext)
        if weights.kind == "pathway":
            made = self._pathway(case, weights)
        else:
            solved = self._solved(case, weights, kinds)
            start = time.perf_counter()
            made = self._pruned(case, weights, solved.ladders)
            made.facts["seconds of the ladder"] = solved.seconds
        made.facts["seconds of the search"] = time.perf_counter() - start
        return made

    def _solved(self, case: Case, weights: Weights, kinds: Mapping[LadderKey, frozenset[str]]) -> Solved:
        sample = case.sample if weights.whose == "own" else self.others[weights.whose][case.name].name
        return self._ladders(sample, kinds[_ladder_key(weights)], weights.calibration)[weights.kind]

    def _make_ladders(self, sample: str, kinds: frozenset[str], calibration: Calibration) -> dict[str, Solved]:
        return make_ladders(self.network, self._images[sample], sample, kinds, calibration)

    def _pruned(self, case: Case, weights: Weights, ladders: Ladders) -> Made:
        facts: dict[str, Any] = {}
        if weights.keep is None:
            given = weights.sparsity
            shares = dict(given) if isinstance(given, tuple) else dict.fromkeys(ladders, given)
            levels = {name: _level_at(ladder, shares.get(name, 0.0)) for name, ladder in ladders.items()}
        else:
            search = replace(weights, keep=None)  # traces that keep different shares have it in common
            if search not in self._searches:
                self._searches[search] = Search(ladders, self._goal(case, weights), self._applied)
            (result,) = self._searches[search].run([weights.keep])
            levels = {name: ladders[name][index] for name, index in result.levels.items()}
            facts = {"limit": result.auto.error, "kept": result.auto.kept}
        reports = [level.report for level in levels.values()]
        facts["sparsity"] = sum(one.reached * math.prod(one.shape) for one in reports)
        facts["sparsity"] /= sum(math.prod(one.shape) for one in reports)
        facts["layer error"] = fmean(report.measured_error for report in reports)
        pruned = [level.pruned for level in levels.values() if level.pruned is not None]
        return Made(facts, lambda: self._applied(pruned), _ladder_key(weights))

    def _applied(self, pruned: Sequence[PrunedLayer]) -> AbstractContextManager[object]:
        return WeightsApplied(self.network.module, pruned)

    def _goal(self, case: Case, weights: Weights) -> Goal:
        """Return what is to be kept: of the image itself, and of noisy copies if the calibration is noisy."""
        image, target, name = case.image, case.target, case.sample
        if weights.goal == "rival":
            assert case.rival is not None
            target = case.rival
        elif weights.goal == "theirs":
            other = self.others[weights.whose][case.name]
            image, target, name = other.image, other.target, other.name
        score = output_score(self.network.module, image, target)
        if not weights.calibration.noise:
            return sample_goal(name, score, image)
        copies = weights.calibration.augmenter(self.network).noisy(image, name, NOISY_COPIES)
        with warnings.catch_warnings():  # noise may destroy the class; then the copies do not count
            warnings.simplefilter("ignore", AssumptionWarning)
            return sample_goal(name, score, image, [copy[None] for copy in copies])

    def _pathway(self, case: Case, weights: Weights) -> Made:
        contributions = neuron_contributions(self.prepared, case.image, case.target, self._neurons)
        least = weights.keep * float(probabilities(self.network, case.image)[case.target])

        def keeps(share: float) -> bool:
            with silenced_but(self.prepared, strongest(contributions, share)):
                return self._decision(case)["probability"] >= least

        share = smallest_that_holds(_PATHWAY_SHARES, keeps)
        neurons = strongest(contributions, share)
        facts = {"sparsity": 1 - share, "kept": keeps(share)}
        return Made(facts, lambda: silenced_but(self.prepared, neurons))

    def _others_of(self, case: Case) -> Iterator[Other]:
        return (of_case[case.name] for of_case in self.others.values() if case.name in of_case)


def smallest_that_holds(descending: Sequence[float], holds: Callable[[float], bool]) -> float:
    """Return the last of descending values that holds, by bisection; the first if none does."""
    held, failed = 0, len(descending)
    while failed - held > 1:
        middle = (held + failed) // 2
        held, failed = (middle, failed) if holds(descending[middle]) else (held, middle)
    return descending[held]


def _ladder_key(weights: Weights) -> LadderKey:
    return weights.whose, weights.calibration, weights.kind == "exact"


def _kinds_by_ladder(wanted: Iterable[Weights]) -> dict[LadderKey, frozenset[str]]:
    """Return which ladders are made from the same calibration."""
    kinds: dict[LadderKey, set[str]] = defaultdict(set)
    for weights in wanted:
        if weights.kind not in ("", "pathway"):
            kinds[_ladder_key(weights)].add(weights.kind)
    return {key: frozenset(of_key) for key, of_key in kinds.items()}


def _level_at(ladder: Sequence[Level], sparsity: float) -> Level:
    return next(level for level in ladder if level.report.sparsity == sparsity)


def _mean(row: Row, method: str, found: Mapping[tuple[Weights, str, str], Tensor]) -> Tensor:
    groups = [_mean_of([found[source.weights, source.smooth, method] for source in group]) for group in row.groups]
    return _mean_of(groups)


def _mean_of(maps: Sequence[Tensor]) -> Tensor:
    return mean_map(maps) if len(maps) > 1 else maps[0]


def _together(made: Sequence[Made]) -> dict[str, Any]:
    """Average what is known about several networks, and add their seconds; the dense one only counts if it is alone."""
    pruned = [one.facts for one in made if "sparsity" in one.facts] or [one.facts for one in made]
    names = dict.fromkeys(name for facts in pruned for name in facts)
    together = {name: fmean(float(facts[name]) for facts in pruned if name in facts) for name in names}
    ladders = {one.ladder: one.facts["seconds of the ladder"] for one in made if one.ladder is not None}
    together["seconds of the ladder"] = sum(ladders.values())
    together["seconds of the search"] = sum(facts.get("seconds of the search", 0.0) for facts in pruned)
    return together
