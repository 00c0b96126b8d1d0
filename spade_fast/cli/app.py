"""The ``spade-fast`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit("spade-fast needs typer and rich: pip install 'spade_fast[cli]'") from error

from spade_fast._util.malloc import keep_freed_memory
from spade_fast.cli.batch_command import batch, index
from spade_fast.cli.options import (
    Augmentations,
    Device,
    Layers,
    Model,
    Precision,
    Seed,
    Solver,
    Sparsity,
    number,
    one_line_errors,
    one_line_warnings,
    shares,
    split,
    stderr,
    stdout,
)
from spade_fast.inputs.photo import AUGMENTATIONS

if TYPE_CHECKING:
    from spade_fast.cli.explain import Explanation
    from spade_fast.cli.profiler import StageUse
    from spade_fast.inputs.photo import Progress as ProgressCallback

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(batch)
app.command()(index)

_Image = Annotated[str, typer.Argument(metavar="IMAGE", help="A photo, or 'demo' for the packaged one.")]


@app.callback()
def _spade_fast() -> None:
    """Sample-targeted pruning for explanations (SPADE, arXiv 2310.04519)."""


@app.command()
def explain(
    image: _Image,
    model: Model = "demo",
    solver: Annotated[str, typer.Option(help="exact (SPADE), sparsegpt (FastSPADE) or both.")] = "both",
    sparsity: Sparsity = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; --methods list names them.")
    ] = "saliency,integrated-gradients,guided-gradcam,gradcam",
    augmentations: Augmentations = AUGMENTATIONS,
    layers: Layers = None,
    target: Annotated[int | None, typer.Option(help="Class to explain; default: the one predicted.")] = None,
    seed: Seed = 0,
    precision: Precision = "float32",
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for page, pictures, traces, report.")] = Path(
        "explanation"
    ),
) -> None:
    """Explain one photo: dense network against SPADE, side by side."""
    with one_line_errors():
        from spade_fast.cli.explain import METHODS, Settings
        from spade_fast.cli.explain import explain as run

        if methods == "list":
            stdout.print("\n".join(METHODS))
            return
        settings = Settings(
            image=_photo(image),
            model=model,
            solvers=("exact", "sparsegpt") if solver == "both" else (solver,),
            sparsity=shares(sparsity),
            methods=tuple(methods.split(",")),
            augmentations=augmentations,
            layers=split(layers),
            target=target,
            seed=seed,
            precision=precision,
            device=device,
        )
        with _progress_bars() as report, one_line_warnings():
            explanation = run(settings, out, report)
    _print_result(explanation)


@app.command()
def trace(
    image: _Image,
    model: Model = "demo",
    solver: Solver = "exact",
    sparsity: Sparsity = None,
    augmentations: Augmentations = AUGMENTATIONS,
    layers: Layers = None,
    seed: Seed = 0,
    precision: Precision = "float32",
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the trace.")] = Path("trace.safetensors"),
) -> None:
    """Prune the network for one photo, and save the trace."""
    with one_line_errors():
        from spade_fast.inputs.photo import TraceSettings, trace_photo

        settings = TraceSettings(
            image=_photo(image),
            model=model,
            sparsity=shares(sparsity),
            augmentations=augmentations,
            layers=split(layers),
            seed=seed,
            precision=precision,
            device=device,
        )
        with _progress_bars() as report, one_line_warnings():
            made = trace_photo(settings, solver, out, report)
    stdout.print(made.summary(), markup=False)
    stdout.print(str(out), markup=False)


@app.command()
def visualize(
    index: Annotated[int, typer.Argument(metavar="INDEX", help="A class; with --layer, a channel of that layer.")],
    layer: Annotated[str | None, typer.Option(help="Name of a module; default: the output.")] = None,
    neuron: Annotated[bool, typer.Option(help="Only the neuron in the middle of the layer's map.")] = False,
    model: Model = "demo",
    trace: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A trace to draw too; repeatable.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the picture.")] = 0,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures.")] = Path("visualization"),
) -> None:
    """Draw what excites a class, channel or neuron, in the dense network and in traces."""
    with one_line_errors():
        from spade_fast.attribution.feature_visualization import Feature
        from spade_fast.cli.feature_pictures import draw_feature

        with _progress_bars() as report:
            files = draw_feature(
                Feature(index, layer, neuron),
                model,
                trace or [],
                out,
                steps=steps,
                seed=seed,
                device=device,
                progress=report,
            )
    for path in files:
        stdout.print(str(path), markup=False)


@app.command()
def tune(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Photos, or 'demo' for the packaged one.")],
    model: Model = "demo",
    solver: Solver = "exact",
    score: Annotated[
        str, typer.Option(help="probability of the predicted class, deletion, or localisation (needs --masks).")
    ] = "probability",
    masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="NAME.png for each photo NAME.*; the object is not black.")
    ] = None,
    method: Annotated[str, typer.Option(help="Whose maps deletion and localisation look at.")] = "saliency",
    candidates: Annotated[str, typer.Option(help="Comma-separated sparsities to try.")] = "0,0.2,0.5,0.8,0.9,0.95,0.99",
    stages: Annotated[str, typer.Option(help="What gets a sparsity of its own: blocks or layers.")] = "blocks",
    rounds: Annotated[int, typer.Option(help="Times to go through all stages.")] = 1,
    augmentations: Augmentations = AUGMENTATIONS,
    layers: Layers = None,
    seed: Seed = 0,
    precision: Precision = "float32",
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(metavar="FILE", help="For the sparsities.")] = Path("sparsity.yaml"),
) -> None:
    """Search each stage's best sparsity for some photos; --sparsity FILE then uses them."""
    with one_line_errors():
        from spade_fast.cli.tune_photos import TuneSettings, tune_photos

        settings = TuneSettings(
            photos=[_photo(image) for image in images],
            model=model,
            solver=solver,
            score=score,
            masks=masks,
            method=method,
            candidates=[number("candidates", share) for share in candidates.split(",")],
            stages=stages,
            rounds=rounds,
            augmentations=augmentations,
            layers=split(layers),
            seed=seed,
            precision=precision,
            device=device,
        )
        with _progress_bars() as report, one_line_warnings():
            tuning = tune_photos(settings, out, report)
    stdout.print(tuning.summary(), markup=False)
    stdout.print(str(out), markup=False)


