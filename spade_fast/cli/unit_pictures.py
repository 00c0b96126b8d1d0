"""Units that carry the decision for a photo, drawn on the dense network and on traces: one page and its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from spade_fast._util.errors import DeadFeatureError, InvalidValueError, MissingFileError
from spade_fast._util.extras import require
from spade_fast._util.files import whole_folder
from spade_fast._util.progress import Progress, no_progress, titled
from spade_fast._util.text import counted
from spade_fast.attribution.visualization.feature_maps import last_feature_map
from spade_fast.attribution.visualization.units import WINDOW, Units, exciting_crop, read_units
from spade_fast.cli.drawings import Drawing
from spade_fast.cli.feature_page import (
    Cell,
    Picture,
    Row,
    check_drawn,
    drawn_pictures,
    rounded,
    start_cells,
    tell_missing,
    write_page,
)
from spade_fast.cli.html_pages import data_url
from spade_fast.cli.trace_captions import decision, lost, removed
from spade_fast.cli.trace_photo import lost_decision, seen
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import read_photo
from spade_fast.inputs.pil_pixels import Upright
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import AUTO, PruneConfig
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace
from spade_fast.targets.class_names import class_label

_DEFAULT_COUNT = 4
_MOST_CROPS = 4
_DENSE, _OWN = "dense", "own"
_TRACES = {_OWN: "Trace of the photo", "other": "Trace of another photo"}


@dataclass(frozen=True)
class _Photo:
    name: str
    image: Tensor
    pixels: np.ndarray


@dataclass(frozen=True)
class _Column:
    """The dense network or a trace.

    Attributes
    ----------
    heading, facts, warning
        What the page says of it.
    trace
        None for the dense network.
    units
        What the layer's units do in each photo.
    """

    heading: str
    facts: Sequence[str]
    warning: str
    trace: Trace | None
    units: Sequence[Units]

    def alive(self, unit: int) -> bool:
        """Whether a photo changes the unit."""
        return any(bool(one.alive[unit]) for one in self.units)


@dataclass(frozen=True)
class _Task:
    """What is to be drawn and how."""

    network: LoadedModel
    layer: str
    target: int
    photos: Sequence[_Photo]
    drawing: Drawing
    progress: Progress

    def trace(self, photo: _Photo, config: PruneConfig, setup: Setup) -> Trace:
        return trace(
            self.network.module,
            setup.augmenter(self.network, config.seed)(photo.image, photo.name),
            inputs=photo.image,
            sample_id=photo.name,
            progress=titled(self.progress, photo.name),
            **config.options(),
        )

    def column(self, heading: str, made: Trace | None = None, traced: _Photo | None = None) -> _Column:
        """Run the dense network, or the trace of one of the photos, on all photos."""
        photo = self.photos[0]
        with self._applied(made) as module:
            units = [read_units(module, self.layer, one.image, self.target) for one in self.photos]
            scores = predict(module, photo.image)
        best = int(scores.argmax())
        facts, warning = [], ""
        if made is not None:
            facts.append(f"Made for {made.sample_id}: {removed(made)}")
            if made.decision is not None:
                facts.append(f"On {made.sample_id}, {': '.join(decision(made, self.network))}")
                if not made.decision.kept:
                    classes = (made.decision.class_before, made.decision.class_after)
                    warning = lost_decision(f"the trace of {made.sample_id}", *map(self._label, classes))
        if traced is not photo:  # of which the decision tells
            facts.append(f"On {photo.name}, predicts {self._label(best)}: probability {scores[best]:.1%}")
        return _Column(heading, facts, warning, made, units)

    def cells(self, name: str, column: _Column, chosen: Sequence[int], dense: _Column) -> list[Cell]:
        """Draw units of a column's network."""
        with self._applied(column.trace):
            return [self._cell(f"{name}-{unit}", unit, column, dense) for unit in chosen]

    def crops(self, unit: int, dense: Sequence[Units]) -> Cell:
        """Crop the first photo, and those of the others that excite a unit most, if they excite it at all."""
        first, *others = zip(self.photos, dense, strict=True)
        others.sort(key=lambda one: -float(one[1].maps[unit].max()))
        exciting = [(photo, units) for photo, units in [first, *others] if bool(units.alive[unit])][:_MOST_CROPS]
        crops = [
            Picture(f"crop-{unit}-{number}", exciting_crop(photo.pixels, units.maps[unit]), photo.name)
            for number, (photo, units) in enumerate(exciting, 1)
        ]
        heading = "In the photo" if len(self.photos) == 1 else "In the photos"
        return Cell(heading, pictures=crops, missing="" if crops else "no photo excites it", small=True)

    def _label(self, index: int) -> str:
        return class_label(index, self.network.class_name(index))

    def _applied(self, made: Trace | None) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.network.module) if made is None else made.applied(self.network.module)

    def _cell(self, stem: str, unit: int, column: _Column, dense: _Column) -> Cell:
        """Draw a unit of the column's network, whose trace is applied."""
        in_photo = float(column.units[0].activations[unit])
        captions = [f"activation {rounded(in_photo)} in the photo"]
        warnings = [] if column.trace is None else lost(column.trace, self.network)
        try:
            drawn = self.drawing.draw(self.network, unit, self.layer, titled(self.progress, stem))
        except DeadFeatureError as error:
            missing = str(error)
            if column.alive(unit):
                missing = (
                    f"no step of the optimisation excited channel {unit}, though a photo does; more steps, another "
                    "seed or a photo to start with may"
                )
            elif column.trace is not None and dense.alive(unit):
                missing = "cut off by this trace"
            return Cell(column.heading, captions, warnings, missing=missing)
        if not (self.drawing.contrast or self.drawing.neuron) and max(drawn.activations) < in_photo:
            warnings.append("less than in the photo: more steps or another seed may excite it more")
        return Cell(column.heading, captions, warnings, drawn_pictures(stem, drawn, self.drawing, self.layer))


