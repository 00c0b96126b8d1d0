"""Batches on a real Ray cluster of this machine, under real faults."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")
if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)

from batches import contents, make_photos, no_leftovers, run_small, settings
from batches_network import FOLDER, Deadly
from test_engine_processes import MODEL, PATIENCE, gone, kill_both_waiting, start, wait_for, waiting
from typer.testing import CliRunner

from spade_fast.batch import OutputError, run
from spade_fast.batch.engine_ray import _CLUSTERS, _ready, connected
from spade_fast.batch.schedule import POLL
from spade_fast.cli.app import app

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "photos"
    make_photos(folder, 6)
    return folder


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> Path:
    """The folder in which the network looks for the gate, in this process and in those of the cluster."""
    folder = tmp_path_factory.mktemp("notes")
    os.environ[FOLDER] = str(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(notes):
    with connected(None):
        yield


@pytest.fixture
def gate(notes) -> Path:
    for path in notes.iterdir():
        path.unlink()
    (notes / "gate").touch()
    return notes


@pytest.fixture(scope="module")
def expected(photos, notes, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_small(photos, out, MODEL)
    return contents(out)


# Before the cluster of the other tests is started: a process has one at a time.
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "engine 'ray' needs Ray: pip install 'spade_fast[cluster]'"),
        ("127.0.0.1:1", "Ray replaces 127.0.0.1 by this machine's external address"),
        ("127.0.0.2:1", "there is no Ray cluster at 127.0.0.2:1: [Errno 111]"),
        ("host:x", "there is no Ray cluster at host:x"),
        ("ray://127.0.0.1:1", "address must be HOST:PORT or 'auto'"),
        ("local", "address must be HOST:PORT or 'auto'"),
        ("", "address must be HOST:PORT or 'auto'"),
    ],
)
def test_clusters_that_cannot_be_used(photos, notes, tmp_path, monkeypatch, address, message):
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ["--model", MODEL, "--out", str(tmp_path / "out"), "--engine", "ray"]
    result = CliRunner().invoke(
        app, ["batch", str(photos), *options, *([] if address is None else ["--address", address])]
    )
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_resumes(photos, gate, expected, tmp_path, how):
    out = tmp_path / "out"
    driver = start(photos, out, engine="ray", workers=1)
    held = wait_for(lambda: waiting(gate), driver)
    begin = time.monotonic()
    driver.send_signal(how)
    output, _ = driver.communicate(timeout=10)
    assert time.monotonic() - begin < 10
    assert driver.returncode == (143 if how == signal.SIGTERM else -9), output
    wait_for(lambda: all(map(gone, held)), seconds=20)
    (gate / "gate").unlink()
    assert run_small(photos, out, MODEL).finished == 6
    assert contents(out) == expected and no_leftovers(out)


def listening(process: int) -> set[str]:
    """Addresses, as the kernel writes them, on which a process and its children listen."""
    found, sockets = set(), set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            sockets.add(os.readlink(entry))
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                found.add(columns[1].split(":")[0])
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= listening(int(child))
    return found


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.2:1", "there is no Ray cluster at 127.0.0.2:1, the address from RAY_ADDRESS: [Errno 111]"),
        ("ray://127.0.0.2:1", "RAY_ADDRESS is 'ray://127.0.0.2:1': Invalid address"),
    ],
)
def test_an_address_in_the_environment_where_nobody_answers(photos, notes, tmp_path, monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    driver = start(photos, tmp_path / "out", engine="ray", address="auto")
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 2 and message in " ".join(output.split()), output
    assert not (tmp_path / "out").exists()


def raylets(parent: int) -> list[int]:
    """The raylets that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (path / "stat").read_text().rpartition(") ")[2].split()
            if int(state[1]) == parent and b"raylet" in (path / "cmdline").read_bytes().split(b"\0")[0]:
                found.append(int(path.name))
    return found


def test_a_raylet_that_dies(photos, gate, expected, tmp_path):
    out = tmp_path / "out"
    driver = start(photos, out, engine="ray", workers=1)
    wait_for(lambda: waiting(gate), driver)
    (raylet,) = raylets(driver.pid)
    os.kill(raylet, signal.SIGKILL)
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 2 and "the Ray node of this process died" in output, f"{driver.returncode} {output}"
    (gate / "gate").unlink()
    assert run_small(photos, out, MODEL).failed == {} and contents(out) == expected


