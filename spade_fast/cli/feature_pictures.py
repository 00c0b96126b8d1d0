"""Feature visualisation of a dense network and its traces, saved as one image file per network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import whole_folder
from spade_fast._util.progress import Progress, titled
from spade_fast.attribution.feature_visualization import Feature, visualize
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.traces import Trace


def draw_feature(
    feature: Feature,
    traces: Sequence[Path],
    out: Path,
    setup: Setup,
    *,
    steps: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``dense.png``, and for each trace an image with the name of its file.

    Parameters
    ----------
    feature
        The activation to maximise.
    traces
        Trace files made from the network of `setup`.
    out
        Folder, created if it does not exist. Files appear in it only when all images are complete.
    setup
        Network and device.
    steps, seed
        As in `visualize`.
    progress
        Called as ``progress(stage, step, steps)``.

    Returns
    -------
    list of Path
        The image files.

    Raises
    ------
    ValueError
        The feature, model or device does not exist; a file is not a trace or is a trace of another model; two trace
        files have the same name.
    FileNotFoundError, OSError
        A trace file does not exist, or the folder cannot be written.
    ImportError
        A package is not installed; the message names the extra to install.
    """
    loaded = {"dense": None, **{path.stem: Trace.load(path) for path in traces}}
    require("PIL", "pictures need")
    if len(loaded) != len(traces) + 1:
        names = ", ".join(path.name for path in traces)
        raise InvalidValueError(f"trace files must have distinct names, other than 'dense', got {names}")
    network = setup.load_model()
    network.check_takes_photos()
    with whole_folder(out) as folder:
        for name, trace in loaded.items():
            report = None if progress is None else titled(progress, name)
            with nullcontext() if trace is None else trace.applied(network.module):
                picture = visualize(
                    network.module,
                    feature,
                    size=network.size,
                    mean=network.mean,
                    std=network.std,
                    steps=steps,
                    seed=seed,
                    progress=report,
                )
            _save(picture, folder / f"{name}.png")
    return [out / f"{name}.png" for name in loaded]


def _save(picture: Tensor, path: Path) -> None:
    from PIL import Image

    pixels = (255 * picture).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.squeeze(2).numpy()).save(path)
