"""Feature visualisation of a dense network and its traces: one labelled page, a figure, and images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from spade_fast._util.errors import DeadFeatureError, InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import whole_folder
from spade_fast._util.progress import Progress, no_progress, titled
from spade_fast.attribution.drawing import Column, draw_pictures
from spade_fast.cli.class_names import class_index
from spade_fast.cli.drawings import Drawing
from spade_fast.cli.feature_page import Cell, Row, numbered, removed, write_page
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import SOLVERS
from spade_fast.pruning.traces import Trace

FIGURE = "overview.png"
_DENSE = "dense"


def draw_features(
    given: Sequence[int | str],
    traces: Sequence[Path],
    out: Path,
    setup: Setup,
    drawing: Drawing,
    *,
    layer: str | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write pictures of features of a dense network and of traces, and all of them on one page and in one figure.

    Parameters
    ----------
    given
        Indices of classes or, with `layer`, of channels; or the names of classes.
    traces
        Trace files made from the network of `setup`.
    out
        Folder, created if it does not exist. Files appear in it only when all images are complete, and replace those of
        an earlier run. ``report.json`` there names them.
    setup
        Network and device.
    drawing
        How to draw.
    layer
        As in `Feature`.
    progress
        Called as ``progress(stage, step, steps)``.

    Returns
    -------
    list of Path
        The images, ``dense.png`` and one per trace with the name of its file; of several features the names end in
        ``-INDEX``, of several pictures of one in ``-NUMBER``. Then the figure ``overview.png``, the report and the page
        ``index.html``.

    Raises
    ------
    ValueError
        A feature, model or device does not exist, or a feature is given twice or nothing excites it in the dense
        network; a file is not a trace or is a trace of another model; two files would have the same name; a setting is
        out of range.
    FileNotFoundError, OSError
        A file does not exist, or the folder cannot be written or has files that no earlier run wrote.
    ImportError
        A package is not installed; the message names the extra to install.
    """
    drawing.check_settings()
    for one in given:
        if layer is not None and not str(one).isdecimal():
            raise InvalidValueError(f"a channel of layer {layer!r} is given by its index, got {one!r}")
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
        features = _names(given, network, layer)
        for index in features:
            drawing.check(network, index, layer)
        for made in opened.values():
            with made.applied(network.module):  # checks that it is one of this network
                pass
        rows: dict[int, list[Cell]] = {index: [] for index in features}
        for name in (_DENSE, *opened):
            trace = opened.get(name)
            with nullcontext() if trace is None else trace.applied(network.module):
                for index, cells in rows.items():
                    stem = name if len(features) == 1 else f"{name}-{index}"
                    cells.append(_cell(stem, trace, drawing, network, index, layer, titled(progress, stem)))
        settings = {**vars(setup), "layer": layer, **drawing.settings()}
        del settings["augmentations"]
        title = _title(features, drawing, layer)
        shown = [Row(name[:1].upper() + name[1:], rows[index]) for index, name in features.items()]
        _draw_figure(folder / FIGURE, shown, title, f"Network: {setup.model}")
        written = write_page(folder, "feature.html", title, shown, settings)
    return [out / name for name in written]


def _names(given: Sequence[int | str], network: LoadedModel, layer: str | None) -> dict[int, str]:
    """Return the names of features by their indices."""
    names: dict[int, str] = {}
    for one in given:
        try:
            index = class_index(one, network.class_names, "its index")
        except InvalidValueError as error:
            if Path(str(one)).is_file():
                raise InvalidValueError(f"{error}; for the units that a photo excites, give --units auto") from error
            raise
        if index in names:
            raise InvalidValueError(f"{names[index]} is given twice")
        if layer is not None:
            names[index] = f"channel {index}"
        elif 0 <= index < len(network.class_names):
            names[index] = f"class “{network.class_names[index]}” ({index})"
        else:
            names[index] = f"class {index}"
    return names


def _title(features: dict[int, str], drawing: Drawing, layer: str | None) -> str:
    kind = "classes" if layer is None else "channels"
    what = next(iter(features.values())) if len(features) == 1 else f"{len(features)} {kind}"
    if drawing.neuron:
        what = f"the central neuron{'s' if len(features) > 1 else ''} of {what}"
    of_layer = "" if layer is None else f" of layer {layer}"
    contrast = f" more than the other {kind}" if drawing.contrast else ""
    return f"What excites {what}{of_layer}{contrast}"


def _cell(
    stem: str,
    trace: Trace | None,
    drawing: Drawing,
    network: LoadedModel,
    index: int,
    layer: str | None,
    progress: Progress,
) -> Cell:
    if trace is None:
        return Cell("Dense network", pictures=numbered(stem, drawing.draw(network, index, layer, progress)))
    heading = f"{SOLVERS.get(trace.header['settings'].get('solver'), 'Pruned')} trace"
    captions = [f"sample {trace.sample_id}", removed(trace)]
    warnings = ["lost the decision"] if trace.decision is not None and not trace.decision.kept else []
    try:
        return Cell(heading, captions, warnings, numbered(stem, drawing.draw(network, index, layer, progress)))
    except DeadFeatureError as error:
        return Cell(heading, captions, warnings, missing=str(error))


def _draw_figure(path: Path, rows: Sequence[Row], title: str, subtitle: str) -> None:
    """Draw all cells, with several pictures in one below each other."""
    heads = [Column(cell.heading, cell.captions, [], cell.warnings) for cell in rows[0].cells]
    pictures = {
        row.title: [np.concatenate(list(cell.pictures.values())) if cell.pictures else None for cell in row.cells]
        for row in rows
    }
    draw_pictures(path, heads, pictures, title, subtitle)
