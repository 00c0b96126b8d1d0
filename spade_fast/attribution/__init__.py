"""Explanations on traces: saliency methods, feature visualisation, and measures of their quality (`metrics`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spade_fast.attribution import metrics
from spade_fast.attribution.feature_visualization import Feature, visualize
from spade_fast.attribution.methods import METHODS, Question, attribution_map, make_recipe
from spade_fast.attribution.prepare import prepare_for_attribution

if TYPE_CHECKING:
    from spade_fast.attribution.spade import Spade

__all__ = [
    "METHODS",
    "Feature",
    "Question",
    "Spade",
    "attribution_map",
    "make_recipe",
    "metrics",
    "prepare_for_attribution",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name == "Spade":  # needs captum, an extra
        from spade_fast.attribution.spade import Spade

        return Spade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
