"""The ``spade-fast`` application: its commands, except those on batches, and what each prints."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spade_fast._util.checks import check_names
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import reading
from spade_fast._util.text import listed
from spade_fast._util.versions import library_version
from spade_fast.cli.batch_command import add_batch_commands
from spade_fast.cli.drawings import Drawing
from spade_fast.cli.options import command, number, pruning_options, show_tracebacks, split, stderr, stdout, warn
from spade_fast.cli.progress import showing_progress
from spade_fast.inputs.setup import Setup
from spade_fast.ops.memory import keep_freed_memory
from spade_fast.pruning.config import AUTO, SOLVERS, PruneConfig
from spade_fast.pruning.tuning import SHARES_KEPT, SPARSITIES

with extra_for("spade-fast needs"):
    import typer
    from rich.table import Table

if TYPE_CHECKING:
    from spade_fast.cli.explain import Explanation
    from spade_fast.cli.profiler import StageUse

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_DEFAULT_CANDIDATES = ", or ".join(",".join(f"{one:g}" for one in shares) for shares in (SHARES_KEPT, SPARSITIES))
_Image = Annotated[str, typer.Argument(metavar="IMAGE", help="Path of a photo, or 'demo' for the packaged photo.")]


def _print_version(asked: bool) -> None:
    if asked:
        stdout.print(f"spade_fast {library_version()}", markup=False)
        raise typer.Exit


@app.callback()
def _spade_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of errors.")] = False,
) -> None:
    """Sample-targeted pruning for explanations (SPADE, arXiv 2310.04519)."""
    show_tracebacks.set(traceback)


@command(app, "explain")
def explain_command(
    image: _Image,
    *,
    solver: Annotated[str, typer.Option(help="Solver: exact (SPADE), sparsegpt (FastSPADE) or both.")] = "both",
    config: PruneConfig,
    setup: Setup,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated attribution methods; 'explain demo --methods list' lists all; default: those of "
            "saliency, integrated-gradients, guided-gradcam and gradcam that can be used on the network."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Index or name of the class to explain; default: the predicted class.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Index or name of another class: explain why the class rather than this one."),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            help="Sets of calibration images, each with traces of its own; maps are the means over a solver's traces."
        ),
    ] = 1,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth", help="SmoothGrad: on the dense network (also beside its maps), inside the traces, and both."
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the HTML page, images, traces and report.")
    ] = Path("explanation"),
) -> None:
    """Explain the prediction for one photo, with the dense network and SPADE side by side."""
    from spade_fast.cli.explain import METHODS, SmoothGrad, explain_photo

    if methods == "list":
        stdout.print("\n".join(METHODS))
        return
    check_names("solver", [solver], (*SOLVERS, "both"), SOLVERS)
    with showing_progress() as report:
        explanation = explain_photo(
            _photo(image),
            out,
            config,
            setup,
            solvers=tuple(SOLVERS) if solver == "both" else (solver,),
            methods=split(methods),
            target=target,
            against=against,
            draws=draws,
            smooth=SmoothGrad() if smooth else None,
            progress=report,
            tell=lambda text: stderr.print(text, markup=False),
        )
    _print_result(explanation)


@command(app, "trace")
def trace_command(
    image: _Image,
    config: PruneConfig,
    setup: Setup,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write the trace to.")] = Path("trace.safetensors"),
) -> None:
    """Prune the network for one photo and save the trace."""
    from spade_fast.cli.trace_photo import trace_photo

    with showing_progress() as report:
        made = trace_photo(_photo(image), out, config, setup, report, warn)
    stdout.print(made.summary(), markup=False)
    stdout.print(str(out), markup=False)


@command(app, "visualize")
def visualize_command(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CLASS|CHANNEL|PHOTO",
            help="Indices or names of classes or, with --layer, indices of channels of that layer. With --units: paths "
            "of photos, or 'demo' for the packaged photo.",
        ),
    ],
    *,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Name of the module whose channels are drawn, such as _blocks.4 (--layers are those that traces "
            "prune); default: the network's output, with --units the last module that returns a feature map with "
            "several positions."
        ),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            metavar="auto|auto:COUNT|CHANNELS",
            help="Draw the channels of the layer that carry most of the decision for the first photo (auto: 4 of "
            "them), or those given, such as 3,17: on the dense network and on the traces of the first two photos.",
        ),
    ] = None,
    neuron: Annotated[
        bool, typer.Option("--neuron", help="Maximise only the central neuron of the feature map.")
    ] = False,
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Maximise it against the mean of the other classes or channels.")
    ] = False,
    trace: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Also visualise this trace; can be repeated.")
    ] = None,
    method: Annotated[str, typer.Option(help="Method: maco (spectrum of natural images) or fourier.")] = Drawing.method,
    steps: Annotated[int, typer.Option(help="Number of optimisation steps.")] = Drawing.steps,
    views: Annotated[int, typer.Option(help="Number of random views of each picture at each step.")] = Drawing.views,
    count: Annotated[int, typer.Option(help="Number of pictures of each feature, which differ.")] = Drawing.count,
    start: Annotated[
        Path | None, typer.Option(metavar="PHOTO", help="Begin with this photo instead of a random image.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the initial image and, with --units, of the augmentations.")
    ] = Drawing.seed,
    config: PruneConfig,
    setup: Setup,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the HTML page and images.")] = Path(
        "visualization"
    ),
) -> None:
    """Visualise classes, channels or neurons of the dense network and of traces, or the units that a photo excites."""
    drawing = Drawing(
        method=method,
        steps=steps,
        views=views,
        count=count,
        neuron=neuron,
        contrast=contrast,
        start=None if start is None else _photo(str(start), "name a photo in it"),
        seed=seed,
    )

    def tell(text: str) -> None:
        stderr.print(text, markup=False)

    with showing_progress() as report:
        if units is None:
            from spade_fast.cli.feature_pictures import draw_features

            _refuse_pruning(config, setup)
            files = draw_features(what, trace or [], out, setup, drawing, layer=layer, progress=report, tell=tell)
        else:
            from spade_fast.cli.unit_pictures import draw_units

            if trace:
                raise InvalidValueError("--trace has no effect with --units, which traces the photos")
            photos = [_photo(one, "name photos in it") for one in what]
            config = replace(config, seed=seed)
            files = draw_units(
                photos, units, out, config, setup, drawing, layer=layer, progress=report, warn=warn, tell=tell
            )
    for path in files:
        stdout.print(str(path), markup=False)


@command(app, "tune", without=("sparsity",))
def tune_command(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Paths of photos, or 'demo' for the packaged photo.")
    ],
    config: PruneConfig,
    setup: Setup,
    score: Annotated[
        str,
        typer.Option(
            help="Score to maximise: insertion or deletion (how well maps predict the dense network), localisation "
            "(needs masks) or sparsity."
        ),
    ] = "insertion",
    keep: Annotated[
        str, typer.Option(help="Mean share of the classes' probabilities that the traces must keep.")
    ] = f"{PruneConfig.keep:g}",
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For --score localisation: folder with a mask NAME.png per photo NAME.*; the object is not black.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="Attribution method whose maps the scores judge.")] = "saliency",
    candidates: Annotated[
        str | None,
        typer.Option(
            help="What to try, comma-separated: shares to keep if --stages is auto, otherwise sparsities. Default: "
            f"{_DEFAULT_CANDIDATES}."
        ),
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="auto: the share that automatic sparsity keeps is tuned. blocks or layers: units of the network that "
            "share one sparsity, the same for all photos."
        ),
    ] = AUTO,
    rounds: Annotated[int, typer.Option(help="Maximum number of passes over all stages.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE", help="YAML file to write the sparsity to.")] = Path(
        "sparsity.yaml"
    ),
) -> None:
    """Search for the sparsity that explains some photos best and keeps their classes, for use as --sparsity FILE."""
    from spade_fast.cli.tune_photos import tune_photos

    shares = split(candidates)
    with showing_progress() as report:
        tuning = tune_photos(
            [_photo(image, "name the photos in it: spade-fast tune {folder}/*.jpg") for image in images],
            out,
            replace(config, keep=number("keep", keep)),
            setup,
            score=score,
            masks=masks,
            method=method,
            candidates=None if shares is None else [number("candidates", share) for share in shares],
            stages=stages,
            rounds=rounds,
            progress=report,
        )
    stdout.print(tuning.summary(), markup=False)
    pruned, removed = (tuning.settings[f"share_{which}"] for which in ("in_pruned_layers", "removed"))
    if pruned < 0.5:
        warn(
            f"most of the network stays dense: {pruned:.1%} of its weights lie in layers that are pruned, and "
            f"{removed:.1%} of them all are removed"
        )
    stdout.print(str(out), markup=False)


add_batch_commands(app)


@command(app, "profile", context_settings={"allow_interspersed_args": False})
def profile_command(
    command: Annotated[
        list[str], typer.Argument(metavar="explain|trace ...", help="The command to profile, with its arguments.")
    ],
    chrome: Annotated[Path, typer.Option(metavar="FILE", help="File to write the Chrome trace to.")] = Path(
        "profile.json"
    ),
) -> None:
    """Run a command under torch's profiler: print a table of seconds by stage, and write a Chrome trace."""
    from spade_fast.cli.profiler import run_profiled

    check_names("command to profile", command[:1], ("explain", "trace"))
    stages = run_profiled(lambda: _run_command(command), chrome)
    _print_profile(stages)
    stdout.print(str(chrome), markup=False)


