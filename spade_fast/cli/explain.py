"""Explains one photo: dense network against its traces, as a page, pictures, trace files and a report."""

from __future__ import annotations

import importlib.util
import json
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spade_fast._util.files import output_folder
from spade_fast.attribution.maps import attribution_map
from spade_fast.attribution.methods import METHODS, Question
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.cli.doctor import versions
from spade_fast.cli.overlay import Column, draw
from spade_fast.cli.page import render
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.photo import (
    SOLVER_TITLES,
    Progress,
    TraceSettings,
    check_names,
    check_settings,
    chosen_layers,
    chosen_sparsity,
    load,
    no_progress,
    open_photo,
    predict,
    trace_image,
)
from spade_fast.pruning.traces import Trace

PAGE = "index.html"
DEFAULT_METHODS = ("saliency", "integrated-gradients", "guided-gradcam", "gradcam")


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
    """Where the results lie, the page last; seconds by stage; and the content of the JSON report."""

    files: list[Path]
    seconds: dict[str, float]
    report: dict[str, Any]


def explain(settings: Settings, out: Path, progress: Progress | None = None) -> Explanation:
    """Explain one photo and write a page, pictures, traces and ``report.json`` into a folder.

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
    check_settings(settings, settings.solvers)
    check_names("method", settings.methods, METHODS)
    if importlib.util.find_spec("captum") is None:
        raise ImportError("explanations need captum: pip install 'spade_fast[captum]'")
    photo = open_photo(settings.image)
    report_progress = progress or no_progress
    with output_folder(out) as folder:
        seconds: dict[str, float] = {}
        with _timed(seconds, "load model"):
            model, image, pixels = load(settings.model, settings.device, photo)
            prepared = prepare_for_attribution(model.module, image)
            dense = predict(prepared, image)
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
            made = trace_image(settings, solver, model, prepared, image, partial(_titled, report_progress, title))
            made.save(folder / f"trace-{solver}.safetensors")
            seconds.update({f"{title}: {stage}": spent for stage, spent in made.header["seconds"].items()})
            with _timed(seconds, f"{title}: attribution"), made.applied(prepared):
                networks[solver] = predict(prepared, image)
                maps[solver] = _maps(settings.methods, question, f"{title}: attribution", report_progress)
            traces[solver] = made

        with _timed(seconds, "pictures"):
            columns = [
                _column(_heading(name, settings, traces.get(name)), model, networks[name], target, maps[name])
                for name in networks
            ]
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
                "layers": chosen_layers(settings.layers, settings.sparsity, prepared),
            },
            "versions": versions(),
            "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
            "predictions": {name: _top(model, scores, target) for name, scores in networks.items()},
            "page": PAGE,
            "pictures": {name: f"{name}.png" for name in ("overview", *settings.methods)},
            "traces": {
                solver: {
                    "file": f"trace-{solver}.safetensors",
                    "sparsity": chosen_sparsity(settings.sparsity, solver),
                    "layers": [asdict(one) for one in made.reports],
                }
                for solver, made in traces.items()
            },
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(render(report, pixels, maps), encoding="utf-8")
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == PAGE, name))
    return Explanation([out / name for name in names], seconds, report)


def _titled(progress: Progress, title: str, stage: str, done: int, total: int) -> None:
    progress(f"{title}: {stage}", done, total)


def _maps(methods: Sequence[str], question: Question, stage: str, progress: Progress) -> list[np.ndarray]:
    maps = []
    for index, method in enumerate(methods):
        progress(stage, index, len(methods))
        maps.append(attribution_map(method, question).numpy())
    progress(stage, len(methods), len(methods))
    return maps


def _heading(name: str, settings: Settings, made: Trace | None) -> str:
    if made is None:
        return "Dense network"
    share = chosen_sparsity(settings.sparsity, name)
    removed = made.sparsity if isinstance(share, Mapping) else share
    return f"{SOLVER_TITLES[name]}, {removed:.0%} removed"


def _column(heading: str, model: LoadedModel, scores: Tensor, target: int, maps: list[np.ndarray]) -> Column:
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
