"""Batches in several processes, under real faults: killed workers and drivers, full disks, two runs at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")

from batches import contents, make_photos, no_leftovers, run_small
from batches_network import FOLDER, Deadly

from spade_fast.batch import OutputError, Results
from spade_fast.batch.engine_processes import _send, _use_gpu
from spade_fast.batch.worker import DeviceError

MODEL = "batches_network:loaded"
PATIENCE = 300  # seconds, since the machine may be busy
COMMAND = "from spade_fast.cli import main; main()"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "photos"
    make_photos(folder, 6)
    return folder


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Path:
    """The folder in which the network looks for the gate and records what it does."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    os.environ[FOLDER] = str(folder)
    run_small(photos, folder / "out", MODEL)
    return contents(folder / "out")


def start(photos: Path, out: Path, **options: object) -> subprocess.Popen:
    given = {"model": MODEL, "sparsity": 0.5, "augmentations": 6, "samples-per-solve": 2, "out": out, **options}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "batch", str(photos), *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, *runs: subprocess.Popen, seconds: float = PATIENCE):
    """Wait until something is true, while the runs continue, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        for run in runs:
            assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    return found


def waiting(folder: Path) -> list[int]:
    """Processes that are in the middle of a solve."""
    return [int(path.name.split("-")[1]) for path in folder.glob("waiting-*")]


def kill_both_waiting(folder: Path) -> threading.Thread:
    """Kill two processes once they are in the middle of a solve, and open the gate for their successors."""

    def kill() -> None:
        for process in wait_for(lambda: len(waiting(folder)) == 2 and waiting(folder)):
            os.kill(process, signal.SIGKILL)
        (folder / "gate").unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    return killer


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] == "Z"
    except FileNotFoundError:
        return True


def test_workers_killed_in_mid_solve_are_replaced(photos, watched, expected):
    (watched / "gate").touch()
    killer = kill_both_waiting(watched)
    summary = run_small(photos, watched / "out", MODEL, workers=2, samples_per_solve=2)
    killer.join()
    assert summary.finished == 6 and not summary.failed and (watched / "kept").exists()
    assert contents(watched / "out") == expected and no_leftovers(watched / "out")


def test_workers_killed_while_they_start(photos, watched):
    listed = watched / "list.csv"
    listed.write_text("\n".join(["id,path", *(f"{'x' * 3000}{i},{photos / '00.png'}" for i in range(60))]))

    def kill() -> None:
        (first, *_) = wait_for(multiprocessing.active_children)
        first.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    summary = run_small(listed, watched / "out", MODEL, workers=2)
    killer.join()
    assert summary.finished == 60


def test_workers_whose_device_is_lost_are_replaced(photos, watched, expected):
    (watched / "broken").touch()
    summary = run_small(photos, watched / "out", MODEL, workers=2, samples_per_solve=2)
    assert summary.finished == 6 and contents(watched / "out") == expected


def test_workers_whose_device_is_lost_as_they_load_are_replaced(photos, watched):
    (watched / "broken").touch()
    summary = run_small(photos, watched / "out", "batches_network:loaded_onto_a_lost_device", workers=2)
    assert summary.finished == 6 and not (watched / "broken").exists()


def test_a_place_where_no_worker_can_start_is_given_up(photos, watched):
    (watched / "gate").touch()
    summary = run_small(photos, watched / "out", "batches_network:loaded_by_one_process", workers=2)
    assert summary.finished == 6 and (watched / "failed").read_text() == "xxx"


@pytest.mark.parametrize(("count", "number"), [(0, 0), (2, 1)])
def test_a_gpu_that_cannot_be_used(monkeypatch, count, number):
    def fail(chosen):
        raise RuntimeError(f"no GPU {chosen}")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(DeviceError, match=f"RuntimeError: no GPU {number}"):
        _use_gpu(3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sample_that_kills_its_workers_is_given_up(watched, workers):
    summary = run_small(Deadly(), watched / "out", MODEL, workers=workers, samples_per_solve=2)
    assert summary.failed == {"2": "killed its worker 2 times, last with exit code -9"} and summary.finished == 3
    assert (watched / "out/errors/2.json").exists()


def test_errors_of_workers_end_the_run(photos, watched, monkeypatch):
    with pytest.raises(TypeError, match="the samples cannot be sent to other processes"):
        run_small([(lambda: 0)] * 2, watched / "out", MODEL, workers=2)
    monkeypatch.setenv(FOLDER, str(os.getpid()))
    with pytest.raises(ChildProcessError, match="the last was started 3 times, and ended with exit code 7"):
        run_small(photos, watched / "other", "batches_network:ends", workers=2)


class TwoFacts(Exception):
    """Cannot be made from its arguments, as pickle does."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")