@app.command(context_settings={"allow_interspersed_args": False})
def profile(
    command: Annotated[list[str], typer.Argument(metavar="explain|trace ...", help="A command as it would be alone.")],
    chrome: Annotated[Path, typer.Option(metavar="FILE", help="File for the Chrome trace.")] = Path("profile.json"),
) -> None:
    """Run a command under torch's profiler: a table of seconds by stage, and a Chrome trace."""
    with one_line_errors():
        from spade_fast.cli.profiler import profile as run_profiled

        if command[0] not in ("explain", "trace"):
            raise ValueError(f"profile runs explain or trace, got {command[0]!r}")
        stages = run_profiled(lambda: _run_command(command), chrome)
    _print_profile(stages)
    stdout.print(str(chrome), markup=False)


@app.command()
def doctor() -> None:
    """Print versions and what the machine offers, and check the native ops against plain float64."""
    with one_line_errors():
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


def main() -> None:
    """Run the command line; the entry point ``spade-fast``."""
    keep_freed_memory()
    sys.path.append(os.getcwd())  # for module:callable
    app(prog_name="spade-fast")


def _run_command(arguments: list[str]) -> None:
    status = app(arguments, prog_name="spade-fast", standalone_mode=False)
    if status:
        raise typer.Exit(status)


def _photo(image: str) -> Path:
    from spade_fast.inputs.networks import demo_photo

    return demo_photo() if image == "demo" else Path(image)


@contextmanager
def _progress_bars() -> Iterator[ProgressCallback]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _print_result(explanation: Explanation) -> None:
    table = Table("stage", "seconds", title="seconds by stage")
    table.columns[1].justify = "right"
    for stage, seconds in explanation.seconds.items():
        table.add_row(stage, f"{seconds:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(explanation.seconds.values()):.2f}")
    stdout.print(table)
    for network, prediction in explanation.report["predictions"].items():
        best, target = prediction["top"][0], prediction["target"]
        kept = "" if best["class"] == target["class"] else f", {target['name']} {target['probability']:.1%}"
        stdout.print(f"{network:>9}: {best['name']} {best['probability']:.1%}{kept}", markup=False)
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
