"""The commands ``spade-fast batch`` and ``spade-fast index``."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spade_fast._util.errors import UserError
from spade_fast._util.extras import extra_for
from spade_fast._util.sigterm import EXIT_STATUS, exit_on_sigterm
from spade_fast.cli.options import command, split, stderr, stdout, warn
from spade_fast.cli.progress import has_terminal, lines
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import PruneConfig

with extra_for("spade-fast needs"):
    import typer
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from spade_fast.batch.driver import Summary, SummaryCallback

_WORK = "Execution (does not affect results)"
_SHOWN_ERRORS = 10
_SECONDS_PER_LINE = 30.0


def add_batch_commands(app: typer.Typer) -> None:
    """Add the commands ``batch`` and ``index`` to the application."""
    command(app, "batch")(batch_command)
    command(app, "index")(index_command)


def batch_command(
    samples: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder of photos, a quoted pattern ('photos/**/*.jpg'), a .csv or .parquet file with a column "
            "'path' (and optionally 'id'), or module:callable for a dataset.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; a repeated run resumes there.")],
    config: PruneConfig,
    setup: Setup,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Also explain each sample: comma-separated attribution methods; 'explain demo --methods list' lists "
            "all."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to explain of each sample: index or name of a class, or module:callable, a function of the "
            "network's output; default: the predicted class."
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            help="Draws of calibration images per sample: maps are means over all draws and shares in --keep."
        ),
    ] = 1,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Calibrate with the network compiled by torch.compile: takes a minute per worker, so it pays only for "
            "many samples of some networks; needs a C++ compiler. Affects the last bits of results.",
        ),
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads per worker; affects the last bits of results.")] = 1,
    engine: Annotated[
        str,
        typer.Option(help="Engine: local, or ray for a cluster (needs the extra 'cluster').", rich_help_panel=_WORK),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: HOST:PORT, or auto for the cluster this machine belongs to; default: start a local one.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Worker processes; default: one per GPU, or one per --threads CPU cores, as memory allows. 0: run in "
            "this process, which then ends if a sample crashes it.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    samples_per_solve: Annotated[
        int | None,
        typer.Option(
            help="Samples solved together; default: up to 8 on a GPU, otherwise one per thread, as memory allows, and "
            "fewer after memory runs out.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    pack: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Move finished samples into zip files of COUNT samples each; default: one file per result.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check everything and print the plan.", rich_help_panel=_WORK)
    ] = False,
) -> None:
    """Trace every sample of a folder, list or dataset. If the run is killed, the same command resumes it.

    A sample is identified by its id: its path within the folder, the id in a list, or its index in a dataset.

    Exits with 1 if samples failed (DIR/errors gives the reasons), and with 2 if the run could not continue.

    Example: spade-fast batch photos --solver sparsegpt --methods saliency --keep .9,.5 --out traces
    """
    from spade_fast.batch import run
    from spade_fast.cli.gallery import PAGE, Gallery

    with exit_on_sigterm():
        try:
            with _progress(dry_run) as report:
                summary = run(
                    samples,
                    out,
                    **vars(setup),
                    **{**config.options(), "compile": compile},
                    methods=split(methods) or (),
                    target=target,
                    draws=draws,
                    threads=threads,
                    engine=engine,
                    address=address,
                    workers=workers,
                    samples_per_solve=samples_per_solve,
                    pack=pack,
                    dry_run=dry_run,
                    progress=report,
                )
        except (KeyboardInterrupt, SystemExit) as stop:
            stderr.print("stopped; run the same command to resume", markup=False)
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else EXIT_STATUS) from stop
        except UserError:
            raise
        except Exception as error:  # exit code 1 would mean that samples failed
            traceback.print_exc()
            raise typer.Exit(2) from error
    if dry_run:
        stdout.print(_plan(summary), markup=False)
        return
    _print_summary(summary, out)
    gallery = Gallery(out)
    if summary.finished or summary.failed or not gallery.is_complete():
        gallery.write()
    if lost := gallery.counts["lost"]:
        warn(f"{lost} trace{'' if lost == 1 else 's'} lost the decision: see {out / PAGE}")
    for path in (out / PAGE, out):
        stdout.print(str(path), markup=False)
    if summary.failed:
        raise typer.Exit(1)


def index_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the results of a batch.")],
) -> None:
    """Rewrite the gallery of a batch, index.html, and its table, index.parquet: sparsity, classes, errors, seconds."""
    from spade_fast.batch.index import INDEX, write_index
    from spade_fast.cli.gallery import Gallery

    page = Gallery(folder).write()
    states = write_index(folder)
    stdout.print(", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no samples", markup=False)
    for path in (folder / INDEX, page):
        stdout.print(str(path), markup=False)


def _print_summary(summary: Summary, out: Path) -> None:
    finished = f"{summary.before + summary.finished} finished ({summary.before} in earlier runs)"
    stdout.print(f"{_total(summary)}: {finished}, {len(summary.failed)} failed, {_pace(summary)}", markup=False)
    for name, error in list(summary.failed.items())[:_SHOWN_ERRORS]:
        stdout.print(f"  {name}: {error}", markup=False)
    if len(summary.failed) > _SHOWN_ERRORS:
        stdout.print(f"  and {len(summary.failed) - _SHOWN_ERRORS} more, all in {out / 'errors'}", markup=False)


def _plan(summary: Summary) -> str:
    how = f"workers: {summary.workers}, samples per solve: {summary.samples_per_solve}"
    if summary.traces_per_sample > 1:
        how += f", traces per sample: {summary.traces_per_sample}"
    return f"{_total(summary)}, {summary.before} finished, {summary.left} to do ({how})"


def _state(summary: Summary) -> str:
    done, failed = summary.total - summary.left, len(summary.failed)
    return f"{done}/{summary.total} samples, {failed} failed, {_pace(summary)}"


def _total(summary: Summary) -> str:
    from spade_fast.batch.samples import skipped_text

    return f"{summary.total} sample{'' if summary.total == 1 else 's'}{skipped_text(summary.skipped)}"


def _pace(summary: Summary) -> str:
    done = summary.finished + len(summary.failed)
    if done == 0:
        return "nothing to do"
    rate = done / max(summary.seconds, 1e-9)
    text = f"{rate:.2f} samples per second" if rate >= 0.1 else f"{1 / rate:.0f} s each"
    return f"{text}, {timedelta(seconds=round(summary.left / rate))} left" if summary.left else text


@contextmanager
def _progress(dry_run: bool) -> Iterator[SummaryCallback | None]:
    """Show a progress bar; without a terminal, print a line at the start and from time to time."""
    if dry_run:
        yield None
        return
    if not has_terminal():
        line, calls = lines(_SECONDS_PER_LINE), count()
        yield lambda summary: line(_state(summary) if next(calls) else _plan(summary))
        return
    columns = (
        TextColumn("samples"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=stderr) as bars:
        task = bars.add_task("reading finished results", total=None)

        def show(summary: Summary) -> None:
            failed = f", {len(summary.failed)} failed" if summary.failed else ""
            done = summary.total - summary.left
            bars.update(task, total=summary.total, completed=done, description=_pace(summary) + failed)

        yield show