def test_errors_that_cannot_be_sent():
    ours, theirs = multiprocessing.Pipe()
    for sent, received in ((TwoFacts(3, "no"), "RuntimeError('TwoFacts: 3: no')"), (KeyError("a"), "KeyError('a')")):
        _send(theirs, sent)
        assert repr(ours.recv()) == received


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_resumes(photos, watched, expected, how, workers):
    (watched / "gate").touch()
    out = watched / "out"
    driver = start(photos, out, workers=workers)
    held = wait_for(lambda: len(waiting(watched)) == max(1, workers) and waiting(watched), driver)
    begin = time.monotonic()
    driver.send_signal(how)
    output, _ = driver.communicate(timeout=10)
    assert time.monotonic() - begin < 10
    assert driver.returncode == (143 if how == signal.SIGTERM else -9), output
    assert ("stopped; run the same command to resume" in output) == (how == signal.SIGTERM)
    wait_for(lambda: all(map(gone, held)), seconds=10)
    (watched / "gate").unlink()
    assert run_small(photos, out, MODEL).finished == 6
    assert contents(out) == expected and no_leftovers(out)


def test_an_automatic_batch_resumes(photos, watched):
    (watched / "gate").touch()
    out = watched / "out"
    driver = start(photos, out, workers=2, sparsity="auto", keep=".99,.5", draws=2, methods="saliency")
    held = wait_for(lambda: len(waiting(watched)) == 2 and waiting(watched), driver)
    driver.kill()
    driver.communicate(timeout=10)
    wait_for(lambda: all(map(gone, held)), seconds=10)
    (watched / "gate").unlink()
    options = {"sparsity": "auto", "keep": (0.5, 0.99), "draws": 2, "methods": ["saliency"]}
    assert run_small(photos, out, MODEL, **options, workers=2, samples_per_solve=3).finished == 6
    run_small(photos, watched / "undisturbed", MODEL, **options)
    assert contents(out) == contents(watched / "undisturbed") and no_leftovers(out)


def test_sigterm_ends_native_code_too():
    code = """
import torch
from spade_fast._util.sigterm import exit_on_sigterm
x = torch.rand(14000, 14000)
with exit_on_sigterm(grace=0.5):
    print("in", flush=True)
    x.mm(x)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    time.sleep(0.5)
    process.terminate()
    assert process.wait(5) == 143


def test_two_runs_on_one_folder(photos, watched, expected):
    (watched / "gate").touch()
    out = watched / "out"
    runs = [start(photos, out, workers=0, **{"samples-per-solve": size, "pack": size + 1}) for size in (1, 2)]
    wait_for(lambda: len(waiting(watched)) == 2, *runs)
    (watched / "gate").unlink()
    for process in runs:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "6 samples: 6 finished" in output, output
    assert contents(out) == expected and no_leftovers(out) and len(Results(out)) == 6
    assert sum(map(int, (watched / "solved").read_text().split())) == 6, "none was solved twice"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_ends_the_run(photos, watched, expected, small_disk, workers):
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(free - 60 * 1024))
    out = small_disk / "out"
    with pytest.raises(OutputError, match="No space left on device"):
        run_small(photos, out, MODEL, workers=workers, samples_per_solve=1)
    made = contents(out)
    assert 0 < len(made) < 6 and all(expected[name] == content for name, content in made.items())
    assert no_leftovers(out)
    (small_disk / "filler").unlink()
    assert run_small(photos, out, MODEL).before == len(made)
    assert contents(out) == expected
