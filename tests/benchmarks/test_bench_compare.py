"""The comparison of saved benchmark runs, on invented runs; and benchmarks on a stand-in for a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"


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


def test_missing_and_new_benchmarks_are_reported(compare):
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


def on(device, run):
    for benchmark in run["benchmarks"]:
        benchmark["extra_info"]["machine"] = {"device": device}
    return run


def test_different_devices_are_not_compared(compare):
    done = compare(run_of({"a": 1.0}), on("GPU 9000", run_of({"a": 1.0})))
    assert done.returncode == 1
    assert re.search(r"different devices cannot be compared: .*base.json is of cpu, .*new.json of GPU", done.stderr)
    assert compare(on("cpu", run_of({"a": 1.0})), run_of({"a": 1.0})).returncode == 0


# What torch.cuda reports on a GPU, imitated on the CPU, where the tensors stay.
STAND_IN = """
import time, types
import device, torch

class Event:
    def __init__(self, enable_timing):
        assert enable_timing
    def record(self):
        self.seconds = time.perf_counter()
    def synchronize(self):
        self.waited = True
    def elapsed_time(self, end):
        assert end.waited
        return 1e3 * (end.seconds - self.seconds)

facts = types.SimpleNamespace(name="GPU 9000", multi_processor_count=7, total_memory=8 << 30, major=9, minor=0)
device.DEVICE = torch.device("cpu")
device._C = types.SimpleNamespace(build_info=lambda: {"cuda": True})
torch.cuda.Event = Event
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda: facts
torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = lambda: 2_000_000
torch.cuda.max_memory_allocated = lambda: 5_000_000

import measuring
measuring._MATRIX, measuring._COPIED_VALUES = 64, 4096
"""


def test_a_benchmark_runs_on_a_stand_in_for_a_gpu(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    saved = tmp_path / "run.json"
    command = ["-m", "pytest", "-p", "stand_in", "bench_sparsegpt.py", "-k", "64x64", f"--benchmark-json={saved}"]
    paths = os.pathsep.join([str(tmp_path), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "SPADE_BENCH_DEVICE": "cuda", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command], cwd=SCRIPT.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, textbook = json.loads(saved.read_text())["benchmarks"]
    for benchmark in (ours, textbook):
        info = benchmark["extra_info"]
        assert benchmark["options"]["timer"] == "Moment" and 0 < benchmark["stats"]["median"] < 1
        assert info["peak_mb"] == 3.0 and info["machine"]["device"] == "GPU 9000"
        assert not any("goal" in name or "stated" in name for name in info)
    assert ours["stats"]["rounds"] >= 3 and ours["extra_info"]["share"] > 0
    table = subprocess.run([sys.executable, SCRIPT.with_name("table.py"), saved], capture_output=True, text=True)
    assert "sparsegpt 1 x 64x64, mask block 1" in table.stdout, table.stderr


@pytest.mark.parametrize(("chosen", "sentence"), [("gpu", "must be cpu or cuda, got 'gpu'"), ("cuda", "finds no CUDA")])
def test_an_unavailable_device_is_refused(chosen, sentence):
    environment = {**os.environ, "SPADE_BENCH_DEVICE": chosen, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "bench_sparsegpt.py", "--collect-only"]
    done = subprocess.run(command, cwd=SCRIPT.parent, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count(sentence) == 1 and "Traceback" not in done.stderr
