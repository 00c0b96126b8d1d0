"""Code shared by the commands: consoles, groups of options, and the display of errors and warnings as one line."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Annotated, Any, get_type_hints

from spade_fast._util.errors import InvalidValueError, UserError
from spade_fast._util.extras import extra_for
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import AUTO, PruneConfig

with extra_for("spade-fast needs"):
    import typer
    from rich.console import Console
    from rich.markup import escape

stdout = Console(highlight=False, soft_wrap=True, emoji=False)
stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
show_tracebacks = ContextVar("show_tracebacks", default=False)

_EXIT_STATUS = 2


def pruning_options(
    solver: Annotated[str, typer.Option(help="Solver: exact (SPADE) or sparsegpt (FastSPADE).")] = PruneConfig.solver,
    sparsity: Annotated[
        str,
        typer.Option(help="Share of weights to remove, a file FILE.yaml from tune, or auto: as many as --keep allows."),
    ] = AUTO,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Share of the class's probability that automatic sparsity keeps; several, comma-separated, make a "
            f"trace each where that is possible. Default: {PruneConfig.keep}."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to prune, as comma-separated name patterns; default: all that can be pruned."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the augmentations, which depend on the name of the photo as well.")
    ] = 0,
    precision: Annotated[
        str, typer.Option(help="Precision of the calibration: float32 or bf16.")
    ] = PruneConfig.precision,
) -> PruneConfig:
    """Make the pruning configuration from a command's options; those given replace the ones of a sparsity file."""
    options = _sparsity_options(sparsity)
    if keep is not None:
        if options["sparsity"] != AUTO:
            raise InvalidValueError(f"keep has no effect with sparsity {sparsity}: it is for --sparsity {AUTO}")
        options["keep"] = [number("keep", share) for share in split(keep) or ()]
    if layers is not None:
        options["layers"] = split(layers)
    return PruneConfig(**options, solver=solver, seed=seed, precision=precision)


def setup_options(
    model: Annotated[
        str,
        typer.Option(
            help="Network: demo, torchvision:NAME[:WEIGHTS], timm:NAME[:WEIGHTS], hf:NAME (Hugging Face) or "
            "module:callable."
        ),
    ] = Setup.model,
    augmentations: Annotated[
        int, typer.Option(help="Number of calibration images made from each photo.")
    ] = Setup.augmentations,
    device: Annotated[
        str, typer.Option(help="Device: cpu, or a GPU in torch's notation: cuda, cuda:1.")
    ] = Setup.device,
) -> Setup:
    """Make the setup from a command's options."""
    return Setup(model, device, augmentations)


_GROUPS: dict[Any, Callable[..., Any]] = {PruneConfig: pruning_options, Setup: setup_options}


def command(
    app: typer.Typer, name: str, *, without: Collection[str] = (), **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command `name` of `app`.

    A parameter of type `PruneConfig` or `Setup` is replaced by the options of its group, except those in `without` and
    those that the function declares itself. User errors and warnings are printed as one line.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name, **settings)(_with_groups(function, without))
        return function

    return register


def _with_groups(function: Callable[..., None], without: Collection[str]) -> Callable[..., None]:
    own = inspect.signature(function).parameters
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, list[str]] = {}
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in own.items():
        if hints[name] not in _GROUPS:
            parameters[name] = parameter.replace(annotation=hints[name])
            continue
        make = _GROUPS[hints[name]]
        members, member_hints = inspect.signature(make).parameters, get_type_hints(make, include_extras=True)
        groups[name] = [member for member in members if member not in own and member not in without]
        for member in groups[name]:
            parameters[member] = members[member].replace(annotation=member_hints[member])

    @wraps(function)
    def call(**given: Any) -> None:
        with _one_line_errors(), _one_line_warnings():
            for name, members in groups.items():
                given[name] = _GROUPS[hints[name]](**{member: given.pop(member) for member in members})
            function(**given)

    keyword_only = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters.values()]
    call.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    call.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    return call


def split(names: str | None) -> list[str] | None:
    """Split a comma-separated option, without blanks and repetitions; None stays None."""
    return None if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))


def number(what: str, text: str, alternative: str = "") -> float:
    """Convert `text` to a number, or raise ValueError that names the option `what`."""
    try:
        return float(text)
    except ValueError:
        percent = text.removesuffix("%").replace(".", "", 1)
        hint = f": did you mean {float(text[:-1]) / 100:g}?" if text.endswith("%") and percent.isdecimal() else ""
        raise InvalidValueError(f"{what} must be a number{alternative}, got {text!r}{hint}") from None


def _sparsity_options(sparsity: str) -> dict[str, Any]:
    """Return what the option ``--sparsity`` says: a number, auto, or the entries of a sparsity file."""
    if sparsity == AUTO:
        return {"sparsity": AUTO}
    if sparsity.endswith((".yaml", ".yml")):
        from spade_fast.pruning.tuning_result import load_sparsity

        return load_sparsity(sparsity)
    return {"sparsity": number("sparsity", sparsity, ", a file FILE.yaml or auto")}


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Print a UserError as one line, or with its traceback on request, and exit with code 2."""
    try:
        yield
    except UserError as error:
        if show_tracebacks.get():
            traceback.print_exc()
        else:
            stderr.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}")
        raise typer.Exit(_EXIT_STATUS) from error


def warn(message: str) -> None:
    """Print a warning as one line."""
    stderr.print(f"[yellow]warning: {escape(' '.join(message.split()))}[/]")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print each warning as one line."""

    def show(message: Warning | str, *_: object) -> None:
        warn(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
