"""Native ops: Gram matrices, Cholesky factors, exact OBS and SparseGPT, each on a batch of problems."""

from spade_fast.ops import fakes  # noqa: F401  registers them
from spade_fast.ops.factors import inverse_cholesky, reverse_cholesky
from spade_fast.ops.functions import (
    gram_conv2d_,
    gram_linear_,
    mirror_upper_,
    nm_path,
    obs_path,
    obs_solution,
    sparsegpt,
)
from spade_fast.ops.instruction_sets import set_simd_level, simd_level, simd_levels

__all__ = [
    "gram_conv2d_",
    "gram_linear_",
    "inverse_cholesky",
    "mirror_upper_",
    "nm_path",
    "obs_path",
    "obs_solution",
    "reverse_cholesky",
    "set_simd_level",
    "simd_level",
    "simd_levels",
    "sparsegpt",
]