def test_the_cluster_stays_on_loopback(cluster):
    addresses = listening(os.getpid())
    assert addresses and addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_the_cluster_has_a_token_of_its_own(cluster):
    import ray

    code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)"
    address = ray.get_runtime_context().gcs_address
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    env = {**without, _CLUSTERS: "0", "RAY_AUTH_MODE": "disabled", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    refused = subprocess.run([sys.executable, "-c", code, address], env=env, capture_output=True, text=True)
    assert refused.returncode != 0 and "Failed to connect" in refused.stderr
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_killed_workers_are_replaced_and_bad_samples_recorded(photos, gate, cluster, expected, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for name, size in (("cut.png", 200), ("empty.png", 0)):
        (tmp_path / "photos" / name).write_bytes((photos / "00.png").read_bytes()[:size])
    killer = kill_both_waiting(gate)
    out = tmp_path / "out"
    summary = run_small(tmp_path / "photos", out, MODEL, engine="ray", workers=2, samples_per_solve=2, pack=3)
    killer.join()
    assert summary.finished == 6 and sorted(summary.failed) == ["cut.png", "empty.png"] and (gate / "kept").exists()
    assert contents(out) == expected and no_leftovers(out) and not list(out.glob("traces/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "engine 'ray' needs at least 1 worker, got 0"),
        ({"device": "cuda:1"}, "with engine 'ray' device must be 'cuda', which Ray numbers, got 'cuda:1'"),
        ({"address": "127.0.0.1:1"}, "this process is connected to the Ray cluster at 127.0.0.1:"),
    ],
)
def test_what_a_cluster_cannot_do(photos, cluster, tmp_path, options, message):
    given = settings(MODEL, **{name: options.pop(name) for name in ["device"] if name in options})
    with pytest.raises(ValueError, match=message):
        run(photos, tmp_path / "out", **given, engine="ray", **options)


def test_the_address_of_the_cluster_in_use(cluster):
    import ray

    own = ray.get_runtime_context().gcs_address
    for address in ("auto", own, own.replace("127.0.0.1", "localhost")):
        with connected(address) as found:
            assert found.count_workers


def test_workers_whose_device_is_lost_are_replaced(photos, gate, cluster, expected, tmp_path):
    (gate / "gate").rename(gate / "broken")
    assert run_small(photos, tmp_path / "out", MODEL, engine="ray", workers=1).finished == 6
    assert not (gate / "broken").exists()
    assert contents(tmp_path / "out") == expected


def test_a_driver_without_work_waits():
    begin = time.monotonic()
    assert _ready([]) == [] and time.monotonic() - begin >= POLL


@pytest.fixture
def nodes(cluster, monkeypatch):
    """A cluster of two nodes, each with one processor, on loopback."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(_CLUSTERS, "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the network's module is not installed
    options = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    both = Cluster(initialize_head=True, head_node_args=options)
    both.add_node(**options)
    yield both
    both.shutdown()


def test_a_cluster_with_a_token_that_is_not_given(photos, nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")  # tries to connect, a second each
    driver = start(photos, tmp_path / "out", engine="ray", address=nodes.address)
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 2 and "if it has a token, set RAY_AUTH_MODE=token here too" in output


def test_a_run_continues_without_a_node_that_died(photos, gate, nodes, expected, tmp_path):
    out = tmp_path / "out"
    driver = start(photos, out, engine="ray", address=nodes.address, workers=2)
    held = wait_for(lambda: len(waiting(gate)) == 2 and waiting(gate), driver)
    (node,) = nodes.worker_nodes
    nodes.remove_node(node, allow_graceful=False)
    wait_for(lambda: sum(map(gone, held)) == 1, driver)
    (gate / "gate").unlink()
    output, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, output
    assert contents(out) == expected and no_leftovers(out)


def test_a_sample_that_kills_its_workers_is_given_up(cluster, gate, tmp_path):
    (gate / "gate").unlink()
    summary = run_small(Deadly(), tmp_path / "out", MODEL, engine="ray", workers=1)
    end = "The actor died unexpectedly before finishing this task"
    assert summary.failed == {"2": f"killed its worker 2 times, last with {end}"} and summary.finished == 3


def test_workers_that_cannot_be_started(cluster, gate, tmp_path):
    (gate / "gate").unlink()
    with pytest.raises(ValueError, match="no node of the cluster has 1000 processors for a worker"):
        run(Deadly(), tmp_path / "out", **settings(MODEL, threads=1000), engine="ray", workers=1)
    with pytest.raises(TypeError, match="the samples cannot be sent to other processes"):
        run_small([threading.Lock()] * 2, tmp_path / "out", MODEL, engine="ray", workers=1)


def test_a_full_disk_ends_the_run(photos, cluster, gate, small_disk, expected):
    (gate / "gate").unlink()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(free - 60 * 1024))
    out = small_disk / "out"
    with pytest.raises(OutputError, match="No space left on device"):
        run_small(photos, out, MODEL, engine="ray", workers=1, samples_per_solve=1)
    made = contents(out)
    assert 0 < len(made) < 6 and all(expected[name] == content for name, content in made.items())
