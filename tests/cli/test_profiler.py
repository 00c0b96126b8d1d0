"""Stages as ranges of torch's profiler, the count of operations, and `spade-fast profile`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from problems import random_problem
from torch import nn

import spade_fast
from spade_fast import ops
from spade_fast._util import ranges as stages
from spade_fast._util.ranges import PREFIX, stage
from spade_fast.cli import profiler as profiling
from spade_fast.cli.profiler import OTHER, Timeline, run_profiled
from spade_fast.ops import flops

# Stages


def names(events):
    return {event.name.removeprefix(PREFIX) for event in events if event.name.startswith(PREFIX)}


def test_every_stage_is_a_range():
    weight, _, hinv = random_problem(1, 4, 12)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        made = spade_fast.trace(network, torch.rand(20, 3, 2, 2), sparsity=0.5)
        with made.applied(network):
            pass
        ops.nm_path(weight, hinv, 2, 4)
        spade_fast.trace(network, torch.rand(20, 3, 2, 2), inputs=torch.rand(1, 3, 2, 2), solver="sparsegpt")
    assert names(profiler.events()) == set(stages.STAGES) - {"attribute"}


def test_attribution_is_a_stage():
    captum = pytest.importorskip("captum.attr")
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    for calibration in (torch.rand(20, 3, 2, 2), lambda image, _: torch.rand(20, 3, 2, 2)):
        spade = spade_fast.Spade(captum.Saliency(network), calibration, sparsity=0.5)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            spade.attribute(torch.rand(2, 3, 2, 2), target=1)
        assert names(profiler.events()) >= {"apply", "attribute"}


def test_nested_ranges_interrupt_each_other():
    ranges = [(10, 60, "forward"), (20, 30, "gram"), (25, 28, "factor"), (40, 50, "gram"), (70, 80, "augment")]
    timeline = Timeline(reversed(ranges), 100)
    nanoseconds = {name: round(seconds * 1e9) for name, seconds in timeline.seconds().items()}
    assert nanoseconds == {OTHER: 40, "forward": 30, "gram": 17, "factor": 3, "augment": 10}
    expected = {-5: OTHER, 0: OTHER, 10: "forward", 27: "factor", 29: "gram", 35: "forward", 65: OTHER, 99: OTHER}
    assert {moment: timeline.stage_at(moment) for moment in expected} == expected
    assert Timeline([], 7).seconds() == {OTHER: 7e-9}


# Operations


@pytest.mark.parametrize(
    ("channels", "groups", "size", "kernel", "stride", "padding", "dilation"),
    [
        (3, 1, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        (4, 2, (6, 7), (3, 2), (2, 1), (1, 0), (1, 2)),
        (2, 2, (7, 7), (3, 3), (2, 2), (1, 1), (2, 2)),
        (3, 1, (6, 5), (1, 1), (2, 2), (0, 0), (1, 1)),
        (1, 1, (3, 3), (5, 5), (1, 1), (2, 2), (1, 1)),
    ],
)
def test_convolution_gram_against_enumeration(channels, groups, size, kernel, stride, padding, dilation):
    width = channels // groups
    field = list(itertools.product(*(range(k) for k in kernel)))
    starts = [
        range(-p, n + p - d * (k - 1), s) for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    products = set()
    for top, left in itertools.product(*starts):
        taps = [(top + i * dilation[0], left + j * dilation[1]) for i, j in field]
        values = [(y, x, c) for y, x in taps if 0 <= y < size[0] and 0 <= x < size[1] for c in range(width)]
        products.update(itertools.product(values, values))
    columns = width * kernel[0] * kernel[1]
    gram, x = torch.zeros(1, groups, columns, columns), torch.rand(2, channels, *size)
    # Of two equal products in the two halves one is needed, of a multiplication and an addition.
    assert flops.gram_conv2d(gram, x, kernel, stride, padding, dilation) == 2 * groups * len(products)


def cholesky_operations(columns, pivots=None):
    """A multiplication and an addition for each entry of the upper half that a pivot changes."""
    left = range(columns - 1, columns - 1 - (columns if pivots is None else pivots), -1)
    return sum(n * (n + 1) for n in left)


def test_operations_of_the_solvers_against_their_loops():
    problems, rows, columns = 2, 3, 300
    weight = torch.empty(problems, rows, columns)
    square = torch.empty(problems, columns, columns)
    factorisation = cholesky_operations(columns)
    inversion = sum(2 * (i - j) for j in range(columns) for i in range(j, columns))  # column j of L⁻¹, row by row
    sweep = sum(2 * (columns - 1 - j) for j in range(columns))
    counts = torch.tensor([[0, 10, 100], [75, 140, 150]])
    order = torch.empty(problems, rows, columns // 2)
    solution = sum(cholesky_operations(min(2 * n, columns - 2 * n)) for n in counts.flatten().tolist() if n)
    for counted, expected in (
        (flops.inverse_cholesky(square, weight), problems * (factorisation + inversion)),
        (flops.reverse_cholesky(square, weight), problems * factorisation),
        (flops.obs_path(weight, square, 1), problems * rows * factorisation),
        (flops.nm_path(weight, square, 1, 4), problems * rows * cholesky_operations(columns, columns // 4)),
        (flops.sparsegpt(weight, square, None, 1, 0, 0, False), problems * rows * sweep),
        (flops.obs_solution(weight, square, square, order, counts, 2), solution),
        (flops.gram_linear(square, torch.empty(2, 50, columns)), 2 * 50 * columns * (columns + 1)),
    ):
        assert counted == pytest.approx(expected, rel=0.01)


def test_operations_go_to_their_stage(tmp_path):
    a, b = torch.rand(30, 20), torch.rand(20, 10)
    weight, hessian, hinv = random_problem(1, 4, 12)

    def run():
        with stage("forward"):
            for _ in range(50):
                _ = a @ b
            ops.gram_linear_(torch.zeros(1, 20, 20), a[None])
        ops.obs_path(weight, hinv)
        torch.linalg.cholesky(hessian)

    found = {use.stage: use for use in run_profiled(run, tmp_path / "trace.json")}
    operations = {name: use.operations for name, use in found.items()}
    assert operations == {"forward": 50 * 2 * 30 * 20 * 10, "gram": 30 * 20**2, "path": 4 * 12**3 / 3, OTHER: 0}


# Seconds and memory


def test_seconds_are_exclusive_and_add_up(tmp_path):
    def run():
        time.sleep(0.05)
        with stage("forward"):
            time.sleep(0.1)
            with stage("attribute"):
                time.sleep(0.2)

    start = time.perf_counter()
    found = {use.stage: use.seconds for use in run_profiled(run, tmp_path / "trace.json")}
    wall = time.perf_counter() - start
    assert list(found) == ["forward", "attribute", OTHER]
    assert found[OTHER] >= 0.05 and found["forward"] >= 0.1 and found["attribute"] >= 0.2
    assert sum(found.values()) <= wall


@pytest.mark.skipif(profiling.resident_bytes() is None, reason="this system has no /proc/self/statm")
def test_peak_memory_belongs_to_its_stage(tmp_path):
    size = 200_000_000

    def run():
        time.sleep(0.05)
        with stage("factor"):
            block = torch.ones(size, dtype=torch.uint8)
            time.sleep(0.05)
            del block
        with stage("path"):
            time.sleep(0.05)

    found = {use.stage: use.peak_bytes for use in run_profiled(run, tmp_path / "trace.json")}
    assert found["factor"] - found["path"] > size / 2 < found["factor"] - found[OTHER]


# The command

COMMAND_STAGES = {"augment", "forward", "gram", "factor", "path", "solution", "sweep", "search", "apply", "attribute"}


@pytest.fixture
def command(small, photo, tmp_path):
    """Runs `spade-fast ARGUMENTS... explain photo.png --out OUT` on the small network; returns its result."""
    for package in ("captum", "matplotlib", "typer"):
        pytest.importorskip(package)
    from typer.testing import CliRunner

    from spade_fast.cli.app import app

    def run(*arguments, out, **options):
        given = {"--model": small, "--methods": "saliency", "--augmentations": 8, "--out": tmp_path / out, **options}
        parts = [*arguments, "explain", photo, *itertools.chain(*given.items())]
        return CliRunner().invoke(app, [str(part) for part in parts])

    return run


@pytest.mark.filterwarnings("ignore:Input Tensor")
def test_profile_of_an_explanation(command, tmp_path, monkeypatch):
    chrome = tmp_path / "chrome.json"
    result = command("profile", "--chrome", chrome, out="profiled")
    assert result.exit_code == 0, result.output
    plain = command(out="plain")
    assert plain.exit_code == 0 and "profile by stage" not in plain.output

    table = result.output[result.output.index("profile by stage") :]
    rows = {cells[0]: cells[1:] for cells in (line.strip("│ ").split("│") for line in table.splitlines()) if cells[1:]}
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert set(rows) == COMMAND_STAGES | {OTHER, "total"}
    assert rows["apply"][2] == "-" and float(rows["gram"][2]) > 0
    shares = [float(cells[1].rstrip("%")) for name, cells in rows.items() if name != "total"]
    assert abs(sum(shares) - 100) < 0.6 and str(chrome) in result.output

    events = json.loads(chrome.read_text())["traceEvents"]
    assert {event.get("name", "").removeprefix(PREFIX) for event in events} >= COMMAND_STAGES

    for name in ("trace-exact.safetensors", "trace-sparsegpt.safetensors"):
        profiled, alone = (spade_fast.Trace.load(tmp_path / folder / name) for folder in ("profiled", "plain"))
        assert profiled.layers == alone.layers
        assert all(torch.equal(profiled.weight(layer), alone.weight(layer)) for layer in alone.layers)
    assert (tmp_path / "profiled/saliency.png").read_bytes() == (tmp_path / "plain/saliency.png").read_bytes()

    monkeypatch.setattr(profiling, "resident_bytes", lambda: None)
    result = command("profile", "--chrome", chrome, out="profiled", **{"--solver": "sparsegpt"})
    totals = [line for line in result.output.splitlines() if "100.0%" in line]
    assert result.exit_code == 0 and totals[-1].strip("│ ").endswith("-")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["profile"], {"--solver": "magic"}, "unknown solver 'magic'"),
        (["profile", "explian"], {}, "unknown command to profile 'explian': did you mean 'explain'?"),
        (["profile"], {"--magic": 1}, "No such option"),
        (["profile", "doctor"], {}, "unknown command to profile 'doctor': choose from explain, trace"),
        (
            ["profile", "--chrome", "absent/chrome.json"],
            {},
            "cannot write the Chrome trace: folder absent does not exist",
        ),
        (["profile", "--chrome", "."], {}, "cannot write the Chrome trace: . is a folder"),
    ],
)
def test_failure_leaves_no_chrome_trace(command, tmp_path, monkeypatch, arguments, options, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    result = command(*arguments, out="out", **options)
    assert result.exit_code == 2 and message in result.stderr and "profile by stage" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


# NVTX


def test_nvtx_without_cuda_is_a_warning_at_import():
    run = [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: False; import spade_fast"]
    done = subprocess.run(run, env={**os.environ, "SPADE_FAST_NVTX": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "SPADE_FAST_NVTX=1 is ignored: NVTX ranges need a CUDA device" in done.stderr


def test_nvtx(monkeypatch, tmp_path):
    entered = []

    class Emit:
        def __enter__(self):
            entered.append(self)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", Emit)
    for value, expected in ((None, 0), ("0", 0), ("1", 1)):
        monkeypatch.delenv("SPADE_FAST_NVTX", raising=False)
        if value is not None:
            monkeypatch.setenv("SPADE_FAST_NVTX", value)
        stages.emit_nvtx_if_asked_for()
        assert len(entered) == expected
    with pytest.raises(ValueError, match="SPADE_FAST_NVTX=1 cannot be combined with a profile"):
        run_profiled(lambda: None, tmp_path / "trace.json")
