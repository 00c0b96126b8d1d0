"""Traces a network for one photo and saves the trace to a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from spade_fast._util.files import check_file
from spade_fast._util.progress import Progress, no_progress
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import read_photo
from spade_fast.inputs.pil_pixels import Upright
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import SOLVERS, PruneConfig
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace
from spade_fast.targets.class_names import class_label


def trace_photo(
    image: Path,
    out: Path,
    config: PruneConfig,
    setup: Setup,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda _: None,
) -> Trace:
    """Prune a network for one photo and save the trace.

    Parameters
    ----------
    image
        Path of a photo.
    out
        File for the trace, in an existing folder.
    config
        What to prune.
    setup
        Network, device and number of calibration images.
    progress
        Called as ``progress(stage, done, total)``.
    warn
        Called with what `lost_decision` says if the trace lost the decision.

    Raises
    ------
    UserError
        As in `spade_fast.cli.explain.explain_photo`.
    """
    check_file(out, "the trace")
    photo = read_photo(image)
    model = setup.load_model()
    pixels = seen(photo, image, model)[0].to(setup.device)
    predict(model.module, pixels)  # checks that it returns logits
    batches = setup.augmenter(model, config.seed)(pixels, image.name)
    made = trace(model.module, batches, inputs=pixels, sample_id=image.name, progress=progress, **config.options())
    made.save(out)
    if made.decision is not None and not made.decision.kept:
        classes = (made.decision.class_before, made.decision.class_after)
        labels = [class_label(one, model.class_name(one)) for one in classes]
        warn(lost_decision(f"the {SOLVERS[config.solver]} trace", *labels))
    return made


def seen(photo: Upright, path: Path, model: LoadedModel) -> tuple[Tensor, np.ndarray]:
    """Return what `LoadedModel.preprocess` makes of a photo; warn of what the network does not see of it."""
    for caution in photo.cautions(model.ground):
        warnings.warn(f"{path.name}: {caution}", stacklevel=2)
    return model.preprocess(photo.image)


def lost_decision(trace: str, before: str, after: str) -> str:
    """Say that a trace predicts another class than the dense network; classes as `class_label` calls them."""
    return f"{trace} lost the decision: it predicts {after} instead of {before}"
