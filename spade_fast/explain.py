"""Traces one photo, and explains it: dense network against its traces, as pictures, trace files and a report."""

from __future__ import annotations

import importlib.util
import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spade_fast.augment import ImageAugmenter
from spade_fast.doctor import versions
from spade_fast.layers import find_layers
from spade_fast.maps import attribution_map
from spade_fast.methods import METHODS, Question
from spade_fast.models import LoadedModel, load_model
from spade_fast.outputs import check_device, output_folder
from spade_fast.overlay import Column, draw
from spade_fast.pipeline import trace
from spade_fast.prepare import prepare_for_attribution
from spade_fast.trace import Trace

Progress = Callable[[str, int, int], None]

SOLVER_TITLES = {"exact": "SPADE", "sparsegpt": "FastSPADE"}
# Traces of the demo network kept its decision on photos of the demo package up to about these sparsities, if its narrow
# layers (depthwise ones above all, where an output has 9 or 25 weights) were left alone.
DEFAULT_SPARSITY = {"exact": 0.8, "sparsegpt": 0.6}
LEAST_COLUMNS = 100
DEFAULT_METHODS = ("saliency", "integrated-gradients", "guided-gradcam", "gradcam")


@dataclass(frozen=True)
class TraceSettings:
    """What to trace, and how.

    Attributes
    ----------
    image
        Path of a photo.
    model
        Name for `load_model`.
    sparsity
        Share of weights to remove; None for the solver's own default.
    augmentations
        Number of calibration images.
    layers
        Name patterns of the layers to prune; None for those with at least `LEAST_COLUMNS` weights an output.
    seed
        Of the augmentations.
    precision
        Of the calibration: ``"float32"`` or ``"bf16"``.
    device
        Where to compute, as torch names it: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    """

    image: Path
    model: str = "demo"
    sparsity: float | None = None
    augmentations: int = 256
    layers: Sequence[str] | None = None
    seed: int = 0
    precision: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Settings(TraceSettings):
    """What to explain, and how.

    Attributes
    ----------
    solvers
        Some of ``"exact"`` and ``"sparsegpt"``.
    methods
        Keys of `METHODS`.
    target
        Index of the class to explain; None for the one the dense network decides on.

    The others are those of `TraceSettings`.
    """

    solvers: Sequence[str] = ("exact", "sparsegpt")
    methods: Sequence[str] = DEFAULT_METHODS
    target: int | None = None


@dataclass(frozen=True)
class Explanation:
    """Where the results lie, seconds by stage, and the content of the JSON report."""

    files: list[Path]
    seconds: dict[str, float]
    report: dict[str, Any]


def trace_photo(settings: TraceSettings, solver: str, out: Path, progress: Progress | None = None) -> Trace:
    """Prune a network for one photo, and save the trace.

    Parameters
    ----------
    settings
        What to trace.
    solver
        ``"exact"`` or ``"sparsegpt"``.
    out
        File for the trace, in a folder that is there.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    ValueError, FileNotFoundError, OSError, ImportError
        As in `explain`.
    """
    _check(settings, [solver])
    if not out.parent.is_dir() or out.is_dir():
        what = f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise OSError(f"cannot write the trace: {what}")
    photo = _open_photo(settings.image)
    model, image, _ = _load(settings, photo)
    _predict(model.module, image)
    made = _trace(settings, solver, model, model.module, image, progress or _no_progress)
    made.save(out)
    return made


