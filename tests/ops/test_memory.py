"""Freed memory is kept during a block and returned afterwards, and torch's allocator is put back."""

from __future__ import annotations

import ctypes
import gc
import mmap
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spade_fast.ops._native import _C
from spade_fast.ops.memory import keep_freed_memory
from spade_fast.pruning import calibration
from spade_fast.pruning.calibration import calibrate
from spade_fast.pruning.layers import find_layers

NOTHING = (False, 0, 0)  # not installed, no bytes in use, none kept
MIB = 1 << 20


class C10:
    """The allocators of torch's CPU tensors, by C++ names of its library."""

    def __init__(self) -> None:
        library = Path(torch.__file__).parent / "lib" / "libc10.so"
        if not library.exists():
            pytest.skip("C++ names are those of Linux")
        self._library = ctypes.CDLL(str(library))
        self._cpu = ctypes.c_int8(0)
        self.own = self._pointer("_ZN3c1022GetDefaultCPUAllocatorEv")
        self.other = self._pointer("_ZN3c1028GetDefaultMobileCPUAllocatorEv")

    def current(self) -> int:
        return self._pointer("_ZN3c1012GetAllocatorERKNS_10DeviceTypeE", ctypes.byref(self._cpu))

    def set(self, allocator: int) -> None:
        function = self._library["_ZN3c1012SetAllocatorENS_10DeviceTypeEPNS_9AllocatorEh"]
        function(self._cpu, ctypes.c_void_p(allocator), ctypes.c_uint8(0))

    def _pointer(self, name: str, *arguments: object) -> int:
        function = self._library[name]
        function.restype = ctypes.c_void_p
        return int(function(*arguments))


@pytest.fixture(autouse=True)
def c10() -> Iterator[C10]:
    """Torch's own allocator is in place before a test, and all memory is returned after it."""
    found = C10()
    before = found.current()  # after tests of the emulated CUDA kernels, theirs
    found.set(found.own)
    gc.collect()
    assert _C.kept_memory() == NOTHING
    yield found
    gc.collect()
    assert _C.kept_memory() == NOTHING
    found.set(before)


def block(mib: int) -> Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_a_freed_block_is_used_again() -> None:
    with keep_freed_memory():
        address = block(4).data_ptr()
        assert _C.kept_memory() == (True, 0, 4 * MIB)
        again = block(4)
        assert again.data_ptr() == address and _C.kept_memory() == (True, 4 * MIB, 0)
        del again


def test_a_freed_block_is_divided_and_joined() -> None:
    with keep_freed_memory():
        address = block(8).data_ptr()
        parts = [block(3), block(1), block(4)]
        assert [part.data_ptr() - address for part in parts] == [0, 3 * MIB, 4 * MIB]
        for part in (1, 0, 2):
            parts[part] = torch.empty(0)
        assert block(8).data_ptr() == address


def test_the_smallest_block_that_is_large_enough_is_used() -> None:
    with keep_freed_memory():
        block(29)
        blocks = [block(size) for size in (12, 1, 6, 1, 9)]  # side by side
        address = blocks[2].data_ptr()
        del blocks[4], blocks[2], blocks[0]
        assert block(5).data_ptr() == address
        del blocks


def test_little_more_is_kept_than_was_in_use() -> None:
    with keep_freed_memory():
        held = block(8), block(2), block(8)
        del held
        assert _C.kept_memory() == (True, 0, 18 * MIB)
        torch.empty(20 * MIB + 1, dtype=torch.uint8)
        held = tuple(block(1) for _ in range(20))
        blocks = list(held)
        del held, blocks[::2]
        large = block(4)  # fits into none of the ten
        _, used, kept = _C.kept_memory()
        assert used == 14 * MIB and 4 * MIB < kept < 21.3 * MIB - used and kept % mmap.PAGESIZE == 0
        del large, blocks


