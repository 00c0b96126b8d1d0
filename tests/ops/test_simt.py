"""The harness that runs CUDA kernels on the CPU (simt/): correct kernels give correct results, and each kernel with a
deliberate fault is caught, while its corrected twin is not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from simt import emulator
from simt.build import HERE, build

Dims = tuple[int, int, int]
Launch = Callable[..., None]
SEEDS = range(4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(tmp_path_factory.mktemp("simt"), [HERE / "kernels.cu"])))
    library.launch.restype = ctypes.c_char_p
    return library


@pytest.fixture
def launch(library: ctypes.CDLL) -> Launch:
    """Run a kernel of simt/kernels.cu; if it fails, raise RuntimeError with the harness's message."""

    def run(
        name: str,
        out: np.ndarray,
        source: np.ndarray,
        n: int = 0,
        *,
        right: bool = True,
        grid: Dims = (1, 1, 1),
        block: Dims = (64, 1, 1),
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        library.simt_set_seed(ctypes.c_uint64(seed))
        for array in (out, source):
            library.simt_register(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        error = library.launch(
            name.encode(),
            right,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(shared),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_void_p(source.ctypes.data),
            n,
        )
        for array in (out, source):
            library.simt_unregister(ctypes.c_void_p(array.ctypes.data))
        if error is not None:
            raise RuntimeError(error.decode())

    return run


def _numbers(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 16, n).astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_sum(launch: Launch, seed: int) -> None:
    source, out = _numbers(1000), np.zeros(4, np.float32)
    launch("block_sum", out, source, 1000, grid=(4, 1, 1), block=(256, 1, 1), seed=seed)
    np.testing.assert_array_equal(out, [part.sum() for part in np.split(source, [256, 512, 768])])


@pytest.mark.parametrize("seed", SEEDS)
def test_histogram(launch: Launch, seed: int) -> None:
    source, out = _numbers(1000), np.zeros(16, np.float32)
    launch("histogram", out, source, 1000, grid=(3, 1, 1), block=(48, 1, 1), seed=seed)
    np.testing.assert_array_equal(out, np.bincount(source.astype(int), minlength=16))


@pytest.mark.parametrize("seed", SEEDS)
def test_transpose(launch: Launch, seed: int) -> None:
    source, out = np.arange(96 * 96, dtype=np.float32).reshape(96, 96), np.zeros((96, 96), np.float32)
    launch("transpose", out, source, 96, grid=(3, 3, 1), block=(32, 8, 1), shared=32 * 33 * 4, seed=seed)
    np.testing.assert_array_equal(out, source.T)


@pytest.mark.parametrize("name", ["copy4", "copy_bytes"])
@pytest.mark.parametrize("seed", SEEDS)
def test_copies(launch: Launch, name: str, seed: int) -> None:
    source, out = _numbers(1000), np.zeros(1000, np.float32)
    launch(name, out, source, 1000, grid=(2, 1, 1), block=(64, 1, 1), seed=seed)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_warps_and_votes(launch: Launch, seed: int) -> None:
    source, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    launch("half_warps", out, source, seed=seed)
    np.testing.assert_array_equal(out, np.full(64, 16 + 100 + 200 + 7000))


def test_order_depends_on_the_seed_only(launch: Launch) -> None:
    def first_caught(seed: int) -> str:
        with pytest.raises(RuntimeError) as caught:
            launch("barrier_after_write", np.zeros(64, np.float32), _numbers(64), right=False, seed=seed)
        return str(caught.value)

    assert first_caught(1) == first_caught(1)
    assert len({first_caught(seed) for seed in SEEDS}) > 1


CAUGHT = {
    "barrier_after_write": "shared race",
    "syncwarp_after_write": "shared race",
    "syncwarp_of_others": "shared race",
    "barrier_before_overwrite": "shared race",
    "same_value_by_two": "shared race",
    "atomic_and_plain": "shared race",
    "global_exchange_in_block": "global race",
    "word_of_each_block": "global race",
    "read_of_other_block": "global race",
    "atomic_in_one_block": "global race",
    "read_past_end": "out of bounds read",
    "write_past_end": "out of bounds write",
    "write_before_start": "out of bounds write",
    "dynamic_past_end": "out of bounds write",
    "stack_of_other_lane": "out of bounds read",
    "member_past_end": "index out of range",
    "misaligned": "misaligned access",
    "barrier_in_branch": "divergent barrier",
    "return_before_barrier": "divergent barrier",
    "circle": "deadlock",
    "shuffle_in_branch": "missing lane",
    "shuffle_beyond_mask": "missing lane",
    "shuffle_against_barrier": "missing lane",
}
TWO_BLOCKS = {"word_of_each_block", "read_of_other_block", "atomic_in_one_block"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CAUGHT)
def test_wrong_kernels_are_caught(launch: Launch, name: str, seed: int) -> None:
    blocks = 2 if name in TWO_BLOCKS else 1
    out, source = np.zeros(64 * blocks, np.float32), _numbers(64)
    settings = {"grid": (blocks, 1, 1), "shared": 256, "seed": seed}
    launch(name, out, source, 64, **settings)
    place = r"block \(\d,0,0\), thread \(\d+,0,0\)"
    with pytest.raises(RuntimeError, match=rf"^simt: {CAUGHT[name]}: kernel .*{name}<false>.*, {place}: "):
        launch(name, out, source, 64, right=False, **settings)
    launch(name, out, source, 64, **settings)


def test_messages_name_the_place(launch: Launch) -> None:
    line = 1 + next(
        i for i, text in enumerate((HERE / "kernels.cu").read_text().splitlines()) if "right ? i : i + 1" in text
    )
    with pytest.raises(RuntimeError) as caught:
        launch("write_past_end", np.zeros(64, np.float32), _numbers(64), 64, right=False)
    assert str(caught.value) == (
        "simt: out of bounds write: kernel void spade::cuda::(anonymous namespace)::write_past_end<false>"
        "(float*, float const*, int), block (0,0,0), thread (63,0,0): "
        f"writes 4 bytes at offset 256 of a buffer of 256 bytes, at {HERE / 'kernels.cu'}:{line}"
    )


def test_shared_memory_is_not_zero_at_first(launch: Launch) -> None:
    out = np.zeros(64, np.float32)
    launch("uninitialised", out, _numbers(64), shared=256)
    np.testing.assert_array_equal(out, np.full(64, 2))
    launch("uninitialised", out, _numbers(64), shared=256, right=False)
    assert out[0] == 2 and np.isnan(out[1:]).all()


@pytest.mark.parametrize("settings", [{"grid": (0, 1, 1)}, {"block": (33, 32, 1)}, {"shared": 48 * 1024 + 1}])
def test_launches_that_a_gpu_refuses(launch: Launch, settings: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match=r"^simt: invalid configuration"):
        launch("block_sum", np.zeros(1, np.float32), _numbers(64), 64, **settings)


def test_the_build_is_kept(library: ctypes.CDLL) -> None:
    folder = Path(library._name).parents[1]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.[os]*")}
    assert build(folder, [HERE / "kernels.cu"]) == Path(library._name)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.[os]*")} == before


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6)[1:3, ::2],
        torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        torch.ones(3, 1).expand(3, 5),
        torch.tensor(2.0),
        torch.empty(3, 0),
    ],
    ids=["sliced", "permuted", "expanded", "scalar", "empty"],
)
def test_copies_for_the_emulator_end_where_the_tensor_ends(tensor: torch.Tensor) -> None:
    copy = emulator.exact_copy(tensor)
    assert copy.equal(tensor) and copy.stride() == tensor.stride()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    assert copy.untyped_storage().nbytes() == (tensor.itemsize * (last + 1) if tensor.numel() else 0)
