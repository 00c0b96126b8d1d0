"""How the commands draw features: the settings, and the pictures of a feature of one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spade_fast._util.checks import integer
from spade_fast._util.progress import Progress, no_progress
from spade_fast.attribution.visualization import Feature, Visualization, visualize
from spade_fast.attribution.visualization.views import canvas
from spade_fast.cli.trace_photo import seen
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.photo import read_photo


@dataclass(frozen=True)
class Drawing:
    """The settings of `visualize` that the command has.

    Attributes
    ----------
    method, views, steps, count, seed
        As in `visualize`.
    neuron, contrast
        As in `Feature`.
    start
        Path of a photo to begin with.
    """

    method: str = "maco"
    steps: int = 128
    views: int = 4
    count: int = 1
    neuron: bool = False
    contrast: bool = False
    start: Path | None = None
    seed: int = 0

    def check_settings(self) -> None:
        """Raise the errors that need no network."""
        integer("steps", self.steps, 1)
        if self.start is not None:
            read_photo(self.start)

    def check(self, network: LoadedModel, index: int, layer: str | None) -> None:
        """Raise the errors of `draw` that arise before the first step."""
        self._visualize(network, index, layer, 0, no_progress)

    def draw(self, network: LoadedModel, index: int, layer: str | None, progress: Progress) -> list[np.ndarray]:
        """Return the pictures ``[H, W, 3]``, uint8, of a feature of a network; what matters less is paler.

        Raises
        ------
        DeadFeatureError
            Nothing excites the feature.
        UserError
            As in `visualize`.
        """
        drawn = self._visualize(network, index, layer, self.steps, progress).drawn()
        colours = (255 * drawn).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return list(colours.permute(0, 2, 3, 1).numpy())

    def settings(self) -> Mapping[str, Any]:
        """Return the settings as they are written into reports."""
        return {**asdict(self), "start": None if self.start is None else str(self.start)}

    def _visualize(
        self, network: LoadedModel, index: int, layer: str | None, steps: int, progress: Progress
    ) -> Visualization:
        start = None
        if self.start is not None:
            _, pixels = seen(read_photo(self.start), self.start, network)
            start = torch.from_numpy(pixels[..., : len(network.mean)]).permute(2, 0, 1) / 255
        return visualize(
            network.module,
            Feature(index, layer, self.neuron, self.contrast),
            count=self.count,
            method=self.method,
            size=canvas(network.size),
            view=network.size,
            mean=network.mean,
            std=network.std,
            start=start,
            steps=steps,
            views=self.views,
            seed=self.seed,
            progress=progress,
        )