def test_the_system_clears_no_pages_again() -> None:
    with keep_freed_memory():
        torch.zeros(40 * MIB, dtype=torch.uint8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.zeros(40 * MIB, dtype=torch.uint8)
        # 400 MiB are 6400 pages even if these are of 64 KiB.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


def test_small_and_empty_tensors_are_left_to_torch() -> None:
    with keep_freed_memory():
        small, empty = torch.empty(MIB // 16, dtype=torch.uint8), torch.empty(0)
        assert _C.kept_memory() == (True, 0, 0) and empty.data_ptr() == 0
    small.fill_(1)


def test_the_allocator_is_put_back(c10: C10) -> None:
    assert c10.current() == c10.own
    with keep_freed_memory():
        assert c10.current() not in (c10.own, c10.other)
        block(1)
    assert c10.current() == c10.own
    with pytest.raises(KeyError), keep_freed_memory():
        block(1)
        raise KeyError
    assert c10.current() == c10.own


def test_another_allocator_stays_in_place(c10: C10) -> None:
    c10.set(c10.other)
    with keep_freed_memory():
        assert c10.current() == c10.other
        block(1)
    assert c10.current() == c10.other
    c10.set(c10.own)
    with keep_freed_memory():
        kept = block(1)
        c10.set(c10.other)
        assert c10.current() == c10.other
    assert c10.current() == c10.other
    del kept
    assert c10.current() == c10.other


def test_an_allocator_put_back_by_others_is_harmless(c10: C10) -> None:
    with keep_freed_memory():
        ours = c10.current()
    c10.set(ours)
    tensor = block(1).fill_(3)
    assert int(tensor.sum()) == 3 * MIB and _C.kept_memory() == (True, 0, 0)
    del tensor
    with keep_freed_memory():
        block(1)
    assert c10.current() == c10.own


def test_blocks_may_overlap() -> None:
    first, second = keep_freed_memory(), keep_freed_memory()
    first.__enter__()
    second.__enter__()
    address = block(4).data_ptr()
    first.__exit__(None, None, None)
    assert block(4).data_ptr() == address
    second.__exit__(None, None, None)
    _C.end_keeping_memory()  # one too many changes nothing
    with keep_freed_memory():
        assert _C.kept_memory()[0]


def test_tensors_outlive_the_block(c10: C10) -> None:
    with keep_freed_memory():
        large = torch.arange(MIB)
        small, grown = torch.arange(100), torch.arange(10)
    assert _C.kept_memory() == (True, 8 * MIB, 0)
    assert large.equal(torch.arange(MIB)) and small.equal(torch.arange(100))
    grown.resize_(MIB).fill_(5)  # by the allocator that it was made by
    assert _C.kept_memory() == (True, 8 * MIB, 0)
    large.resize_(2 * MIB)
    assert large[:MIB].equal(torch.arange(MIB)) and c10.current() == c10.own


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednn_frees_by_whichever_allocator_is_in_place(c10: C10) -> None:
    values = torch.randn(1000, 1000)
    before = values.to_mkldnn()
    with keep_freed_memory():
        assert before.to_dense().equal(values)
        del before
        inside = values.to_mkldnn()
    assert inside.to_dense().equal(values)
    assert c10.current() != c10.own
    del inside
    assert c10.current() == c10.own


def test_threads_share_the_memory() -> None:
    def work(seed: int) -> None:
        chance = random.Random(seed)
        held: list[tuple[Tensor, int]] = []
        for step in range(300):
            with keep_freed_memory():
                value = (seed * 97 + step) % 251
                held.append((torch.full((chance.randrange(1, 60) << 13,), value, dtype=torch.uint8), value))
                if len(held) > 5:
                    tensor, value = held.pop(chance.randrange(len(held)))
                    assert bool((tensor == value).all())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        torch.set_num_threads(threads)


def test_a_block_is_freed_by_another_thread() -> None:
    with keep_freed_memory():
        held = [block(4)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert _C.kept_memory() == (True, 0, 4 * MIB)


def test_memory_that_is_kept_is_given_up_before_an_allocation_fails() -> None:
    with keep_freed_memory():
        block(4)
        with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate 72057594037927936 bytes"):
            torch.empty(1 << 56, dtype=torch.uint8)
        assert _C.kept_memory() == (True, 0, 0)


def test_the_profiler_sees_every_tensor() -> None:
    def sizes() -> list[int]:
        with torch.profiler.profile(profile_memory=True) as profile:
            large, small = torch.ones(MIB), torch.ones(10)
            del large, small
            torch.ones(MIB)
        return [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]

    expected = sizes()
    assert expected
    with keep_freed_memory():
        assert sizes() == expected


FORK = """
import os, torch
from spade_fast.ops._native import _C
from spade_fast.ops.memory import keep_freed_memory

def size(): return sum(_C.kept_memory()[1:])
def status(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with keep_freed_memory():
    held = torch.ones(1 << 20)
    del_me = torch.ones(1 << 20)
    del del_me
    if not (child := os.fork()):
        assert _C.kept_memory() == (True, 4 << 20, 0)
        assert held.eq(1).all()
        torch.ones(1 << 20)
        assert size() == 4 << 20
        del held
        assert _C.kept_memory() == (False, 0, 0)
        with keep_freed_memory():
            torch.ones(1 << 20)
            assert size() == 4 << 20
    if child:
        assert status(child) == 0
        assert size() == 8 << 20
if not child:
    assert _C.kept_memory() == (False, 0, 0)
    os._exit(0)
del held
if not (child := os.fork()):
    torch.ones(1 << 20)
    os._exit(int(_C.kept_memory() != (False, 0, 0)))
assert status(child) == 0 and _C.kept_memory() == (False, 0, 0)
"""

EXIT = """
import sys, torch
from spade_fast.ops.memory import keep_freed_memory

class Late:
    def __del__(self): assert torch.ones(1 << 20).eq(1).all()

section = keep_freed_memory()
section.__enter__()
sys.held = [torch.ones(1 << 20), torch.ones(1 << 20).numpy(), Late()]
"""


LIMIT = """
import resource, torch
from spade_fast.ops._native import _C
from spade_fast.ops.memory import keep_freed_memory

held = [torch.empty(1) for _ in range(4000)]  # so that Python itself needs no more memory
with keep_freed_memory():
    torch.empty(1 << 30, dtype=torch.uint8)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for index in range(2000):
        held[index] = torch.empty(100 << 10, dtype=torch.uint8)
    assert _C.kept_memory() == (True, 0, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits and sizes of the address space")
def test_small_tensors_get_the_memory_that_is_kept() -> None:
    run = subprocess.run([sys.executable, "-c", LIMIT], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("program", [FORK, EXIT], ids=["fork", "exit"])
def test_processes_end_well(program: str) -> None:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


class Convolutions(nn.Module):
    """Its outputs are larger than what is left to torch; notes whether memory is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.seen: list[tuple[bool, int, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images).relu()
        result = self.second(hidden)
        self.seen.append(_C.kept_memory())
        if len(self.seen) == 99:
            raise ArithmeticError
        return result


def test_calibration_keeps_memory_and_sums_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    images = torch.randn(32, 3, 40, 40)
    layers = find_layers(model)[0]
    found = calibrate(model, images, layers).grams
    installed, used, kept = model.seen[-1]
    assert installed and used > 0 and kept > 0
    assert not any(_C.kept_memory()[1:])
    model.seen = []
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "keep_freed_memory", torch.no_grad)
        expected = calibrate(model, images, layers).grams
    assert set(model.seen) == {NOTHING}
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


def test_nothing_is_kept_after_a_calibration_that_fails() -> None:
    model = Convolutions()
    model.seen = [NOTHING] * 98
    with pytest.raises(ArithmeticError):
        calibrate(model, torch.randn(8, 3, 40, 40), find_layers(model)[0])
    assert model.seen[-1][0]
