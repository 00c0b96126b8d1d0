"""Feature visualisation of a dense network and its traces: one labelled page, a figure, and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from spade_fast._util.errors import DeadFeatureError, InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import whole_folder
from spade_fast._util.progress import Progress, no_progress, titled
from spade_fast.attribution.drawing import Column, draw_pictures
from spade_fast.cli.drawings import Drawing
from spade_fast.cli.feature_page import (
    START,
    Cell,
    Row,
    check_drawn,
    drawn_pictures,
    start_cells,
    tell_missing,
    write_page,
)
from spade_fast.cli.trace_captions import decision, lost, removed
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import SOLVERS
from spade_fast.pruning.traces import Trace
from spade_fast.targets.class_names import class_index

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
    tell: Callable[[str], None] = lambda _: None,
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
    tell
        Called before the work, with a sentence that says how much it is.

    Returns
    -------
    list of Path
        The images, ``dense.png`` and one per trace with the name of its file; of several features the names end in
        ``-INDEX``, of several pictures of one in ``-NUMBER``. A feature that nothing excites in one of the networks has
        none. Then ``start.png``, the photo to begin with, the figure ``overview.png``, the report and the page
        ``index.html``.

    Raises
    ------
    ValueError
        A feature, model or device does not exist, or a feature is given twice; nothing excites any of the features in
        any of the networks; a file is not a trace or is a trace of another model; two files would have the same name; a
        setting is out of range.
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
    taken = (_DENSE, START, Path(FIGURE).stem)
    if len({*opened, *taken}) != len(traces) + len(taken):
        names = ", ".join(path.name for path in traces)
        raise InvalidValueError(
            f"trace files must have distinct names, other than {', '.join(map(repr, taken))}, got {names}"
        )
    with whole_folder(out) as folder:
        network = setup.load_model()
        network.check_takes_photos()
        features = _names(given, network, layer)
        for index in features:
            drawing.check(network, index, layer)
        for made in opened.values():
            with made.applied(network.module):  # checks that it is one of this network
                pass
        tell(drawing.work(len(features), 1 + len(opened)))
        rows: dict[int, list[Cell]] = {index: [] for index in features}
        for name in (_DENSE, *opened):
            trace = opened.get(name)
            head = _head(name, trace, network)
            with nullcontext() if trace is None else trace.applied(network.module):
                for index, cells in rows.items():
                    stem = name if len(features) == 1 else f"{name}-{index}"
                    cells.append(_filled(head, stem, drawing, network, index, layer, titled(progress, stem)))
        check_drawn([cell for cells in rows.values() for cell in cells])
        start = {index: start_cells(drawing, network, index, layer) for index in features}
        settings = {**vars(setup), "layer": layer, **drawing.settings()}
        del settings["augmentations"]
        title = _title(features, drawing, layer)
        shown = [Row(name[:1].upper() + name[1:], [*start[index], *rows[index]]) for index, name in features.items()]
        tell_missing(shown, tell)
        _draw_figure(folder / FIGURE, shown, title, f"Network: {setup.model}")
        written = write_page(folder, "feature.html", title, shown, settings, network.notes, traced=bool(opened))
    return [out / name for name in written]


def _names(given: Sequence[int | str], network: LoadedModel, layer: str | None) -> dict[int, str]:
    """Return the names of features by their indices."""
    names: dict[int, str] = {}
    for one in given:
        try:
            index = class_index(one, network.class_names, "its index")
        except InvalidValueError as error:
            if one == "demo" or Path(str(one)).is_file():
                raise InvalidValueError(
                    f"the network has no class {one!r}; for the units that a photo excites, give --units auto"
                ) from error
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


def _head(name: str, trace: Trace | None, network: LoadedModel) -> Cell:
    """Return a cell of a network without pictures."""
    if trace is None:
        return Cell("Dense network")
    solver = SOLVERS.get(trace.header["settings"].get("solver"), "Pruned")
    captions = [f"made for {trace.sample_id}", removed(trace)]
    if told := decision(trace, network):
        captions += [f"on that sample, {told[0]}:", *told[1:]]
    return Cell(f"{solver} trace “{name}”", captions, lost(trace, network))


def _filled(
    head: Cell, stem: str, drawing: Drawing, network: LoadedModel, index: int, layer: str | None, progress: Progress
) -> Cell:
    try:
        drawn = drawing.draw(network, index, layer, progress)
    except DeadFeatureError as error:
        return replace(head, missing=str(error))
    return replace(head, pictures=drawn_pictures(stem, drawn, drawing, layer))


def _draw_figure(path: Path, rows: Sequence[Row], title: str, subtitle: str) -> None:
    """Draw all cells, with a column per picture."""
    heads = []
    pictures: dict[str, list[np.ndarray | None]] = {row.title: [] for row in rows}
    for cells in zip(*(row.cells for row in rows), strict=True):
        most = max(len(cell.pictures) for cell in cells) or 1
        first = cells[0]
        captions = [*(one.caption for one in first.pictures if one.activation is None), *first.captions]
        heads.append(Column(first.heading + ", 1" * (most > 1), captions, [], first.warnings))
        heads += [Column(f"{first.heading}, {number}", [], []) for number in range(2, most + 1)]
        for row, cell in zip(rows, cells, strict=True):
            found = [one.pixels for one in cell.pictures]
            pictures[row.title] += [*found, *[None] * (most - len(found))]
    draw_pictures(path, heads, pictures, title, subtitle)
