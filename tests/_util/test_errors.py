"""The errors that a user can cause, the extras they name, and signatures that show a configuration's fields."""

from __future__ import annotations

import inspect
import pickle
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import spade_fast
from spade_fast import PruneConfig, UserError
from spade_fast._util import errors
from spade_fast._util.extras import extra_for, is_installed, require
from spade_fast._util.files import whole_file
from spade_fast.batch import run
from spade_fast.pruning.config import PruneOptions

ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def test_errors_are_public_and_of_the_builtin_type() -> None:
    for error in ERRORS:
        assert getattr(spade_fast, error.__name__) is error and error.__name__ in spade_fast.__all__
        assert error is UserError or issubclass(error, UserError | Warning)
    builtin = {
        spade_fast.InvalidValueError: ValueError,
        spade_fast.InvalidTypeError: TypeError,
        spade_fast.UnknownLayerError: KeyError,
        spade_fast.MissingFileError: FileNotFoundError,
        spade_fast.OutputError: OSError,
        spade_fast.InputError: OSError,
        spade_fast.MissingExtraError: ImportError,
        spade_fast.MemoryLimitError: MemoryError,
        spade_fast.NotPositiveDefiniteError: torch.linalg.LinAlgError,
        spade_fast.ClusterError: ConnectionError,
        spade_fast.WorkerError: ChildProcessError,
    }
    assert all(issubclass(error, kind) for error, kind in builtin.items())


def test_a_failed_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with (
        pytest.raises(ImportError, match=r"^Spade needs captum: pip install 'spade_fast\[captum\]'$"),
        extra_for("Spade needs"),
    ):
        import captum  # noqa: F401


def test_a_package_that_is_not_an_extra_is_not_taken_for_one() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught, extra_for("this needs"):
        import no_such_package  # noqa: F401
    assert not isinstance(caught.value, UserError)


def test_require(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_fast._util.extras.is_installed", lambda package: False)
    with pytest.raises(spade_fast.MissingExtraError, match=r"photos need Pillow: pip install 'spade_fast\[image\]'"):
        require("PIL", "photos need")
    monkeypatch.undo()
    assert is_installed("torch") and not is_installed("no_such_package")


@pytest.mark.parametrize("function", [spade_fast.trace, spade_fast.trace_batch, spade_fast.tune, run])
def test_help_shows_the_fields_of_the_configuration(function) -> None:
    shown = inspect.signature(function).parameters
    for field in fields(PruneConfig):
        if field.name == "sparsity":
            continue
        assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[field.name].default == field.default and field.default is not MISSING
    assert ("sparsity" in shown) == (function is not spade_fast.tune)
    assert not any(one.kind is one.VAR_KEYWORD for one in shown.values())


def test_type_checkers_know_the_same_fields() -> None:
    known, own = get_type_hints(PruneOptions), get_type_hints(PruneConfig)
    assert known == {name: hint for name, hint in own.items() if name != "sparsity"}


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="'solvr'"):
        spade_fast.trace(torch.nn.Linear(2, 2), torch.ones(1, 2), sparsity=0.5, solvr="exact")


def test_a_file_that_is_written_keeps_errors_of_others_apart(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="/absent") as caught, whole_file(tmp_path / "a", "it"):
        Path("/absent").read_bytes()
    assert not isinstance(caught.value, UserError)
    with pytest.raises(spade_fast.InputError, match="unreadable"), whole_file(tmp_path / "a", "it"):
        raise spade_fast.InputError(5, "unreadable", "b")
    with pytest.raises(spade_fast.MissingFileError, match="cannot write it"), whole_file(tmp_path / "no" / "a", "it"):
        pass
    with pytest.raises(spade_fast.OutputError, match="cannot write it"), whole_file(tmp_path, "it"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ERRORS)
def test_errors_travel_between_processes(error: type[Exception]) -> None:
    given = error(28, "no space", "file") if issubclass(error, OSError) else error("the message")
    back = pickle.loads(pickle.dumps(given))
    assert type(back) is error and str(back) == str(given) and back.args == given.args
