"""Units that carry the decision for a photo, drawn on the dense network and on traces: one page and its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from spade_fast._util.errors import DeadFeatureError, InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import whole_folder
from spade_fast._util.progress import Progress, no_progress, titled
from spade_fast.attribution.visualization.units import WINDOW, Units, exciting_crop, last_map_layer, read_units
from spade_fast.cli.drawings import Drawing
from spade_fast.cli.feature_page import Cell, Row, numbered, removed, write_page
from spade_fast.cli.html_pages import data_url
from spade_fast.cli.trace_photo import lost_decision, seen
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import read_photo
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import AUTO, PruneConfig
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace

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
class _Network:
    """The dense network or a trace, which is a column of the page.

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

    Returns
    -------
    list of Path
        The pictures ``NETWORK-CHANNEL.png`` of the networks ``dense``, ``own`` (trace) and ``other``, the crops, the
        traces, the report and the page ``index.html``.

    Raises
    ------
    ValueError
        A layer, channel or setting does not exist or is out of range; nothing excites a channel in the dense network;
        no unit carries the decision; a photo is given twice.
    UserError
        As in `spade_fast.cli.explain.explain_photo`.
    """
    count, given = _parsed(units)
    drawing.check_settings()
    if len({path.resolve() for path in photos}) < len(photos):
        raise InvalidValueError(f"photos must differ, got {', '.join(path.name for path in photos)}")
    require("jinja2", "the page needs")
    opened = [read_photo(path) for path in photos]
    with whole_folder(out) as folder:
        network = setup.load_model()
        shown = []
        for photo, path in zip(opened, photos, strict=True):
            image, pixels = seen(photo, path, network)
            shown.append(_Photo(path.name, image.to(setup.device), pixels))
        target = int(predict(network.module, shown[0].image).argmax())
        layer = _layer(network, shown[0].image) if layer is None else layer
        networks = {_DENSE: _network(network, layer, target, shown)}
        for unit in given or [_most_varied(networks[_DENSE].units[0])]:
            drawing.check(network, unit, layer)
        for (name, heading), one in zip(_TRACES.items(), shown, strict=False):
            made = _traced(network, one, config, setup, progress)
            made.save(folder / f"trace-{name}.safetensors")
            networks[name] = _network(network, layer, target, shown, heading, made)
            if networks[name].warning:
                warn(networks[name].warning)
        chosen = given or networks[_OWN].units[0].strongest(count)
        if not chosen:
            raise InvalidValueError(
                f"no unit of layer {layer!r} speaks for “{network.class_name(target)}” on the trace of "
                f"{shown[0].name}: give another layer"
            )
        rows = _rows(chosen, network, networks, layer, shown, drawing, progress)
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
            networks=list(networks.values()),
            photo=data_url(shown[0].pixels / 255),
            fewer=0 if given or len(chosen) == count else count,
            window=WINDOW,
            crops=_MOST_CROPS,
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


def _layer(network: LoadedModel, image: Tensor) -> str:
    layer = last_map_layer(network.module, image)
    if layer is None:
        raise InvalidValueError(
            f"no module of {network.name} returns a feature map with several positions: it has no units"
        )
    return layer


def _traced(network: LoadedModel, photo: _Photo, config: PruneConfig, setup: Setup, progress: Progress) -> Trace:
    return trace(
        network.module,
        setup.augmenter(network, config.seed)(photo.image, photo.name),
        inputs=photo.image,
        sample_id=photo.name,
        progress=titled(progress, photo.name),
        **config.options(),
    )


def _most_varied(units: Units) -> int:
    low, high = units.maps.flatten(1).aminmax(dim=1)
    return int((high - low).argmax())


def _network(
    network: LoadedModel,
    layer: str,
    target: int,
    photos: Sequence[_Photo],
    heading: str = "Dense network",
    made: Trace | None = None,
) -> _Network:
    with nullcontext() if made is None else made.applied(network.module):
        units = [read_units(network.module, layer, photo.image, target) for photo in photos]
        scores = predict(network.module, photos[0].image)
    best = int(scores.argmax())
    facts = [f"Predicts “{network.class_name(best)}” ({scores[best]:.1%}) for {photos[0].name}"]
    warning = ""
    if made is not None:
        facts.insert(0, f"Made for {made.sample_id}: {removed(made)}")
        if made.decision is not None and not made.decision.kept:
            classes = (made.decision.class_before, made.decision.class_after)
            warning = lost_decision(f"the trace of {made.sample_id}", *map(network.class_name, classes))
    return _Network(heading, facts, warning, made, units)


def _rows(
    chosen: Sequence[int],
    network: LoadedModel,
    networks: Mapping[str, _Network],
    layer: str,
    photos: Sequence[_Photo],
    drawing: Drawing,
    progress: Progress,
) -> list[Row]:
    cells: dict[int, list[Cell]] = {unit: [] for unit in chosen}
    for name, one in networks.items():
        with nullcontext() if one.trace is None else one.trace.applied(network.module):
            for unit in chosen:
                stem = f"{name}-{unit}"
                cells[unit].append(_cell(stem, unit, one, network, layer, drawing, titled(progress, stem)))
    shares = networks[_OWN].units[0].shares
    dense = networks[_DENSE].units
    return [
        Row(f"Channel {unit}", [*of_unit, _crops(unit, dense, photos)], float(shares[unit]))
        for unit, of_unit in cells.items()
    ]


def _cell(
    stem: str,
    unit: int,
    column: _Network,
    network: LoadedModel,
    layer: str,
    drawing: Drawing,
    progress: Progress,
) -> Cell:
    """Draw a unit of a network whose trace is applied."""
    captions = [f"activation {float(column.units[0].activations[unit]):.3g} in the photo"]
    dead = column.trace is not None and not column.alive(unit)
    try:
        if dead and drawing.contrast:  # what is drawn would be the other units
            return Cell(column.heading, captions, missing="never fires in the photos on this trace")
        return Cell(column.heading, captions, pictures=numbered(stem, drawing.draw(network, unit, layer, progress)))
    except DeadFeatureError as error:
        if column.trace is None:
            raise
        return Cell(column.heading, captions, missing="cut off by this trace" if dead else str(error))


def _crops(unit: int, dense: Sequence[Units], photos: Sequence[_Photo]) -> Cell:
    """Crop the first photo, and those of the others that excite a unit most, if they excite it at all."""
    first, *others = range(len(photos))
    others.sort(key=lambda photo: -float(dense[photo].maps[unit].max()))
    exciting = [photo for photo in [first, *others] if bool(dense[photo].alive[unit])][:_MOST_CROPS]
    crops = {
        f"crop-{unit}-{number}": exciting_crop(photos[photo].pixels, dense[photo].maps[unit])
        for number, photo in enumerate(exciting, 1)
    }
    captions = [photos[photo].name for photo in exciting]
    return Cell("In the photos", captions, pictures=crops, missing="" if crops else "no photo excites it")
