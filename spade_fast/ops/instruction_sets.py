"""The choice among the instruction sets for which the CPU kernels are compiled."""

from __future__ import annotations

from spade_fast._util.errors import InvalidTypeError
from spade_fast.ops._native import _C


def simd_level() -> str:
    """Return the name of the instruction set in use: ``generic``, ``avx2`` or ``avx512``.

    Examples
    --------
    >>> from spade_fast import ops
    >>> ops.simd_level() in ops.simd_levels()
    True
    """
    return _C.simd_level()


def simd_levels() -> list[str]:
    """Return the names of the instruction sets that this processor supports, narrowest first.

    Examples
    --------
    >>> from spade_fast import ops
    >>> ops.simd_levels()[0]
    'generic'
    """
    return _C.simd_levels()


def set_simd_level(name: str) -> None:
    """Choose the instruction set of the calls that begin from now on, in all threads; for tests and measurements.

    Raises
    ------
    TypeError, ValueError
        `name` is not one of `simd_levels()`.

    Examples
    --------
    >>> from spade_fast import ops
    >>> ops.set_simd_level(ops.simd_level())
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"set_simd_level: name must be a string, got {type(name).__name__}")
    _C.set_simd_level(name)
