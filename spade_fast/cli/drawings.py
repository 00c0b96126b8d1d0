"""How the commands draw features: the settings, and the pictures of a feature of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spade_fast._util.checks import integer
from spade_fast._util.errors import DeadFeatureError
from spade_fast._util.modes import evaluation_mode
from spade_fast._util.progress import Progress, no_progress
from spade_fast._util.text import counted
from spade_fast.attribution.visualization import Feature, Visualization, visualize
from spade_fast.attribution.visualization.features import reading
from spade_fast.attribution.visualization.views import canvas
from spade_fast.cli.trace_photo import seen
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.photo import read_photo


@dataclass(frozen=True)
class Drawn:
    """What `Drawing.draw` makes of a feature.

    Attributes
    ----------
    pictures : sequence of ndarray ``[H, W, 3]``, uint8
    activations
        Of the feature in each picture.
    """

    pictures: Sequence[np.ndarray]
    activations: Sequence[float]


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
        """Raise the errors of `draw` that arise before the first step, except that the feature is dead."""
        with suppress(DeadFeatureError):
            self._visualize(network, index, layer, 0, no_progress)

    def draw(self, network: LoadedModel, index: int, layer: str | None, progress: Progress) -> Drawn:
        """Draw a feature of a network; what matters less is paler.

        Raises
        ------
        DeadFeatureError
            Nothing excites the feature.
        UserError
            As in `visualize`.
        """
        made = self._visualize(network, index, layer, self.steps, progress)
        colours = (255 * made.drawn()).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return Drawn(list(colours.permute(0, 2, 3, 1).numpy()), made.activations)

    def work(self, features: int, networks: int) -> str:
        """Say how much is to be drawn."""
        return f"{counted(features * networks * self.count, 'picture')} of {counted(self.steps, 'step')}"

    def first_picture(self, network: LoadedModel) -> np.ndarray | None:
        """Return the photo to begin with, in the size of the pictures, uint8 ``[H, W, 3]``; None without one."""
        from PIL import Image

        if self.start is None:
            return None
        height, width = canvas(network.size)
        return np.asarray(Image.fromarray(self._start_pixels(network)).resize((width, height)))

    def first_activation(self, network: LoadedModel, index: int, layer: str | None) -> float:
        """Return the activation of a feature of the dense network in the photo to begin with."""
        assert self.start is not None
        image = seen(read_photo(self.start), self.start, network)[0].to(network.black_image.device)
        read = reading(network.module, [self._feature(index, layer)], image)
        with evaluation_mode(network.module), torch.no_grad(), read as activations:
            return float(activations(image)[0])

    def settings(self) -> Mapping[str, Any]:
        """Return the settings as they are written into reports."""
        return {**asdict(self), "start": None if self.start is None else str(self.start)}

    def _feature(self, index: int, layer: str | None) -> Feature:
        return Feature(index, layer, self.neuron, self.contrast)

    def _start_pixels(self, network: LoadedModel) -> np.ndarray:
        assert self.start is not None
        return seen(read_photo(self.start), self.start, network)[1]

    def _visualize(
        self, network: LoadedModel, index: int, layer: str | None, steps: int, progress: Progress
    ) -> Visualization:
        start = None
        if self.start is not None:
            pixels = self._start_pixels(network)
            start = torch.from_numpy(pixels[..., : len(network.mean)]).permute(2, 0, 1) / 255
        return visualize(
            network.module,
            self._feature(index, layer),
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
