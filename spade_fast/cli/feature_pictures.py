"""Feature visualisation of a dense network and its traces: one labelled page, a figure, and an image per network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import REPORT, whole_folder
from spade_fast._util.progress import Progress, no_progress, titled
from spade_fast._util.versions import library_version
from spade_fast.attribution.drawing import Column, draw_pictures
from spade_fast.attribution.visualization import Feature, visualize
from spade_fast.cli.class_names import class_index
from spade_fast.cli.doctor import versions
from spade_fast.cli.html_pages import data_url, render_template
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import SOLVERS
from spade_fast.pruning.traces import Trace

PAGE, FIGURE = "index.html", "overview.png"
_DENSE = "dense"


def draw_feature(
    given: int | str,
    traces: Sequence[Path],
    out: Path,
    setup: Setup,
    *,
    layer: str | None = None,
    neuron: bool = False,
    steps: int = 128,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write ``dense.png``, for each trace an image with the name of its file, and all side by side.

    Parameters
    ----------
    given
        Index of a class or, with `layer`, of a channel; or the name of a class.
    traces
        Trace files made from the network of `setup`.
    out
        Folder, created if it does not exist. Files appear in it only when all images are complete, and replace those of
        an earlier run. ``report.json`` there names them.
    setup
        Network and device.
    layer, neuron
        As in `Feature`.
    steps, seed
        As in `visualize`.
    progress
        Called as ``progress(stage, step, steps)``.

    Returns
    -------
    list of Path
        The images, the figure ``overview.png`` and the page ``index.html``.

    Raises
    ------
    ValueError
        The feature, model or device does not exist; a file is not a trace or is a trace of another model; two files
        would have the same name; a setting is out of range.
    FileNotFoundError, OSError
        A trace file does not exist, or the folder cannot be written or has files that no earlier run wrote.
    ImportError
        A package is not installed; the message names the extra to install.
    """
    integer("steps", steps, 1)
    if layer is not None and not str(given).isdecimal():
        raise InvalidValueError(f"a channel of layer {layer!r} is given by its index, got {given!r}")
    opened = {path.stem: Trace.load(path) for path in traces}
    require("PIL", "pictures need")
    require("matplotlib", "pictures need")
    require("jinja2", "the page needs")
    if len({*opened, _DENSE, Path(FIGURE).stem}) != len(traces) + 2:
        names = ", ".join(path.name for path in traces)
        raise InvalidValueError(f"trace files must have distinct names, other than 'dense' and 'overview', got {names}")
    with whole_folder(out) as folder:
        network = setup.load_model()
        network.check_takes_photos()
        index = class_index(given, network.class_names, "its index")
        for trace in opened.values():
            with trace.applied(network.module):  # checks that it is one of this network
                pass
        pictures: dict[str, np.ndarray] = {}
        for name in (_DENSE, *opened):
            with opened[name].applied(network.module) if name in opened else nullcontext():
                made = visualize(
                    network.module,
                    Feature(index, layer, neuron),
                    size=network.size,
                    mean=network.mean,
                    std=network.std,
                    steps=steps,
                    seed=seed,
                    progress=titled(progress, name),
                )
            (picture,) = made.pictures
            pictures[name] = (255 * picture).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()
        feature = _feature_name(network, index, layer, neuron)
        settings = {**vars(setup), "steps": steps, "seed": seed}
        del settings["augmentations"]
        _write(folder, pictures, opened, feature, settings)
    return [out / name for name in (*(f"{name}.png" for name in pictures), FIGURE, REPORT, PAGE)]


def _feature_name(network: LoadedModel, index: int, layer: str | None, neuron: bool) -> str:
    if layer is None and index < len(network.class_names):
        return f"class “{network.class_names[index]}” ({index})"
    if layer is None:
        return f"class {index}"
    return f"{'the central neuron of ' if neuron else ''}channel {index} of layer {layer}"


def _removed(trace: Trace) -> str:
    return f"{trace.sparsity:.1%} removed in {len(trace.layers)} layer{'' if len(trace.layers) == 1 else 's'}"


def _write(
    folder: Path,
    pictures: Mapping[str, np.ndarray],
    traces: Mapping[str, Trace],
    feature: str,
    settings: Mapping[str, object],
) -> None:
    from PIL import Image

    columns = []
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
        heading, captions, warnings = "Dense network", [], []
        if name in traces:
            trace = traces[name]
            heading = f"{SOLVERS.get(trace.header['settings'].get('solver'), 'Pruned')} trace"
            captions = [f"sample {trace.sample_id}", _removed(trace)]
            if trace.decision is not None and not trace.decision.kept:
                warnings = ["lost the decision"]
        columns.append((Column(heading, captions, [], warnings), picture))
    title, subtitle = f"What excites {feature}", f"Network: {settings['model']}"
    draw_pictures(folder / FIGURE, columns, title, subtitle)
    page = render_template(
        "feature.html",
        title=title,
        columns=[(column, data_url(picture / 255)) for column, picture in columns],
        settings=settings,
        version=library_version(),
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    names = sorted({path.name for path in folder.iterdir()} | {REPORT})
    report = {"settings": {"feature": feature, **settings}, "versions": versions(), "files": names}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
