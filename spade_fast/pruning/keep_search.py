"""The search for the share that automatic sparsity is to keep of each sample's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spade_fast._util.progress import Progress
from spade_fast.pruning.auto_sparsity import Search
from spade_fast.pruning.config import AUTO
from spade_fast.pruning.tuning_result import Trial
from spade_fast.pruning.tuning_samples import Choice, Samples, mean


def search_keeps(samples: Samples, shares: Sequence[float], keep: float, progress: Progress) -> Choice:
    """Search for the share with the best mean score over the traces that automatic sparsity makes with it.

    Parameters
    ----------
    shares
        The shares to try, in descending order. Among equal scores the largest is chosen.
    keep
        Mean share of the dense scores that the traces must keep. Where they keep less, they are not scored; if they
        always do, the first of `shares` is chosen.
    """
    total = len(samples) * (1 + len(shares) * samples.has_score)
    levels: list[list[Mapping[str, int]]] = []  # of each sample, for each share
    kept: list[list[float]] = []
    for s in range(len(samples)):
        of_sample = _traces(samples, s, shares)
        levels.append([one for one, _ in of_sample])
        kept.append([one for _, one in of_sample])
        progress("search", s + 1, total)
    means = [mean(of_share) for of_share in zip(*kept, strict=True)]
    sparsities = [samples.sparsity(of_share) for of_share in zip(*levels, strict=True)]
    allowed = [index for index, one in enumerate(means) if one >= keep] or [0]
    scores: dict[int, float] = {}
    if samples.has_score:
        known: dict[tuple[int, tuple[int, ...]], float] = {}  # shares can have the same traces
        for index in range(len(shares)):
            if index in allowed:
                scores[index] = mean([_scored(samples, s, levels[s][index], known) for s in range(len(samples))])
            progress("search", len(samples) * (2 + index), total)
    else:
        scores = {index: sparsities[index] for index in allowed}
    best = max(allowed, key=lambda index: (scores[index], -index))
    history = (
        Trial(1, AUTO, share, sparsities[index], means[index], scores.get(index)) for index, share in enumerate(shares)
    )
    return Choice({"sparsity": AUTO, "keep": shares[best]}, scores[best], means[best], tuple(history))


def _traces(samples: Samples, s: int, shares: Sequence[float]) -> list[tuple[Mapping[str, int], float]]:
    """Return the levels of one sample's layers, and what they keep, for each share."""
    if not samples.ladders[s]:  # its data reached no layer
        return [({}, 1.0)] * len(shares)
    assert samples.goals is not None
    search = Search(samples.ladders[s], samples.goals[s], samples.with_weights)
    return [(one.levels, min(1.0, one.auto.share)) for one in search.run(shares)]


def _scored(
    samples: Samples, s: int, levels: Mapping[str, int], known: dict[tuple[int, tuple[int, ...]], float]
) -> float:
    key = s, tuple(levels.values())
    if key not in known:
        with samples.applied(s, levels):
            known[key] = samples.score(s)
    return known[key]
