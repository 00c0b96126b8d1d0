"""What the ops' functions have in common: calls from several threads, and the meta device."""

from __future__ import annotations

import sys

import pytest
import torch

from spade_fast import ops
from tests.programs import run

# A program of its own: what it guards against ends a process.
FIRST_CALLS = """
import threading
import torch
from spade_fast import ops

threads, results = 8, []
start = threading.Barrier(threads)
x = torch.randn(1, 30, 20)

def call():
    start.wait()
    results.append(ops.gram_linear_(torch.zeros(1, 20, 20), x).triu())

workers = [threading.Thread(target=call) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert len(results) == threads and all(torch.equal(results[0], other) for other in results)
print("ok")
"""


def test_first_calls_in_many_threads() -> None:
    run(FIRST_CALLS)


@pytest.mark.skipif(not hasattr(sys, "_is_gil_enabled"), reason="this Python has no free-threaded build")
def test_free_threaded_python_keeps_its_lock_off() -> None:
    run(
        "import sys\nbefore = sys._is_gil_enabled()\nimport spade_fast.ops._C\n"
        'print("ok" if sys._is_gil_enabled() == before else "on")'
    )


def test_what_needs_no_values_works_on_the_meta_device() -> None:
    gram = torch.zeros(1, 3, 3, device="meta")
    assert ops.gram_linear_(gram, torch.zeros(1, 5, 3, device="meta")) is gram
    with pytest.raises(ValueError, match="x must hold values"):
        ops.gram_linear_(torch.zeros(1, 3, 3), torch.zeros(1, 5, 3, device="meta"))
