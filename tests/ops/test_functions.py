"""What the ops' functions do beside each op's own work: threads, and the choice of the instruction set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spade_fast import ops

# Programs of their own: what they guard against ends a process.
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
CHOICE_MEANWHILE = """
import threading
import torch
from spade_fast import ops

torch.manual_seed(0)
torch.set_num_threads(1)
weight, x, images = torch.randn(3, 5, 40), torch.randn(3, 90, 40), torch.randn(4, 40, 6, 6).bfloat16()
hessian = ops.mirror_upper_(ops.gram_linear_(torch.zeros(3, 40, 40), x))
factor = ops.inverse_cholesky(hessian, 0.1)[0]
counts = torch.full((3, 40), 2)
CALLS = {
    "sparsegpt": lambda: ops.sparsegpt(weight, factor, counts, 1)[0],
    "gram_conv2d_": lambda: ops.gram_conv2d_(torch.zeros(1, 1, 360, 360), images, (3, 3)).triu(),
    "depthwise": lambda: ops.gram_conv2d_(torch.zeros(1, 40, 9, 9), images.float(), (3, 3)).triu(),
}

expected = {name: [] for name in CALLS}
for level in ops.simd_levels():
    ops.set_simd_level(level)
    for name, call in CALLS.items():
        expected[name].append(call())
done, wrong = threading.Event(), []

def work(name):
    for _ in range(CALLS_EACH):
        result = CALLS[name]()
        if not any(torch.equal(result, right) for right in expected[name]):
            wrong.append(name)

def choose():
    while not done.is_set():
        for level in ops.simd_levels():
            ops.set_simd_level(level)

chooser = threading.Thread(target=choose)
workers = [threading.Thread(target=work, args=(name,)) for name in CALLS]
for thread in (chooser, *workers):
    thread.start()
for worker in workers:
    worker.join()
done.set()
chooser.join()
assert not wrong, wrong
print("ok")
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


def test_first_calls_in_many_threads() -> None:
    run(FIRST_CALLS)


@pytest.mark.skipif(len(ops.simd_levels()) < 2, reason="there is no choice of instruction sets")
def test_an_instruction_set_can_be_chosen_while_ops_run() -> None:
    """A call keeps to one: its result is that of one of them."""
    run(CHOICE_MEANWHILE.replace("CALLS_EACH", "600"))


@pytest.mark.skipif(not hasattr(sys, "_is_gil_enabled"), reason="this Python has no free-threaded build")
def test_free_threaded_python_keeps_its_lock_off() -> None:
    run(
        "import sys\nbefore = sys._is_gil_enabled()\nimport spade_fast.ops._C\n"
        'print("ok" if sys._is_gil_enabled() == before else "on")'
    )


def test_instruction_sets_have_names() -> None:
    before = ops.simd_level()
    with pytest.raises(TypeError, match="name must be a string, got int"):
        ops.set_simd_level(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mmx' is not available here; available: generic"):
        ops.set_simd_level("mmx")
    assert ops.simd_level() == before


def test_what_needs_no_values_works_on_the_meta_device() -> None:
    gram = torch.zeros(1, 3, 3, device="meta")
    assert ops.gram_linear_(gram, torch.zeros(1, 5, 3, device="meta")) is gram
    with pytest.raises(ValueError, match="x must hold values"):
        ops.gram_linear_(torch.zeros(1, 3, 3), torch.zeros(1, 5, 3, device="meta"))
