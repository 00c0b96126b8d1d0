"""What the commands share: groups of options, and which errors become one line."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated

import pytest

typer = pytest.importorskip("typer", reason="needs typer")

from typer.testing import CliRunner  # noqa: E402

from spade_fast import InvalidValueError, PruneConfig  # noqa: E402
from spade_fast.cli.app import app, run_command_line  # noqa: E402
from spade_fast.cli.options import command, pruning_options, setup_options  # noqa: E402
from spade_fast.inputs.setup import Setup  # noqa: E402


def invoke(function, *arguments, **settings):
    small = typer.Typer(pretty_exceptions_enable=False)
    command(small, "only", **settings)(function)
    return CliRunner().invoke(small, arguments)


def test_groups_of_options():
    seen = []

    def show(config: PruneConfig, setup: Setup, solver: Annotated[str, typer.Option()] = "both") -> None:
        seen.append((config, setup, solver))

    result = invoke(show, "--sparsity", "0.25", "--layers", "a,b*", "--device", "meta", "--augmentations", "3")
    assert result.exit_code == 0, result.output
    ((config, setup, solver),) = seen
    assert config == PruneConfig(sparsity=0.25, layers=("a", "b*"), seed=0) and solver == "both"
    assert setup == Setup("demo", "meta", 3)

    help_text = invoke(show, "--help").output
    for option in ("--sparsity", "--precision", "--seed", "--model", "--augmentations"):
        assert option in help_text
    assert help_text.count("--solver") == 1
    assert "--sparsity" not in invoke(show, "--help", without=("sparsity",)).output


def test_defaults_are_those_of_the_configuration():
    for options, config in ((pruning_options, PruneConfig), (setup_options, Setup)):
        defaults = {field.name: field.default for field in fields(config)}
        for name, one in inspect.signature(options).parameters.items():
            # The commands number their augmentations from a seed, and tell whether --keep was given.
            assert name in ("seed", "keep") or one.default == defaults[name]


def test_only_errors_of_the_user_become_one_line():
    def users() -> None:
        raise InvalidValueError("give [a] number")

    def ours() -> None:
        raise KeyError("lost")

    result = invoke(users)
    assert result.exit_code == 2 and result.stderr == "error: give [a] number\n"
    result = invoke(ours)
    assert result.exit_code == 1 and isinstance(result.exception, KeyError)


def test_traceback_on_request():
    given = ["trace", "absent.jpg"]
    assert CliRunner().invoke(app, given).stderr.strip() == "error: no such image file: absent.jpg"
    result = CliRunner().invoke(app, ["--traceback", *given])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.endswith("no such image file: absent.jpg\n")


@pytest.mark.parametrize("command", ["trace", "explain"])
def test_paths_that_the_system_refuses_are_one_line(command):
    result = CliRunner().invoke(app, [command, 300 * "x"])
    assert result.exit_code == 2 and "File name too long" in result.stderr and "Traceback" not in result.stderr


def test_commands_keep_freed_memory(monkeypatch):
    seen = []

    @contextmanager
    def kept():
        seen.append("begin")
        yield
        seen.append("end")

    monkeypatch.setattr("spade_fast.cli.app.keep_freed_memory", kept)
    monkeypatch.setattr("spade_fast.cli.app.app", lambda prog_name: seen.append(prog_name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    run_command_line()
    assert seen == ["begin", "spade-fast", "end"]
