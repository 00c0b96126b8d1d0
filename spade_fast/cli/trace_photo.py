"""Traces a network for one photo and saves the trace to a file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from spade_fast._util.files import check_file
from spade_fast._util.progress import Progress, no_progress
from spade_fast.inputs.defaults import fill_defaults
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import open_photo
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import SOLVERS, PruneConfig
from spade_fast.pruning.session import Session
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace


def trace_photo(
    image: Path, out: Path, config: PruneConfig, setup: Setup, progress: Progress = no_progress
) -> tuple[Trace, str | None]:
    """Prune a network for one photo and save the trace.

    Parameters
    ----------
    image
        Path of a photo.
    out
        File for the trace, in an existing folder.
    config
        What to prune; None in a field means the network's default.
    setup
        Network, device and number of calibration images.
    progress
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Trace, and what `lost_decision` says if it lost the decision, otherwise None.

    Raises
    ------
    UserError
        As in `spade_fast.cli.explain.explain_photo`.
    """
    check_file(out, "the trace")
    photo = open_photo(image)
    model = setup.load_model()
    pixels = model.preprocess(photo)[0].to(setup.device)
    before = predict(model.module, pixels)
    config = fill_defaults(config, model.module)
    check_tracing(pixels, model, model.module, config, setup)
    made = trace_image(image.name, pixels, model, model.module, config, setup, progress)
    with made.applied(model.module):
        after = predict(model.module, pixels)
    made.save(out)
    classes = [int(scores.argmax()) for scores in (before, after)]
    if classes[0] == classes[1]:
        return made, None
    return made, lost_decision(f"the {SOLVERS[config.solver]} trace", *map(model.class_name, classes))


def lost_decision(trace: str, before: str, after: str) -> str:
    """Say that a trace predicts another class than the dense network."""
    return f"{trace} lost the decision: it predicts “{after}” instead of “{before}”"


def check_tracing(image: Tensor, model: LoadedModel, module: nn.Module, config: PruneConfig, setup: Setup) -> None:
    """Raise the errors of `trace_image` for its arguments, before any work."""
    Session(module, config, None)
    setup.augmenter(model, config.seed)(image)


def trace_image(
    name: str,
    image: Tensor,
    model: LoadedModel,
    module: nn.Module,
    config: PruneConfig,
    setup: Setup,
    progress: Progress,
) -> Trace:
    """Trace `module`, the network or its prepared copy, for an input ``[1, C, H, W]`` made from a photo."""
    batches = setup.augmenter(model, config.seed)(image, name)
    return trace(module, batches, sample_id=name, progress=progress, **config.options())