def draw_units(
    photos: Sequence[Path],
    units: str,
    out: Path,
    config: PruneConfig,
    setup: Setup,
    drawing: Drawing,
    *,
    layer: str | None = None,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Draw units of a layer on the dense network and on traces of photos, beside crops of the photos that excite them.

    Parameters
    ----------
    photos
        Paths of photos. The units are those of the first; of the second, if there is one, comes the other trace. Crops
        are taken of all: for each unit one of the first photo, and of the three others that excite it most.
    units
        ``"auto"``: the four channels that the trace of the first photo kept and that carry most of the decision;
        ``"auto:6"``: six of them; ``"3,17"``: these channels.
    out
        Folder, created if it does not exist. Files appear in it only when all are complete, and replace those of an
        earlier run. ``report.json`` there names them.
    config
        What to prune.
    setup
        Network, device and number of calibration images.
    drawing
        How to draw.
    layer
        Name of a module that returns a feature map with several positions; by default the last one.
    progress
        Called as ``progress(stage, done, total)``.
    warn
        Called with what `lost_decision` says of a trace that lost the decision.
    tell
        Called before the work, with a sentence that says how much it is.

    Returns
    -------
    list of Path
        The pictures ``NETWORK-CHANNEL.png`` of the networks ``dense``, ``own`` (trace) and ``other``, as far as the
        optimisation excites the channel, the crops, ``start.png``, the photo to begin with, the traces, the report and
        the page ``index.html``.

    Raises
    ------
    ValueError
        A layer, channel or setting does not exist or is out of range; nothing excites any of the channels; no unit
        carries the decision; a photo is given twice.
    UserError
        As in `spade_fast.cli.explain.explain_photo`.
    """
    count, given = _parsed(units)
    drawing.check_settings()
    if len({path.resolve() for path in photos}) < len(photos):
        raise InvalidValueError(f"photos must differ, got {', '.join(path.name for path in photos)}")
    require("jinja2", "the page needs")
    opened = [_read(path) for path in photos]
    with whole_folder(out) as folder:
        network = setup.load_model()
        shown = []
        for photo, path in zip(opened, photos, strict=True):
            image, pixels = seen(photo, path, network)
            shown.append(_Photo(path.name, image.to(setup.device), pixels))
        target = int(predict(network.module, shown[0].image).argmax())
        if layer is None:
            layer = _last_layer(network, shown[0].image)
        task = _Task(network, layer, target, shown, drawing, progress)
        columns = {_DENSE: task.column("Dense network")}
        for unit in given or [_most_varied(columns[_DENSE].units[0])]:
            drawing.check(network, unit, layer)
        traced = list(zip(_TRACES.items(), shown, strict=False))
        work = drawing.work(len(given) or count, 1 + len(traced))
        tell(f"{counted(len(traced), 'trace')}, {'' if given else 'up to '}{work}")
        cells = {}
        if given:  # drawn before the work on traces: here all may turn out to be dead
            cells[_DENSE] = task.cells(_DENSE, columns[_DENSE], given, columns[_DENSE])
            if not any(map(columns[_DENSE].alive, given)):
                check_drawn(cells[_DENSE])
        for (name, heading), one in traced:
            made = task.trace(one, config, setup)
            made.save(folder / f"trace-{name}.safetensors")
            columns[name] = task.column(heading, made, one)
            if columns[name].warning:
                warn(columns[name].warning)
        chosen = given or columns[_OWN].units[0].strongest(count)
        if not chosen:
            label = class_label(target, network.class_name(target))
            raise InvalidValueError(
                f"no unit of layer {layer!r} speaks for {label} on the trace of {shown[0].name}: give another layer"
            )
        for name, column in columns.items():
            if name not in cells:
                cells[name] = task.cells(name, column, chosen, columns[_DENSE])
        check_drawn([cell for column in cells.values() for cell in column])
        shares = columns[_OWN].units[0].shares
        start = {unit: start_cells(drawing, network, unit, layer) for unit in chosen}
        rows = [
            Row(
                f"Channel {unit}",
                [*start[unit], *(cells[name][number] for name in columns), task.crops(unit, columns[_DENSE].units)],
                float(shares[unit]),
            )
            for number, unit in enumerate(chosen)
        ]
        tell_missing(rows, tell)
        fewer = 0 if given or len(chosen) == count else count
        if fewer:
            tell(f"{fewer} units were asked for, but only {len(chosen)} of them speak for the class")
        settings = {
            "image": shown[0].name,
            "others": [photo.name for photo in shown[1:]],
            "units": units,
            "class": network.class_name(target),
            **vars(setup),
            **config.record(),
            "layer": layer,
            **drawing.settings(),
        }
        names = write_page(
            folder,
            "units.html",
            f"What excites the units behind “{network.class_name(target)}”",
            rows,
            settings,
            network.notes,
            networks=list(columns.values()),
            photo=data_url(shown[0].pixels / 255),
            fewer=fewer,
            window=WINDOW,
            others_shown=_MOST_CROPS - 1 if len(photos) > _MOST_CROPS else 0,
        )
    return [out / name for name in names]


def _parsed(units: str) -> tuple[int, list[int]]:
    """Return the number of units to find, or the given ones."""
    if units == AUTO:
        return _DEFAULT_COUNT, []
    kind, _, number = units.partition(":")
    if kind == AUTO and number.isdecimal() and int(number) > 0:
        return int(number), []
    given = [one.strip() for one in units.split(",")]
    if not all(one.isdecimal() for one in given):
        raise InvalidValueError(f"units must be auto, auto:COUNT or channels such as 3,17, got {units!r}")
    return 0, list(dict.fromkeys(map(int, given)))


def _read(path: Path) -> Upright:
    try:
        return read_photo(path)
    except MissingFileError as error:
        if path.suffix:
            raise
        hint = "with --units the arguments are photos, and channels are given as in --units 3,17"
        raise MissingFileError(f"{error}; {hint}") from error


def _last_layer(network: LoadedModel, image: Tensor) -> str:
    found = last_feature_map(network.module, image)
    if found is None:
        raise InvalidValueError(
            f"no module of {network.name} returns a feature map with several positions: it has no units"
        )
    return found[0]


def _most_varied(units: Units) -> int:
    low, high = units.maps.flatten(1).aminmax(dim=1)
    return int((high - low).argmax())
