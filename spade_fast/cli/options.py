"""What the commands share: consoles, options, and errors and warnings of one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:
    raise SystemExit("spade-fast needs typer and rich: pip install 'spade_fast[cli]'") from error

# Errors of the user's input or machine.
FORESEEN = (ImportError, KeyError, OSError, TypeError, ValueError)

stdout = Console(highlight=False, soft_wrap=True, emoji=False)
stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Model = Annotated[str, typer.Option(help="demo, torchvision:NAME[:WEIGHTS] or module:callable.")]
Sparsity = Annotated[
    str | None, typer.Option(help="Share of weights removed, or FILE.yaml from tune; default by solver.")
]
Solver = Annotated[str, typer.Option(help="exact (SPADE) or sparsegpt (FastSPADE).")]
Augmentations = Annotated[int, typer.Option(help="Calibration images made from the photo.")]
Layers = Annotated[str | None, typer.Option(help="Comma-separated name patterns; default: wide layers; '*': all.")]
Seed = Annotated[int, typer.Option(help="Of the augmentations.")]
Precision = Annotated[str, typer.Option(help="Of the calibration: float32 or bf16.")]
Device = Annotated[str, typer.Option(help="cpu, or a GPU as torch names it: cuda, cuda:1.")]


def split(patterns: str | None) -> list[str] | None:
    """The parts between commas."""
    return None if patterns is None else patterns.split(",")


def shares(sparsity: str | None) -> float | dict[str, float] | None:
    """A number, or what a file of sparsities says."""
    if sparsity is None:
        return None
    if sparsity.endswith((".yaml", ".yml")):
        from spade_fast.pruning.tuning_result import load_sparsity

        return load_sparsity(sparsity)
    return number("sparsity", sparsity, " or a file FILE.yaml")


def number(what: str, text: str, alternative: str = "") -> float:
    """A number, or ValueError for an option `what`."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} must be a number{alternative}, got {text!r}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print foreseen errors as one line, and exit with 2."""
    try:
        yield
    except FORESEEN as error:
        message = error.args[0] if type(error) is KeyError else error
        stderr.print(f"[bold red]error:[/] {escape(' '.join(str(message).split()))}")
        raise typer.Exit(2) from error


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print each warning as one line."""

    def show(message: Warning | str, *_: object) -> None:
        stderr.print(f"[yellow]warning:[/] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