@command(app, "doctor")
def doctor_command() -> None:
    """Print versions and properties of the machine, and check the native ops against plain float64."""
    from spade_fast.cli.doctor import GPU_READY, check_ops, describe

    facts, checks = describe(), check_ops()
    if GPU_READY:
        checks += check_ops("cuda")
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    stdout.print(table)
    results = Table("op", "checked", "largest error", "result", title="native ops against the float64 oracle")
    for check in checks:
        verdict = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        results.add_row(check.op, check.checked, f"{check.error:.1e}", verdict)
    stdout.print(results)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def run_command_line() -> None:
    """Run the application with the arguments of this process."""
    sys.path.append(os.getcwd())  # so that module:callable finds modules in the current folder
    with keep_freed_memory():
        app(prog_name="spade-fast")


def _refuse_pruning(config: PruneConfig, setup: Setup) -> None:
    """Raise ValueError if options of pruning are given to a command that prunes nothing."""
    given = {**config.options(), "augmentations": setup.augmentations}
    usual = {**pruning_options().options(), "augmentations": Setup.augmentations}
    if changed := [f"--{name}" for name, value in given.items() if value != usual[name]]:
        raise InvalidValueError(f"{listed(changed)}: nothing is pruned without --units; traces are given by --trace")


def _run_command(arguments: list[str]) -> None:
    shown = ["--traceback"] if show_tracebacks.get() else []
    status = app([*shown, *arguments], prog_name="spade-fast", standalone_mode=False)
    if status:
        raise typer.Exit(status)


