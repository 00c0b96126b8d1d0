"""Explains the prediction for one photo with the dense network and its traces: HTML page, figures, traces, report."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spade_fast._util.checks import check_names
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import REPORT, whole_folder
from spade_fast._util.progress import Progress, no_progress, titled
from spade_fast.attribution.drawing import Column, draw
from spade_fast.attribution.methods import METHODS, Question, attribution_map, unusable_methods
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.cli.class_names import class_index
from spade_fast.cli.doctor import versions
from spade_fast.cli.page import render
from spade_fast.cli.trace_photo import lost_decision, trace_image
from spade_fast.inputs.defaults import fill_defaults
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import read_photo
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import SOLVERS, PruneConfig
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.session import Session
from spade_fast.pruning.traces import Trace

PAGE = "index.html"
DEFAULT_METHODS = ("saliency", "integrated-gradients", "guided-gradcam", "gradcam")


@dataclass(frozen=True)
class Explanation:
    """The files written (the page last), the seconds by stage, and the content of the JSON report."""

    files: list[Path]
    seconds: dict[str, float]
    report: dict[str, Any]

    def warnings(self) -> list[str]:
        """Return a sentence for each method that was left out, and for each trace that lost the decision."""
        best = {name: one["top"][0]["name"] for name, one in self.report["predictions"].items()}
        return [f"left out: {reason}" for reason in self.report["left_out"].values()] + [
            f"{lost_decision(SOLVERS[solver], best['dense'], best[solver])}; its maps do not explain the prediction"
            for solver, one in self.report["traces"].items()
            if not one["decision_kept"]
        ]


def explain_photo(
    image: Path,
    out: Path,
    config: PruneConfig,
    setup: Setup,
    *,
    solvers: Sequence[str] = tuple(SOLVERS),
    methods: Sequence[str] | None = None,
    target: int | str | None = None,
    progress: Progress = no_progress,
) -> Explanation:
    """Explain the prediction for one photo; write an HTML page, figures, traces and ``report.json`` to a folder.

    Parameters
    ----------
    image
        Path of a photo.
    out
        Folder for the results, created if it does not exist. Files appear in it only when all results are complete, and
        replace those of an earlier run.
    config
        What to prune. Its solver is replaced by each of `solvers`; None in a field means the network's default.
    setup
        Network, device and number of calibration images.
    solvers
        ``"exact"``, ``"sparsegpt"`` or both.
    methods
        Keys of `METHODS`; None for those of `DEFAULT_METHODS` that can be used on the network.
    target
        Index or name of the class to explain; None for the class that the dense network predicts.
    progress
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        A method, solver, model, layer, class or device does not exist, a sparsity is not between 0 and 1, or the file
        is not an image.
    FileNotFoundError, OSError
        The photo does not exist or cannot be read, or the folder cannot be written or has files that no earlier run
        wrote.
    ImportError
        A package is not installed; the message names the extra to install.
    """
    check_names("solver", solvers, SOLVERS, SOLVERS)
    check_names("method", DEFAULT_METHODS if methods is None else methods, METHODS)
    require("captum", "explanations need")
    require("matplotlib", "pictures need")
    require("jinja2", "the page needs")
    photo = read_photo(image)
    with whole_folder(out) as folder:
        seconds: dict[str, float] = {}
        with _timed(seconds, "load model"):
            model = setup.load_model()
            pixels, drawn = model.preprocess(photo.image)
            pixels = pixels.to(setup.device)
            prepared = prepare_for_attribution(model.module, pixels)
            dense = predict(prepared, pixels)
            target = int(dense.argmax()) if target is None else _target(target, model, len(dense))
            question = Question(prepared, pixels, target, model.black.to(pixels))
            left_out = unusable_methods(DEFAULT_METHODS if methods is None else methods, question)
            if left_out and methods is not None:
                raise InvalidValueError(next(iter(left_out.values())))
            methods = [name for name in methods or DEFAULT_METHODS if name not in left_out]
            configs = {solver: fill_defaults(replace(config, solver=solver), prepared) for solver in solvers}
            for one in configs.values():
                Session(prepared, one, None)  # checks layers and sparsities before any map is made
            setup.augmenter(model, config.seed)(pixels)

        networks = {"dense": dense}
        with _timed(seconds, "dense: attribution"):
            maps = {"dense": _maps(methods, question, "Dense: attribution", progress)}
        traces = {}
        for solver in solvers:
            title = SOLVERS[solver]
            report_stage = titled(progress, title)
            made = trace_image(image.name, pixels, model, prepared, configs[solver], setup, report_stage)
            seconds.update({f"{title}: {stage}": spent for stage, spent in made.header["seconds"].items()})
            with _timed(seconds, f"{title}: attribution"), made.applied(prepared):
                networks[solver] = predict(prepared, pixels)
                maps[solver] = _maps(methods, question, f"{title}: attribution", progress)
            made.decision = Decision.between(dense, networks[solver])
            made.save(folder / f"trace-{solver}.safetensors")
            traces[solver] = made

        with _timed(seconds, "pictures"):
            headings = {"dense": "Dense network", **{s: _heading(configs[s], traces[s]) for s in solvers}}
            lost = {solver for solver, made in traces.items() if made.decision and not made.decision.kept}
            columns = [
                _column(headings[name], model, scores, target, maps[name], lost=name in lost)
                for name, scores in networks.items()
            ]
            title = f"Why “{model.class_name(target)}”?"
            subtitle = "Evidence for this class in the dense network, and in networks pruned for this photo alone"
            titles = [METHODS[method].title for method in methods]
            draw(folder / "overview.png", drawn, columns, titles, title, subtitle)
            for row, method in enumerate(methods):
                single = [replace(one, maps=[one.maps[row]]) for one in columns]
                draw(folder / f"{method}.png", drawn, single, titles[row : row + 1], title, subtitle)
        layers = next(iter(configs.values())).layers
        report = {
            "settings": {
                "image": str(image),
                **asdict(setup),
                **{name: value for name, value in config.record().items() if name != "solver"},
                "layers": None if layers is None else list(layers),
                "solvers": list(solvers),
                "methods": methods,
                "target": target,
            },
            "reading": photo.notes(model.ground),
            "left_out": left_out,
            "preprocessing": model.preprocessing,
            "notes": list(model.notes),
            "versions": versions(),
            "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
            "predictions": {name: _top(model, scores, target) for name, scores in networks.items()},
            "page": PAGE,
            "pictures": {name: f"{name}.png" for name in ("overview", *methods)},
            "traces": {
                solver: {
                    "file": f"trace-{solver}.safetensors",
                    "sparsity": configs[solver].record()["sparsity"],
                    "network_sparsity": made.network_sparsity,
                    "decision_kept": solver not in lost,
                    "layers": [asdict(one) for one in made.reports],
                }
                for solver, made in traces.items()
            },
        }
        names = sorted({path.name for path in folder.iterdir()} | {REPORT, PAGE})
        report["files"] = names
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(render(report, drawn, maps), encoding="utf-8")
    return Explanation([out / name for name in sorted(names, key=lambda name: (name == PAGE, name))], seconds, report)


def _maps(methods: Sequence[str], question: Question, stage: str, progress: Progress) -> list[np.ndarray]:
    maps = []
    for index, method in enumerate(methods):
        progress(stage, index, len(methods))
        maps.append(attribution_map(method, question).numpy())
    progress(stage, len(methods), len(methods))
    return maps


def _heading(config: PruneConfig, made: Trace) -> str:
    share = made.sparsity if isinstance(config.sparsity, Mapping) else config.sparsity
    return f"{SOLVERS[config.solver]}, {share:.0%} removed"


def _target(given: int | str, model: LoadedModel, classes: int) -> int:
    allowed = f"a class from 0 to {classes - 1}"
    target = class_index(given, model.class_names, allowed)
    if not 0 <= target < classes:
        raise InvalidValueError(f"target must be {allowed}, got {target}")
    return target


def _column(
    heading: str, model: LoadedModel, scores: Tensor, target: int, maps: list[np.ndarray], *, lost: bool
) -> Column:
    best = int(scores.argmax())
    captions = [f"{_short(model.class_name(best))} {scores[best]:.1%}"]
    if best != target:
        captions.append(f"({_short(model.class_name(target))} {scores[target]:.1%})")
    return Column(heading, captions, maps, lost)


def _short(name: str) -> str:
    return textwrap.shorten(name, 30, placeholder="…")


def _top(model: LoadedModel, scores: Tensor, target: int) -> dict[str, Any]:
    best = scores.sort(descending=True, stable=True)  # the first of equal ones, as argmax
    return {
        "target": {"class": target, "name": model.class_name(target), "probability": float(scores[target])},
        "top": [
            {"class": index, "name": model.class_name(index), "probability": probability}
            for probability, index in zip(best.values[:5].tolist(), best.indices[:5].tolist(), strict=True)
        ],
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
