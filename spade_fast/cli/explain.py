"""Explains the prediction for one photo with the dense network and its traces: HTML page, figures, traces, report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spade_fast._util.checks import check_names, integer
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import require
from spade_fast._util.files import REPORT, whole_folder
from spade_fast._util.progress import Progress, no_progress
from spade_fast.attribution.drawing import Column, draw
from spade_fast.attribution.methods import METHODS, Question, attribution_map, unusable_methods
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.attribution.smoothgrad import SmoothGrad
from spade_fast.cli.columns import ExplainedTrace, make_columns, row_titles
from spade_fast.cli.doctor import versions
from spade_fast.cli.explanation import Explanation, report_prediction, report_trace
from spade_fast.cli.page import render
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.named_targets import named_class
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import read_photo
from spade_fast.inputs.pil_pixels import Upright
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.calibration import draw_id
from spade_fast.pruning.config import AUTO, SOLVERS, PruneConfig
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.goals import LEAST_WITH_NOISE, NOISY_COPIES, Goal, output_score, sample_goal
from spade_fast.pruning.session import Session
from spade_fast.pruning.tracing import traces_by_solver
from spade_fast.targets.classification import class_against
from spade_fast.targets.target import Target

PAGE = "index.html"
DEFAULT_METHODS = ("saliency", "integrated-gradients", "guided-gradcam", "gradcam")


def explain_photo(
    image: Path,
    out: Path,
    config: PruneConfig,
    setup: Setup,
    *,
    solvers: Sequence[str] = tuple(SOLVERS),
    methods: Sequence[str] | None = None,
    target: int | str | None = None,
    against: int | str | None = None,
    draws: int = 1,
    smooth: SmoothGrad | None = None,
    progress: Progress = no_progress,
    tell: Callable[[str], None] | None = None,
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
        What to prune. Its solver is replaced by each of `solvers`.
        With an automatic sparsity there is a trace for each of its `keep`.
    setup
        Network, device and number of calibration images.
    solvers
        ``"exact"``, ``"sparsegpt"`` or both.
    methods
        Keys of `METHODS`; None for those of `DEFAULT_METHODS` that can be used on the network.
    target
        Index or name of the class to explain; None for the class that the dense network predicts.
    against
        Index or name of another class: explain the score of the class minus that of this one.
    draws
        Number of sets of calibration images, each with traces of its own. A solver's maps are the means over all its
        traces.
    smooth
        Also show SmoothGrad maps of the dense network, make those of the traces SmoothGrad maps too, calibrate the
        traces on noisy images, and show the means of both.
    progress
        Called as ``progress(stage, done, total)``.
    tell
        Called with what the work amounts to before it begins.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        A method, solver, model, layer, class or device does not exist, a sparsity is not between 0 and 1, the dense
        network gives the class a probability of 0, or the file is not an image.
    FileNotFoundError, OSError
        The photo does not exist or cannot be read, or the folder cannot be written or has files that no earlier run
        wrote.
    ImportError
        A package is not installed; the message names the extra to install.
    """
    check_names("solver", solvers, SOLVERS, SOLVERS)
    check_names("method", DEFAULT_METHODS if methods is None else methods, METHODS)
    integer("draws", draws, 1)
    require("captum", "explanations need")
    require("matplotlib", "pictures need")
    require("jinja2", "the page needs")
    photo = read_photo(image)
    with whole_folder(out) as folder:
        seconds: dict[str, float] = {}
        with _timed(seconds, "load model"):
            task = _prepare(photo, image.name, config, setup, solvers, methods, target, against, draws, smooth)
        if tell is not None:
            tell(task.cost())
        with _timed(seconds, "dense: attribution"):
            maps = _maps(task, None, "Dense: attribution", progress)
        smooth_maps = None
        if smooth is not None:
            with _timed(seconds, "dense: SmoothGrad"):
                smooth_maps = _maps(task, smooth, "Dense: SmoothGrad", progress)
        traces = []
        for draw_number in range(draws):
            traces += _explain_draw(task, draw_number, seconds, progress)
        traces.sort(key=lambda one: list(task.configs).index(one.solver))
        for one in traces:
            one.trace.save(folder / f"trace-{one.name}.safetensors")
        columns = make_columns(task.model, task.target, task.scores, maps, smooth_maps, traces)
        with _timed(seconds, "pictures"):
            _draw(folder, task, columns)
        report = _report(task, image, columns, traces, seconds)
        names = sorted({path.name for path in folder.iterdir()} | {REPORT, PAGE})
        report["files"] = names
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(render(report, task.drawn, columns), encoding="utf-8")
    return Explanation([out / name for name in sorted(names, key=lambda name: (name == PAGE, name))], seconds, report)


