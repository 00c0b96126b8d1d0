"""Freed memory is reused."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from spade_fast._util.malloc import keep_freed_memory

FAULTS = """
import resource, torch
from spade_fast._util.malloc import keep_freed_memory
for kept in (False, True):
    if kept:
        keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(60):
        torch.zeros(10 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="for glibc")
def test_large_blocks_are_used_again():
    output = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    # 40 MiB in pages of 4 KiB or 2 MiB, 60 times. The heap grows by a few blocks before freed ones fit the next.
    assert before >= 60 * 20 and after < before / 10


def test_other_systems_are_skipped(monkeypatch):
    asked = []

    def library(name):
        asked.append(name)
        return object()  # without mallopt

    monkeypatch.setattr(ctypes, "CDLL", library)
    keep_freed_memory()
    assert asked == [None]
