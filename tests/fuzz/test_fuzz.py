"""The commands of this folder, with few calls, and that they notice what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuzz import ops as of_ops
from fuzz.watch import watch
from spade_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's, about kinds of tensors that are tried
ROOT = Path(__file__).parents[2]


def test_calls_of_the_ops() -> None:
    command = [sys.executable, "-m", "tests.fuzz.ops", "--calls", "300", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "300 calls: " in done.stdout, done.stdout + done.stderr


CHILD = """
import os, sys, time
for number in range(int(sys.argv[1]), 5):
    print("call", number, flush=True)
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(60)
    print("fail is wrong" if number == 2 else "ok right", flush=True)
"""


def test_crashes_and_hangs_are_noticed() -> None:
    found = watch(lambda first: [sys.executable, "-c", CHILD, str(first)], 0, 5, patience=2.0)
    assert dict(found.outcomes) == {"right": 2}
    assert {number: text.split(":")[0] for number, text in found.failures.items()} == {
        1: "crashes",
        2: "is wrong",
        3: "hangs",
    }


@pytest.mark.parametrize("name", of_ops.DRAWS)
def test_wrong_results_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 calls some are right in the dtype and sizes that are compared."""
    before, right = ops.simd_level(), getattr(ops, name)

    def wrong(**given: object) -> object:
        result = right(**given)
        if not name.endswith("_"):
            return (result[0] + 1, *result[1:]) if isinstance(result, tuple) else result + 1
        return result if result.is_meta else result.add_(1)

    monkeypatch.setattr(of_ops, "DRAWS", {name: of_ops.DRAWS[name]})
    assert not [number for number in range(200) if of_ops.run(number, 3)[1]]
    monkeypatch.setattr(ops, name, wrong)
    assert [number for number in range(200) if of_ops.run(number, 3)[1]]
    ops.set_simd_level(before)


def test_what_is_accepted_by_one_kernel_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.obs_path

    def lenient(weight: torch.Tensor, hinv: torch.Tensor, block: int) -> object:
        try:
            return right(weight, hinv, block)
        except ValueError:
            if weight.is_meta:
                raise
            return right(weight, hinv, 1)

    monkeypatch.setattr(of_ops, "DRAWS", {"obs_path": of_ops.draw_path})
    monkeypatch.setattr(ops, "obs_path", lenient)
    found = [of_ops.run(number, 3)[1] for number in range(100)]
    assert any(text.startswith("obs_path: native accepted") and "fake ValueError" in text for text in found)
