"""Explanations of a dense network or a trace: attribution methods, feature visualisation, attribution metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spade_fast.attribution import metrics
from spade_fast.attribution.drawing import overlay
from spade_fast.attribution.maps import mean_map
from spade_fast.attribution.methods import METHODS, Question, attribution_map, make_recipe
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.attribution.smoothgrad import SmoothGrad
from spade_fast.attribution.visualization import Feature, Visualization, visualize

if TYPE_CHECKING:
    from spade_fast.attribution.cam import GradCam, LayerCam
    from spade_fast.attribution.lrp import LRP
    from spade_fast.attribution.spade import Spade

__all__ = [
    "LRP",
    "METHODS",
    "Feature",
    "GradCam",
    "LayerCam",
    "Question",
    "SmoothGrad",
    "Spade",
    "Visualization",
    "attribution_map",
    "make_recipe",
    "mean_map",
    "metrics",
    "overlay",
    "prepare_for_attribution",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """Import the classes that need captum, an extra, on first use."""
    if name == "LRP":
        from spade_fast.attribution.lrp import LRP

        return LRP
    if name in ("GradCam", "LayerCam"):
        from spade_fast.attribution import cam

        return getattr(cam, name)
    if name == "Spade":
        from spade_fast.attribution.spade import Spade

        return Spade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
