"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spade_fast import ops


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ops.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per instruction set of this processor."""
    before = ops.simd_level()
    ops.set_simd_level(request.param)
    yield request.param
    ops.set_simd_level(before)
