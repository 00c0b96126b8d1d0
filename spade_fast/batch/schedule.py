"""Which samples a worker gets next, and what happens to those of a worker that died; the same for all engines."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from spade_fast.batch.worker import Outcome

POLL = 0.2  # seconds after which an engine looks whether there is something to do
DEADLY = 2  # workers that a sample, alone, may kill before it is given up
_FAILED_STARTS = 3
_PAUSE = 1.0  # seconds before asking again for a sample that another run has


class Schedule:
    """The samples of a run that are not done yet.

    Parameters
    ----------
    indices
        Of the samples.
    group
        Samples given to a worker at once.
    """

    def __init__(self, indices: Iterable[int], group: int) -> None:
        self._waiting = deque(indices)
        self._alone: deque[int] = deque()
        self._busy: deque[tuple[float, int]] = deque()
        self._open = set(self._waiting)
        self._kills: Counter[int] = Counter()
        self._group = group

    @property
    def done(self) -> bool:
        """Whether all samples are finished or given up."""
        return not self._open

    def task(self) -> list[int]:
        """Return samples for an idle worker; none if all that are left are in other hands, or asked for too early."""
        if self._waiting:
            return [self._waiting.popleft() for _ in range(min(self._group, len(self._waiting)))]
        if self._alone:
            return [self._alone.popleft()]
        due: list[int] = []
        while self._busy and self._busy[0][0] <= time.monotonic() and len(due) < self._group:
            due.append(self._busy.popleft()[1])
        return due

    def take(self, outcome: Outcome) -> bool:
        """Note an outcome; True if it is final."""
        if outcome.state == "busy":
            self._busy.append((time.monotonic() + _PAUSE, outcome.index))
            return False
        self._open.discard(outcome.index)
        return True

    def died(self, left: Sequence[int], end: str) -> list[Outcome]:
        """Note how a worker died over samples, which are tried alone then; return those that are given up."""
        if len(left) == 1:
            self._kills[left[0]] += 1
        elif left:
            self._group = max(1, self._group // 2)  # the system may have killed it for its memory
        given_up = [index for index in left if self._kills[index] >= DEADLY]
        self._open.difference_update(given_up)
        self._alone.extend(index for index in left if index not in given_up)
        return [Outcome(index, "killed", f"killed its worker {DEADLY} times, at last with {end}") for index in given_up]


class WorkerDied(Exception):
    """A worker has ended, as the text says; its samples and its place are not lost."""


class Starts:
    """Counts, for each place of a team, workers that die one after the other without having begun to work."""

    def __init__(self, places: int) -> None:
        self._failed, self._places = Counter[int](), places

    def began(self, place: int) -> None:
        """Note that a worker began to work."""
        self._failed[place] = 0

    def failed(self, place: int, end: str) -> bool:
        """Note how a worker ended that had not begun to work.

        Returns
        -------
        bool
            Whether its place, of a device or node that is broken perhaps, is given up.

        Raises
        ------
        ChildProcessError
            It was the last place.
        """
        self._failed[place] += 1
        if self._failed[place] < _FAILED_STARTS:
            return False
        self._places -= 1
        if self._places == 0:
            raise ChildProcessError(
                f"no worker began to work: the last was started {_FAILED_STARTS} times, and ended with {end}"
            )
        return True