def explain(settings: Settings, out: Path, progress: Progress | None = None) -> Explanation:
    """Explain one photo and write pictures, traces and ``report.json`` into a folder.

    Parameters
    ----------
    settings
        What to explain.
    out
        Folder for the results, made if it is not there. Nothing appears in it before all results are complete.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    ValueError
        Unknown method, solver, model or layer, a sparsity outside 0-1, no such class, or no such device.
    FileNotFoundError, OSError
        No such photo, a file that is not an image, or a folder that cannot be written.
    ImportError
        A package is missing; the message names the extra to install.
    """
    _check(settings, settings.solvers)
    _known("method", settings.methods, METHODS)
    if importlib.util.find_spec("captum") is None:
        raise ImportError("explanations need captum: pip install 'spade_fast[captum]'")
    photo = _open_photo(settings.image)
    report_progress = progress or _no_progress
    with output_folder(out) as folder:
        seconds: dict[str, float] = {}
        with _timed(seconds, "load model"):
            model, image, pixels = _load(settings, photo)
            prepared = prepare_for_attribution(model.module, image)
            dense = _predict(prepared, image)
            target = int(dense.argmax()) if settings.target is None else settings.target
            if not 0 <= target < len(dense):
                raise ValueError(f"target must be a class between 0 and {len(dense) - 1}, got {target}")
            mean, std = (image.new_tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
            question = Question(prepared, image, target, -mean / std)

        networks = {"dense": dense}
        with _timed(seconds, "dense: attribution"):
            maps = {"dense": _maps(settings.methods, question, "Dense: attribution", report_progress)}
        traces = {}
        for solver in settings.solvers:
            title = SOLVER_TITLES[solver]
            made = _trace(settings, solver, model, prepared, image, partial(_titled, report_progress, title))
            made.save(folder / f"trace-{solver}.safetensors")
            seconds.update({f"{title}: {stage}": spent for stage, spent in made.header["seconds"].items()})
            with _timed(seconds, f"{title}: attribution"), made.applied(prepared):
                networks[solver] = _predict(prepared, image)
                maps[solver] = _maps(settings.methods, question, f"{title}: attribution", report_progress)
            traces[solver] = made

        with _timed(seconds, "pictures"):
            columns = [_column(name, settings, model, networks[name], target, maps[name]) for name in networks]
            title = f"Why “{model.class_name(target)}”?"
            subtitle = "Evidence for this class in the dense network, and in networks pruned for this photo alone"
            titles = [METHODS[method].title for method in settings.methods]
            draw(folder / "overview.png", pixels, columns, titles, title, subtitle)
            for row, method in enumerate(settings.methods):
                single = [Column(one.heading, one.captions, [one.maps[row]]) for one in columns]
                draw(folder / f"{method}.png", pixels, single, titles[row : row + 1], title, subtitle)
        report = {
            "settings": {
                **asdict(settings),
                "image": str(settings.image),
                "target": target,
                "layers": _layers(settings, prepared),
            },
            "versions": versions(),
            "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
            "predictions": {name: _top(model, scores, target) for name, scores in networks.items()},
            "pictures": {name: f"{name}.png" for name in ("overview", *settings.methods)},
            "traces": {
                solver: {
                    "file": f"trace-{solver}.safetensors",
                    "sparsity": _sparsity(settings, solver),
                    "layers": [asdict(one) for one in made.reports],
                }
                for solver, made in traces.items()
            },
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
    return Explanation([out / name for name in names], seconds, report)


def _check(settings: TraceSettings, solvers: Sequence[str]) -> None:
    _known("solver", solvers, SOLVER_TITLES)
    if settings.sparsity is not None and not 0 <= settings.sparsity <= 1:
        raise ValueError(f"sparsity must lie between 0 and 1, got {settings.sparsity}")
    if settings.augmentations < 1:
        raise ValueError(f"augmentations must be at least 1, got {settings.augmentations}")
    check_device(settings.device)


def _known(kind: str, names: Sequence[str], allowed: Mapping[str, object]) -> None:
    if not names:
        raise ValueError(f"give at least one {kind}: {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}: allowed are {', '.join(allowed)}")


def _open_photo(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("photos need Pillow: pip install 'spade_fast[cli]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"no such image file: {path}")
    try:
        with Image.open(path) as photo:
            return photo.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"not an image file, or a damaged one: {path}") from error


def _load(settings: TraceSettings, photo: Any) -> tuple[LoadedModel, Tensor, np.ndarray]:
    """Load the network and prepare the photo on the device; also its pixels as they are drawn."""
    model = load_model(settings.model)
    model.module.to(settings.device)
    image, pixels = model.preprocess(photo)
    return model, image.to(settings.device), pixels


def _titled(progress: Progress, title: str, stage: str, done: int, total: int) -> None:
    progress(f"{title}: {stage}", done, total)


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def _trace(
    settings: TraceSettings,
    solver: str,
    model: LoadedModel,
    module: torch.nn.Module,
    image: Tensor,
    progress: Progress,
) -> Trace:
    augmenter = ImageAugmenter(settings.augmentations, model.mean, model.std, settings.seed)
    return trace(
        module,
        augmenter(image, settings.image.name),
        sparsity=_sparsity(settings, solver),
        solver=solver,
        layers=_layers(settings, module),
        precision=settings.precision,
        sample_id=settings.image.name,
        seed=settings.seed,
        progress=progress,
    )


def _layers(settings: TraceSettings, model: torch.nn.Module) -> list[str] | None:
    if settings.layers is not None:
        return list(settings.layers)
    wide = [layer.name for layer in find_layers(model)[0] if layer.columns >= LEAST_COLUMNS]
    return wide or None


def _sparsity(settings: TraceSettings, solver: str) -> float:
    return DEFAULT_SPARSITY[solver] if settings.sparsity is None else settings.sparsity


def _predict(model: torch.nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(image)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1:
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model must return one row of logits for one image, got {given}")
    return output.softmax(1)[0].cpu()


def _maps(methods: Sequence[str], question: Question, stage: str, progress: Progress) -> list[np.ndarray]:
    maps = []
    for index, method in enumerate(methods):
        progress(stage, index, len(methods))
        maps.append(attribution_map(method, question).cpu().numpy())
    progress(stage, len(methods), len(methods))
    return maps


def _column(
    name: str, settings: Settings, model: LoadedModel, scores: Tensor, target: int, maps: list[np.ndarray]
) -> Column:
    heading = "Dense network" if name == "dense" else f"{SOLVER_TITLES[name]}, {_sparsity(settings, name):.0%} removed"
    best = int(scores.argmax())
    captions = [f"{_short(model.class_name(best))} {scores[best]:.1%}"]
    if best != target:
        captions.append(f"({_short(model.class_name(target))} {scores[target]:.1%})")
    return Column(heading, captions, maps)


def _short(name: str) -> str:
    return textwrap.shorten(name, 30, placeholder="…")


def _top(model: LoadedModel, scores: Tensor, target: int) -> dict[str, Any]:
    best = scores.topk(min(5, len(scores)))
    return {
        "target": {"class": target, "name": model.class_name(target), "probability": float(scores[target])},
        "top": [
            {"class": index, "name": model.class_name(index), "probability": probability}
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
