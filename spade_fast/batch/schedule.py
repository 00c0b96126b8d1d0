"""The order in which workers get samples, and which are retried or given up when a worker dies, for all engines."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from spade_fast._util.errors import WorkerError
from spade_fast.batch.worker import Outcome

POLL = 0.2  # seconds that an engine waits for messages at a time
DEADLY = 2  # workers that a sample may kill, as their only one, before it is given up
_FAILED_STARTS = 3
_PAUSE = 1.0  # seconds before another try at a sample that another run has claimed


class Schedule:
    """The samples of a run that are not finished yet.

    Parameters
    ----------
    indices
        Indices of the samples.
    group
        Samples per task.
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
        """Return samples for an idle worker; none if the rest is with other workers, or with other runs and not due."""
        if self._waiting:
            return [self._waiting.popleft() for _ in range(min(self._group, len(self._waiting)))]
        if self._alone:
            return [self._alone.popleft()]
        due: list[int] = []
        while self._busy and self._busy[0][0] <= time.monotonic() and len(due) < self._group:
            due.append(self._busy.popleft()[1])
        return due

    def take(self, outcome: Outcome) -> bool:
        """Record an outcome; True if it is final."""
        if outcome.state == "busy":
            self._busy.append((time.monotonic() + _PAUSE, outcome.index))
            return False
        self._open.discard(outcome.index)
        return True

    def died(self, left: Sequence[int], end: str) -> list[Outcome]:
        """Record how a worker died with samples, which are then tried one by one; return those that are given up."""
        if len(left) == 1:
            self._kills[left[0]] += 1
        elif left:
            self._group = max(1, self._group // 2)  # the system may have killed it for its memory
        given_up = [index for index in left if self._kills[index] >= DEADLY]
        self._open.difference_update(given_up)
        self._alone.extend(index for index in left if index not in given_up)
        return [Outcome(index, "killed", f"killed its worker {DEADLY} times, last with {end}") for index in given_up]


class WorkerDied(Exception):
    """A worker has ended; the message says how. Another takes its place and tries its samples again."""


class Starts:
    """Counts, for each place in a team, successive workers that die before they begin to work."""

    def __init__(self, places: int) -> None:
        self._failed, self._places = Counter[int](), places

    def began(self, place: int) -> None:
        """Record that a worker began to work."""
        self._failed[place] = 0

    def failed(self, place: int, end: str) -> bool:
        """Record how a worker ended before it began to work.

        Returns
        -------
        bool
            Whether its place is given up, perhaps that of a broken device or node.

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
            raise WorkerError(
                f"no worker began to work: the last was started {_FAILED_STARTS} times, and ended with {end}"
            )
        return True
