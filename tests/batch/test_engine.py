"""The loop that drives a team, with workers that follow a script instead of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from spade_fast.batch.engine import drive
from spade_fast.batch.schedule import Schedule, WorkerDied
from spade_fast.batch.worker import Outcome


class Scripted:
    """A worker that loads, then answers each task with outcomes; an exception among its messages is raised."""

    def __init__(self, number: int, answer: Callable[[Sequence[int]], Iterator[Any]], loads: bool) -> None:
        self.number, self.idle, self.tasks = number, False, list[Sequence[int]]()
        self._answer, self._messages = answer, deque[Any]([None] if loads else [WorkerDied("no device. At all")])

    def give(self, task: Sequence[int]) -> None:
        assert self.idle
        self.idle = False
        self.tasks.append(task)
        self._messages.extend([*self._answer(task), None])

    def receive(self) -> Outcome | None:
        message = self._messages.popleft()
        if isinstance(message, Exception):
            raise message
        self.idle = message is None
        return message


class Script:
    """A team that records its workers; `loads` says whether the next one at a place can load its network."""

    def __init__(
        self, answer: Callable[[Sequence[int]], Iterator[Any]], loads: Callable[[int], bool] = lambda number: True
    ) -> None:
        self._answer, self._loads = answer, loads
        self.started, self.ended = list[Scripted](), list[Scripted]()
        self._rounds = 0

    def start(self, number: int) -> Scripted:
        self.started.append(Scripted(number, self._answer, self._loads(number)))
        return self.started[-1]

    def ready(self, members: Mapping[int, Scripted]) -> list[int]:
        self._rounds += 1
        assert self._rounds < 100, "the loop does not end"
        return [number for number, member in members.items() if not member.idle]

    def end(self, members: Sequence[Scripted]) -> None:
        self.ended += members


def finished(task: Sequence[int]) -> Iterator[Any]:
    return (Outcome(index, "finished") for index in task)


def deadly(task: Sequence[int]) -> Iterator[Any]:
    """Sample 2 kills its worker."""
    for index in task:
        yield WorkerDied("exit code 7. And more") if index == 2 else Outcome(index, "finished")


def test_workers_give_up_their_claims_before_they_are_ended():
    team = Script(finished)
    assert sorted(outcome.index for outcome in drive(team, Schedule(range(5), 2), 2)) == [0, 1, 2, 3, 4]
    assert team.ended == team.started and len(team.started) == 2 and all(member.idle for member in team.ended)


def test_a_worker_that_dies_is_replaced_and_its_samples_are_tried_one_by_one():
    team = Script(deadly)
    outcomes = {outcome.index: outcome for outcome in drive(team, Schedule(range(6), 4), 1)}
    assert len(outcomes) == 6 and [outcomes[index].state for index in (0, 1, 3, 4, 5)] == ["finished"] * 5
    assert outcomes[2] == Outcome(2, "killed", "killed its worker 2 times, last with exit code 7")
    assert [member.tasks for member in team.started] == [[(0, 1, 2, 3)], [(4, 5), (2,)], [(3,), (2,)], []]
    assert team.ended == team.started[-1:] and all(member.number == 0 for member in team.started)


def test_a_place_is_given_up_after_three_workers_that_do_not_load():
    team = Script(finished, lambda number: number != 1)
    assert len(list(drive(team, Schedule(range(9), 1), 2))) == 9
    assert [member.number for member in team.started] == [0, 1, 1, 1] and team.ended == team.started[:1]
    with pytest.raises(ChildProcessError, match=r"the last was started 3 times, and ended with no device\. At all"):
        list(drive(Script(finished, lambda number: False), Schedule(range(9), 1), 2))


def test_a_worker_that_loads_ends_the_count_of_those_that_did_not():
    loads = iter([False, False, True, False, False, True, True])
    team = Script(deadly, lambda number: next(loads))
    assert [outcome.state for outcome in drive(team, Schedule(range(3), 3), 1)] == ["finished", "finished", "killed"]
    assert len(team.started) == 7 and team.ended == team.started[-1:]


def test_a_sample_that_another_run_has_claimed_is_tried_again(monkeypatch):
    monkeypatch.setattr("spade_fast.batch.schedule._PAUSE", 0.0)
    answers = iter([Outcome(0, "busy"), Outcome(0, "finished")])
    team = Script(lambda task: iter([next(answers)]))
    assert list(drive(team, Schedule([0], 1), 1)) == [Outcome(0, "finished")] and team.started[0].tasks == [(0,), (0,)]


def test_all_workers_are_ended_after_an_error_or_when_nobody_listens():
    team = Script(lambda task: iter([OSError("disk full")]))
    with pytest.raises(OSError, match="disk full"):
        list(drive(team, Schedule(range(4), 1), 2))
    assert len(team.started) == 2 and team.ended == team.started
    team = Script(finished)
    outcomes = drive(team, Schedule(range(4), 1), 2)
    next(outcomes)
    outcomes.close()
    assert len(team.started) == 2 and team.ended == team.started
