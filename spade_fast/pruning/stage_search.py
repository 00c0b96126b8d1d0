"""The search for the sparsity of each stage of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from spade_fast._util.progress import Progress
from spade_fast.pruning.tuning_result import Trial
from spade_fast.pruning.tuning_samples import Choice, Samples, mean

_Key = tuple[float, ...]  # the sparsity of each stage


class StageSearch:
    """Goes through stages of layers, and gives each the sparsity with the best score that keeps enough.

    Parameters
    ----------
    stages
        Names of the layers of each stage, in the order of the search.
    sizes
        Number of weights of each of these layers, in the order of the result.
    shares
        The sparsities to try, in ascending order, from 0; each layer's ladder has these levels.
    keep
        Mean share of the dense scores that is to be kept, if `samples` have goals. In the first round what may be lost
        grows with the weights of the stages searched so far: otherwise the first stages would use it up.
    """

    def __init__(
        self,
        samples: Samples,
        stages: Mapping[str, Sequence[str]],
        sizes: Mapping[str, int],
        shares: Sequence[float],
        keep: float,
        progress: Progress,
    ) -> None:
        self._samples, self._stages, self._sizes = samples, stages, sizes
        self._shares, self._report = shares, progress
        *before, total = accumulate(sum(sizes[name] for name in names) for names in stages.values())
        self._floors = [*(1 - (1 - keep) * size / total for size in before), keep]
        self._kept: dict[_Key, float] = {}  # means over the samples
        self._scores: dict[_Key, float] = {}
        self._history: list[Trial] = []
        self._done = self._total = 0

    def run(self, rounds: int, before: float) -> Choice:
        """Go through the stages at most `rounds` times, from the dense model, whose mean score is `before`."""
        chosen = dict.fromkeys(self._stages, 0.0)
        key = tuple(chosen.values())
        self._kept[key], self._scores[key] = 1.0, before
        best = before
        per_stage = (len(self._shares) - 1) * len(self._samples)
        self._total = rounds * len(self._stages) * per_stage
        for turn in range(1, rounds + 1):
            start = best
            for stage, floor in zip(self._stages, self._floors, strict=True):
                done = self._done + per_stage
                scores = self._try(turn, stage, chosen, floor if turn == 1 else self._floors[-1])
                if self._done < done:  # some scores were already known or not needed
                    self._progress(done - self._done)
                chosen[stage] = min(scores, key=lambda share: (-scores[share], share))
                best = scores[chosen[stage]]
            if best <= start and self._done < self._total:
                self._total = self._done
                self._progress(0)
                break
        by_layer = {name: chosen[stage] for stage, names in self._stages.items() for name in names}
        sparsity = {name: by_layer[name] for name in self._sizes}
        kept = self._kept[tuple(chosen.values())] if self._samples.goals is not None else None
        return Choice({"sparsity": sparsity}, best, kept, tuple(self._history))

    def _try(self, turn: int, stage: str, chosen: Mapping[str, float], floor: float) -> dict[float, float]:
        """Return the mean score of each candidate for a stage that keeps enough, computing those not yet known."""
        samples = self._samples
        keys = allowed = {share: tuple({**chosen, stage: share}.values()) for share in self._shares}
        known = {share: self._measured(key) for share, key in keys.items()}
        sparsities = {share: self._sparsity({**chosen, stage: share}) for share in keys}
        if samples.goals is not None:
            self._measure(samples.kept, self._kept, keys, stage, chosen, last=not samples.has_score)
            allowed = {share: key for share, key in keys.items() if self._kept[key] >= floor}
        if samples.has_score:
            self._measure(samples.score, self._scores, allowed, stage, chosen, last=True)
        else:
            self._scores.update({key: sparsities[share] for share, key in allowed.items()})
        for share, key in keys.items():
            if self._measured(key) != known[share]:
                self._history.append(Trial(turn, stage, share, sparsities[share], *self._measured(key)))
        return {share: self._scores[key] for share, key in allowed.items()}

    def _measured(self, key: _Key) -> tuple[float | None, float | None]:
        return self._kept.get(key), self._scores.get(key)

    def _measure(
        self,
        measure: Callable[[int], float],
        known: dict[_Key, float],
        keys: Mapping[float, _Key],
        stage: str,
        chosen: Mapping[str, float],
        last: bool,
    ) -> None:
        """Add to `known` the means over the samples of a measure, for the candidates that lack it."""
        values: dict[float, list[float]] = {share: [] for share, key in keys.items() if key not in known}
        others = {other: share for other, share in chosen.items() if other != stage}
        for s in range(len(self._samples) if values else 0):
            with self._samples.applied(s, self._levels(s, others)):
                for share, of_share in values.items():
                    with self._samples.applied(s, self._levels(s, {stage: share})):
                        of_share.append(measure(s))
                    if last:
                        self._progress(1)
        known.update({keys[share]: mean(of_share) for share, of_share in values.items()})

    def _levels(self, s: int, shares: Mapping[str, float]) -> dict[str, int]:
        """Return the levels of one sample's layers in these stages."""
        levels = {stage: self._shares.index(share) for stage, share in shares.items()}
        ladders = self._samples.ladders[s]
        return {name: level for stage, level in levels.items() for name in self._stages[stage] if name in ladders}

    def _sparsity(self, shares: Mapping[str, float]) -> float:
        return self._samples.sparsity([self._levels(s, shares) for s in range(len(self._samples))])

    def _progress(self, more: int) -> None:
        self._done += more
        self._report("search", self._done, self._total)
