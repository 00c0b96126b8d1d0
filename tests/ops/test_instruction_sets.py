"""The choice of the instruction set."""

from __future__ import annotations

import pytest

from spade_fast import ops
from tests.programs import run

# A program of its own: what it guards against ends a process.
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


@pytest.mark.skipif(len(ops.simd_levels()) < 2, reason="there is no choice of instruction sets")
def test_an_instruction_set_can_be_chosen_while_ops_run() -> None:
    """A call keeps to one: its result is that of one of them."""
    run(CHOICE_MEANWHILE.replace("CALLS_EACH", "600"))


def test_instruction_sets_have_names() -> None:
    before = ops.simd_level()
    with pytest.raises(TypeError, match="name must be a string, got int"):
        ops.set_simd_level(3)
    with pytest.raises(ValueError, match="'mmx' is not available here; available: generic"):
        ops.set_simd_level("mmx")
    assert ops.simd_level() == before
