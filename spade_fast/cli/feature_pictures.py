"""Draws what excites a feature, in a dense network and in traces of it, into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spade_fast._util.files import check_device, output_folder
from spade_fast.attribution.feature_visualization import Feature, Progress, visualize
from spade_fast.inputs.networks import load_model
from spade_fast.pruning.traces import Trace


def draw_feature(
    feature: Feature,
    model: str,
    traces: Sequence[Path],
    out: Path,
    *,
    steps: int = 512,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``dense.png``, and a picture for each trace, named as its file.

    Parameters
    ----------
    feature
        What to excite.
    model
        Name for `load_model`.
    traces
        Trace files made from this model.
    out
        Folder, made if it is not there. Nothing appears in it before all pictures are complete.
    steps, seed
        As in `visualize`.
    device
        Where to compute, as torch names it.
    progress
        Called as ``progress(stage, step, steps)``.

    Returns
    -------
    list of Path

    Raises
    ------
    ValueError, FileNotFoundError, OSError, ImportError
        No such feature, model or device; no trace file, one of another model, or two of one name; a folder that cannot
        be written; a package that is missing.
    """
    check_device(device)
    loaded = {"dense": None, **{path.stem: Trace.load(path) for path in traces}}
    if len(loaded) != len(traces) + 1:
        names = ", ".join(path.name for path in traces)
        raise ValueError(f"trace files must have names of their own, other than 'dense', got {names}")
    network = load_model(model)
    module = network.module.to(device)
    size = (network.crop, network.crop)
    with output_folder(out) as folder:
        for name, trace in loaded.items():
            report = None if progress is None else partial(_named, progress, name)
            with nullcontext() if trace is None else trace.applied(module):
                picture = visualize(
                    module,
                    feature,
                    size=size,
                    mean=network.mean,
                    std=network.std,
                    steps=steps,
                    seed=seed,
                    progress=report,
                )
            _save(picture, folder / f"{name}.png")
    return [out / f"{name}.png" for name in loaded]


def _named(progress: Progress, name: str, stage: str, done: int, total: int) -> None:
    progress(f"{name}: {stage}", done, total)


def _save(picture: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * picture).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
