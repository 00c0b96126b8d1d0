"""The scripts for clusters: what they start, and that they agree with the command line and with one another."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

typer = pytest.importorskip("typer")
yaml = pytest.importorskip("yaml")

from spade_fast.cli.app import app  # noqa: E402

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "cluster"
STUBS = {
    "ray": 'echo "$RAY_AUTH_MODE:${#RAY_AUTH_TOKEN} ray $*" >> calls',
    "srun": 'echo "srun $*" >> calls',
    "scontrol": 'echo "scontrol $*" >> calls',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "python": f'[ "$1" = -c ] && exec {shlex.quote(sys.executable)} "$@"',  # all but the wait for the nodes
    "spade-fast": 'echo "spade-fast $*" >> calls; exit 1',
}


def parsed(words: list[str]) -> dict[str, Any]:
    """Options of a ``spade-fast batch`` command, as the real command line understands them."""
    assert words[:2] == ["spade-fast", "batch"]
    command = typer.main.get_command(app).commands["batch"]
    return command.make_context("batch", words[2:]).params


@pytest.fixture
def job(tmp_path):
    """Runs the script in a job of two nodes, where other programs only note what is asked of them."""

    def run(**environment: str) -> tuple[int, list[list[str]]]:
        (tmp_path / "calls").touch()
        for name, line in STUBS.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
            (tmp_path / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/home/me", "SLURMD_NODENAME": "n1", **slurm}
        done = subprocess.run(["bash", FOLDER / "slurm.sh"], cwd=tmp_path, env={**given, **environment}, timeout=60)
        return done.returncode, [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


@pytest.mark.parametrize(("gpus", "device"), [("4", "cuda"), ("", "cpu")])
def test_slurm_script(job, gpus, device):
    status, calls = job(**({"SLURM_GPUS_ON_NODE": gpus} if gpus else {}))
    assert status == 1  # that of spade-fast
    options = parsed(next(call for call in calls if call[0] == "spade-fast"))
    assert options["samples"] == "/home/me/photos" and options["out"] == Path("/home/me/traces")
    assert (options["engine"], options["device"], options["workers"]) == ("ray", device, None)
    assert options["address"] == "10.0.0.1:22345"
    head = next(call for call in calls if "--head" in call)
    others = next(call for call in calls if call[0] == "srun")
    assert head[0] == "token:64" and head[head.index("--include-dashboard") + 1] == "false"
    assert head[head.index("--port") + 1] == "22345" and others[others.index("--address") + 1] == options["address"]
    for call in (head, others):
        assert call[call.index("--num-gpus") + 1] == (gpus or "0") and call[call.index("--num-cpus") + 1] == "16"


def test_slurm_script_is_queued_again_before_its_time_is_up(job, monkeypatch):
    monkeypatch.setitem(STUBS, "spade-fast", "kill -USR1 $PPID; sleep 0.3; exit 143")
    status, calls = job()
    assert status == 143 and ["scontrol", "requeue", "12345"] in calls


def test_rayjob():
    claim, job = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    options = parsed(shlex.split(job["spec"]["entrypoint"]))
    assert (options["engine"], options["address"], options["device"]) == ("ray", "auto", "cuda")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    for pod in pods:
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert container["image"] == pods[0]["containers"][0]["image"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        for path in (options["samples"], options["out"]):
            assert Path(mount["mountPath"]) in Path(path).parents


def test_versions_agree():
    _, job = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    ray = job["spec"]["rayClusterSpec"]["rayVersion"]
    image = (FOLDER / "Dockerfile").read_text()
    assert re.findall(r"\bray(?::|==)([\d.]+)", image) == [ray, ray]
    assert re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1] in image