@dataclass(frozen=True)
class _Task:
    """What is to be explained and how; everything in it is checked."""

    name: str
    photo: Upright
    drawn: np.ndarray
    model: LoadedModel
    setup: Setup
    question: Question
    target: int
    against: int | None
    scores: Tensor
    methods: list[str]
    left_out: dict[str, str]
    config: PruneConfig
    configs: dict[str, PruneConfig]
    augmenter: ImageAugmenter
    goal: Goal | None
    noisy: float | None
    kept_in_noise: bool
    draws: int
    smooth: SmoothGrad | None

    @property
    def levels(self) -> Sequence[float | None]:
        """Shares to keep, with a trace for each; None for the one trace of a sparsity that is not automatic."""
        return self.config.keeps if self.config.sparsity == AUTO else (None,)

    @property
    def solvers(self) -> str:
        """Name all solvers together."""
        return " and ".join(SOLVERS[solver] for solver in self.configs)

    def cost(self) -> str:
        """Say how many calibrations, traces and maps there will be."""
        traces = self.draws * len(self.levels) * len(self.configs)
        copies = "" if self.smooth is None else f" of {_count('noisy copy', self.smooth.copies)}"
        work = {"calibration": self.draws, "trace": traces, "map": traces * len(self.methods)}
        return (
            f"{self.solvers}: {_count('draw', self.draws)} x {_count('level', len(self.levels))}: "
            f"{', '.join(_count(what, number) for what, number in work.items())}{copies}{self._noise()}"
        )

    def _noise(self) -> str:
        """Say what SmoothGrad changes about the traces."""
        if self.noisy is None:
            return ""
        calibrated = "; the traces are calibrated on noisy images"
        if self.goal is None or not self.kept_in_noise:
            return calibrated
        return f"{calibrated} and must keep the score on noisy copies too: usually less is removed"

    def trace_name(self, solver: str, level: int, number: int) -> str:
        """Name a trace by its solver and by what else tells it from the others."""
        keep = f"-keep{self.levels[level]}" if len(self.levels) > 1 else ""
        return f"{solver}{keep}{f'-draw{number}' if self.draws > 1 else ''}"


def _prepare(
    photo: Upright,
    name: str,
    config: PruneConfig,
    setup: Setup,
    solvers: Sequence[str],
    methods: Sequence[str] | None,
    target: int | str | None,
    against: int | str | None,
    draws: int,
    smooth: SmoothGrad | None,
) -> _Task:
    """Load the network and check everything before any map is made."""
    model = setup.load_model()
    pixels, drawn = model.preprocess(photo.image)
    pixels = pixels.to(setup.device)
    prepared = prepare_for_attribution(model.module, pixels)
    scores = predict(prepared, pixels)
    target = int(scores.argmax()) if target is None else named_class("target", target, model, len(scores))
    against = None if against is None else named_class("against", against, model, len(scores))
    if against == target:
        raise InvalidValueError(f"target and against are both “{model.class_name(target)}”: give two classes")
    asked: int | Target = target if against is None else class_against(target, against)
    question = Question(prepared, pixels, asked, model.black.to(pixels))
    left_out = unusable_methods(DEFAULT_METHODS if methods is None else methods, question)
    if left_out and methods is not None:
        raise InvalidValueError(next(iter(left_out.values())))
    usable = [one for one in methods or DEFAULT_METHODS if one not in left_out]
    configs = {solver: replace(config, solver=solver) for solver in solvers}
    Session(prepared, config, None)  # checks layers and sparsities
    augmenter = setup.augmenter(model, config.seed, 0.0 if smooth is None else smooth.noise)
    augmenter(pixels)  # checks what it needs
    copies = () if smooth is None else augmenter.noisy(pixels, name, NOISY_COPIES).split(1)
    score = output_score(prepared, pixels, asked)
    goal = sample_goal(name, score, pixels, copies) if config.sparsity == AUTO else None
    noisy, kept_in_noise = None, False
    if copies:
        kept = math.fsum(map(score, copies)) / len(copies)
        kept_in_noise = kept >= LEAST_WITH_NOISE * score(pixels)
        probability = output_score(prepared, pixels, target)
        noisy = kept if against is None else math.fsum(map(probability, copies)) / len(copies)
    return _Task(
        name=name,
        photo=photo,
        drawn=drawn,
        model=model,
        setup=setup,
        question=question,
        target=target,
        against=against,
        scores=scores,
        methods=usable,
        left_out=left_out,
        config=config,
        configs=configs,
        augmenter=augmenter,
        goal=goal,
        noisy=noisy,
        kept_in_noise=kept_in_noise,
        draws=draws,
        smooth=smooth,
    )


