"""A method between the two of the package, which tells what MACO's magnitudes contribute and what its views do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS, Fourier, Maco, Parametrization

FOURIER_MACO_VIEWS = "fourier, MACO's views"


class FourierWithMacoViews(Fourier):
    """All coefficients are free, as in `Fourier`, but the network sees the same views as with `Maco`."""

    views = Maco.views


@contextmanager
def own_methods() -> Iterator[None]:
    """Let `visualize` know the method of the studies during a ``with`` block."""
    methods = cast(dict[str, type[Parametrization]], PARAMETRIZATIONS)
    methods[FOURIER_MACO_VIEWS] = FourierWithMacoViews
    try:
        yield
    finally:
        del methods[FOURIER_MACO_VIEWS]