def _photo(image: str, for_folders: str = "for every photo in it: spade-fast batch {folder} --out DIR") -> Path:
    from spade_fast.inputs.networks import demo_photo

    if image == "demo":
        return demo_photo()
    path = Path(image)
    with reading(path):
        if path.is_dir():
            raise InvalidValueError(f"{path} is a folder, not a photo; {for_folders.format(folder=path)}")
    return path


def _print_result(explanation: Explanation) -> None:
    table = Table("stage", "seconds", title="seconds by stage")
    table.columns[1].justify = "right"
    for stage, seconds in explanation.seconds.items():
        table.add_row(stage, f"{seconds:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(explanation.seconds.values()):.2f}")
    stdout.print(table)
    for line in explanation.predictions():
        stdout.print(line, markup=False)
    for message in explanation.warnings():
        warn(message)
    for path in explanation.files:
        stdout.print(str(path), markup=False)


def _print_profile(stages: list[StageUse]) -> None:
    total = sum(use.seconds for use in stages)
    table = Table("stage", "seconds", "share", "GFLOP/s", "peak memory, MB", title="profile by stage")
    for column in table.columns[1:]:
        column.justify = "right"
    for use in stages:
        rate = f"{use.operations / use.seconds / 1e9:.1f}" if use.operations else "-"
        peak = "-" if use.peak_bytes is None else f"{use.peak_bytes / 1e6:.0f}"
        table.add_row(use.stage, f"{use.seconds:.3f}", f"{use.seconds / total:.1%}", rate, peak)
    table.add_section()
    peaks = [use.peak_bytes for use in stages if use.peak_bytes is not None]
    table.add_row("total", f"{total:.3f}", "100.0%", "", f"{max(peaks) / 1e6:.0f}" if peaks else "-")
    stdout.print(table)
