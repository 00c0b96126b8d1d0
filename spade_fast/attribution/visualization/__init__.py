"""Feature visualisation: pictures that excite a class, channel, neuron or direction of a network or trace."""

from spade_fast.attribution.visualization.ascent import Visualization, visualize
from spade_fast.attribution.visualization.features import Feature

__all__ = ["Feature", "Visualization", "visualize"]
