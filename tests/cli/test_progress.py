"""Progress of the commands without a terminal."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("typer")
pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL.Image")

from typer.testing import CliRunner

from spade_fast.cli import progress
from spade_fast.cli.app import app

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")


@pytest.fixture
def clock(monkeypatch):
    """The time that lines go by, in seconds, to be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_start_and_from_time_to_time(clock, capsys):
    with progress.showing_progress() as report:
        for done in range(21):
            report("SPADE: solve [x]", done, 20)
            clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [f"SPADE: solve [x]: {done}/20" for done in range(0, 21, 5)]


def test_lines_of_a_fast_command(clock, small, photo, tmp_path):
    out = tmp_path / "trace.safetensors"
    arguments = ["trace", photo, "--model", small, "--augmentations", 4, "--sparsity", 0.1, "--out", out]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and result.stderr == "calibrate: 1/1\n", "a second line would come five seconds later"


def test_bars_on_a_terminal(monkeypatch):
    shown = []

    class Bars:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_task(self, name, total):
            shown.append((name, total))
            return name

        def update(self, name, completed, total):
            shown.append((name, completed, total))

    monkeypatch.setattr(progress, "Bars", Bars)
    monkeypatch.setattr(progress.stderr, "_force_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.showing_progress() as report:
        report("solve", 0, 2)
        report("solve", 2, 2)
    assert shown == [("solve", 2), ("solve", 0, 2), ("solve", 2, 2)]
