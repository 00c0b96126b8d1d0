"""The device, threads, the `report` fixture through which benchmarks are timed, and the table of all of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from device import ON_CUDA, now, prepare, to_cpu
from measuring import OURS, THREADS, Case, copy_bandwidth, extra_bytes, machine, matmul_rate
from table import format_table, ratios

Result = TypeVar("Result")
Report = Callable[..., None]

_ROWS = pytest.StashKey[list[dict[str, Any]]]()
_SECONDS = 1.5  # during which a benchmark of ours is repeated
_RATES = 5  # measurements of the machine between its calls
_OF_THE_CPU = ("stated_mb", "share_goal", "ratio_goal", "note_goal")


def pytest_configure(config: pytest.Config) -> None:
    try:
        prepare()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.addinivalue_line("markers", "slow: takes minutes; left out by `make bench`, run by `make bench-all`")
    config.stash[_ROWS] = []


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def report(benchmark: Any, request: pytest.FixtureRequest) -> Report:
    """Checks an implementation, times it, and adds it to the JSON and to the table.

    Our own op is checked first, then called for 1.5 s (3 to 200 times). The machine's rate, from which the floor
    follows, is measured between the calls, about five times, since other programs slow both down. Other implementations
    take up to minutes: they are called once, unless `once` says otherwise, and their result is checked before anything
    is reported. On a GPU, where first calls load kernels and libraries, these too are checked first and then timed.
    """

    def run(
        case: Case,
        implementation: str,
        function: Callable[[], Result],
        check: Callable[[Result], object],
        *,
        once: bool | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        benchmark.group = f"{case.op} {case.layer}"
        ours = implementation == OURS
        measure_rate = copy_bandwidth if case.moved else matmul_rate
        rates = [measure_rate()] if ours else []
        once = not ours if once is None else once
        if once and not ON_CUDA:
            memory: list[int | None] = []
            results: list[Result] = []
            benchmark.pedantic(lambda: memory.append(extra_bytes(lambda: results.append(function()))))
            check(results[0])
            taken = memory[0]
        else:
            check(to_cpu(function()))
            start = now()
            taken = extra_bytes(function)
            rounds = 1 if once else min(200, max(3, math.ceil(_SECONDS / (now() - start))))
            calls = itertools.count()

            def between() -> None:
                if ours and next(calls) % math.ceil(rounds / _RATES) == 0:
                    rates.append(measure_rate())

            benchmark.pedantic(function, setup=between, rounds=rounds)
        if ours:
            rates.append(measure_rate())
        rate = statistics.median(rates) if rates else None
        seconds = benchmark.stats.stats.median
        needed = case.moved or case.work
        row = {
            "op": case.op,
            "layer": case.layer,
            "implementation": implementation,
            "bound": "copy" if case.moved else "matmul",
            "floor_rate": rate,
            "floor_spread": _quartile_range(rates) / rate if rate else None,
            "gflops": case.work / seconds / 1e9 if case.work else None,
            "share": needed / rate / seconds if rate and needed else None,
            "share_goal": case.share_goal,
            "ratio_goal": case.ratio_goal,
            "peak_mb": None if taken is None else taken / 1e6,
            "stated_mb": None if case.stated is None else case.stated / 1e6,
            **facts(),
        }
        if ON_CUDA:
            row = {name: value for name, value in row.items() if name not in _OF_THE_CPU}
        benchmark.extra_info.update(row, machine=machine())
        request.config.stash[_ROWS].append({**row, "seconds": seconds})

    return run


def _quartile_range(values: list[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    found = ratios(config.stash[_ROWS])
    for benchmark in output_json["benchmarks"]:
        info = benchmark["extra_info"]
        if info.get("implementation") == OURS:
            info["ratios"] = found[info["op"], info["layer"]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(format_table(rows))
