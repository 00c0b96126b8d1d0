"""The comparison of saved benchmark runs, on made-up runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare.py"


def run_of(seconds, rate=100e9, spread=0.01, implementation="spade_fast"):
    return {
        "benchmarks": [
            {
                "stats": {"min": median, "median": median, "iqr": spread * median},
                "extra_info": {"op": "op", "layer": layer, "implementation": implementation, "floor_rate": rate},
            }
            for layer, median in seconds.items()
        ]
    }


@pytest.fixture
def compare(tmp_path):
    def run(base, new, *arguments):
        paths = []
        for name, saved in (("base", base), ("new", new)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(saved))
        return subprocess.run([sys.executable, SCRIPT, *paths, *arguments], capture_output=True, text=True)

    return run


def test_equal_runs_pass(compare):
    done = compare(run_of({"a": 1.0, "b": 2.0}), run_of({"a": 1.0, "b": 2.0}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2


def test_a_slower_benchmark_fails_and_is_named(compare):
    done = compare(run_of({"a": 1.0, "b": 2.0}), run_of({"a": 1.0, "b": 4.0}))
    assert done.returncode == 1
    assert "op b" in done.stderr and "op a" not in done.stderr
    assert "2.00" in done.stdout


def test_a_slower_moment_of_the_machine_does_not_count(compare):
    assert compare(run_of({"a": 1.0}), run_of({"a": 2.0}, rate=50e9)).returncode == 0


def test_a_faster_machine_hides_nothing(compare):
    assert compare(run_of({"a": 1.0}), run_of({"a": 1.0}, rate=200e9)).returncode == 1


def test_noise_is_the_spread_of_both_runs(compare):
    slow = {"a": 1.3}
    assert compare(run_of({"a": 1.0}), run_of(slow)).returncode == 1
    assert compare(run_of({"a": 1.0}, spread=0.2), run_of(slow, spread=0.2)).returncode == 0
    assert compare(run_of({"a": 1.0}), run_of(slow), "--noise", "0.4").returncode == 0


def test_missing_and_new_benchmarks_are_said(compare):
    done = compare(run_of({"a": 1.0, "gone": 1.0}), run_of({"a": 1.0, "added": 1.0}))
    assert done.returncode == 0
    assert "missing   op gone" in done.stdout and "new       op added" in done.stdout


def test_other_implementations_are_not_judged(compare):
    base, new = run_of({"a": 1.0}), run_of({"a": 1.0})
    base["benchmarks"] += run_of({"b": 1.0}, implementation="textbook")["benchmarks"]
    new["benchmarks"] += run_of({"b": 9.0}, implementation="textbook")["benchmarks"]
    assert compare(base, new).returncode == 0


def test_an_empty_comparison_fails(compare):
    done = compare(run_of({"a": 1.0}), run_of({}))
    assert done.returncode == 1
    assert "no benchmark is in both runs" in done.stderr