def _explain_draw(task: _Task, number: int, seconds: dict[str, float], progress: Progress) -> list[ExplainedTrace]:
    """Make the traces of one calibration, one per solver and level, and their maps."""
    network, pixels, sample_id = task.question.model, task.question.image, draw_id(task.name, number)
    first, *others = [(solver, _stages(task, solver, number, progress)) for solver in task.configs]
    session = Session(network, task.configs[first[0]], first[1])
    sessions = [session, *(session.with_solver(*other) for other in others)]
    made = traces_by_solver(sessions, [task.augmenter(pixels, sample_id)], [sample_id], [task.goal])
    session.warn()
    explained = []
    for place, (solver, (levels,)) in enumerate(zip(task.configs, made, strict=True)):
        title = SOLVERS[solver]
        for stage, spent in levels[0].header["seconds"].items():
            shared = stage not in ("solve", "search")
            if place == 0 or not shared:
                name = f"{task.solvers if shared else title}: {stage}"
                seconds[name] = seconds.get(name, 0.0) + spent
        for level, (keep, one) in enumerate(zip(task.levels, levels, strict=True)):
            with _timed(seconds, f"{title}: attribution"), one.applied(network):
                scores = predict(network, pixels)
                maps = _maps(task, task.smooth, f"{title}: attribution", progress)
            one.decision = Decision.between(task.scores, scores)
            name = task.trace_name(solver, level, number)
            explained.append(ExplainedTrace(name, solver, keep, number, one, scores, maps))
    return explained


def _stages(task: _Task, solver: str, number: int, progress: Progress) -> Progress:
    """Return a callback that names the stages of a solver, and the calibration after all of them."""

    def report(stage: str, done: int, total: int) -> None:
        title = task.solvers if stage == "calibrate" else SOLVERS[solver]
        progress(f"{title if task.draws == 1 else f'{title}, draw {number}'}: {stage}", done, total)

    return report


def _draw(folder: Path, task: _Task, columns: Sequence[Column]) -> None:
    """Write a figure of all maps, and one per method."""
    rather = "" if task.against is None else f" rather than “{task.model.class_name(task.against)}”"
    title = f"Why “{task.model.class_name(task.target)}”{rather}?"
    subtitle = "Evidence for this class in the dense network, and in networks pruned for this photo alone"
    rows = row_titles(task.methods, task.smooth is not None)
    draw(folder / "overview.png", task.drawn, columns, rows, title, subtitle)
    for row, method in enumerate(task.methods):
        single = [replace(one, maps=[one.maps[row]]) for one in columns]
        draw(folder / f"{method}.png", task.drawn, single, rows[row : row + 1], title, subtitle)


def _report(
    task: _Task,
    image: Path,
    columns: Sequence[Column],
    traces: Sequence[ExplainedTrace],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    target, layers = task.target, next(iter(task.configs.values())).layers
    other = None if task.against is None else {"class": task.against, "name": task.model.class_name(task.against)}
    networks = {"dense": task.scores, **{one.name: one.scores for one in traces}}
    return {
        "settings": {
            "image": str(image),
            **asdict(task.setup),
            **{name: value for name, value in task.config.record().items() if name != "solver"},
            "layers": None if layers is None else list(layers),
            "draws": task.draws,
            "smooth": None if task.smooth is None else asdict(task.smooth),
            "solvers": list(task.configs),
            "methods": task.methods,
            "target": target,
        },
        "reading": task.photo.notes(task.model.ground),
        "left_out": task.left_out,
        "empty": [method for method, found in zip(task.methods, columns[0].maps, strict=True) if not found.any()],
        "preprocessing": task.model.preprocessing,
        "notes": list(task.model.notes),
        "versions": versions(),
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "predictions": {
            name: report_prediction(task.model, scores, target, task.against) for name, scores in networks.items()
        },
        "against": other,
        "noisy_probability": task.noisy,
        "page": PAGE,
        "pictures": {name: f"{name}.png" for name in ("overview", *task.methods)},
        "columns": [
            {"heading": one.heading, "captions": list(one.captions), "warnings": list(one.warnings)} for one in columns
        ],
        "traces": {one.name: report_trace(one, task.configs[one.solver]) for one in traces},
    }


def _maps(task: _Task, smooth: SmoothGrad | None, stage: str, progress: Progress) -> list[Tensor]:
    maps = []
    for index, method in enumerate(task.methods):
        progress(stage, index, len(task.methods))
        maps.append(attribution_map(method, task.question, smooth))
    progress(stage, len(task.methods), len(task.methods))
    return maps


def _count(what: str, number: int) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
