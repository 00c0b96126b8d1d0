"""Metrics of attribution maps (localisation, deletion, insertion) and of pruned outputs, with confidence intervals.

Attribution maps ``[S, H, W]``, one per sample, are larger where a pixel matters more. Scores ``[S]`` are float64 on the
device of the maps, one per sample, and NaN where the score of a sample is undefined.
"""

from spade_fast.attribution.metrics.decisions import Agreement, agreement
from spade_fast.attribution.metrics.intervals import bootstrap_interval
from spade_fast.attribution.metrics.localisation import energy_inside, localisation_auc, pointing_game
from spade_fast.attribution.metrics.perturbation import auc, deletion_curve, insertion_curve

__all__ = [
    "Agreement",
    "agreement",
    "auc",
    "bootstrap_interval",
    "deletion_curve",
    "energy_inside",
    "insertion_curve",
    "localisation_auc",
    "pointing_game",
]
