"""Data flows one way: no folder imports one that stands above it, and no module has the name of a public object."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import spade_fast

PACKAGE = Path(spade_fast.__file__).parent
BELOW = {
    "_util": set(),
    "ops": {"_util"},
    "targets": {"_util"},
    "compat": {"ops"},
    "pruning": {"targets", "ops", "_util"},
    "inputs": {"pruning", "targets", "ops", "_util"},
    "attribution": {"pruning", "targets", "ops", "_util"},
    "batch": {"inputs", "attribution", "pruning", "targets", "ops", "_util"},
    "cli": {"batch", "inputs", "attribution", "pruning", "targets", "ops", "_util"},
}
PUBLIC = ["spade_fast", *(f"spade_fast.{folder}" for folder in BELOW if folder not in ("_util", "cli"))]
PUBLIC.append("spade_fast.attribution.metrics")


def imported(module: Path) -> Iterator[str]:
    """The folders of the package that a module imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("spade_fast."))


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    found = {name: path for path in (PACKAGE / folder).glob("**/*.py") for name in imported(path)}
    assert set(found) <= BELOW[folder] | {folder}, found


def test_every_folder_is_known() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(BELOW)


def test_modules_load_others_by_statements_alone() -> None:
    """What `importlib` loads is the user's own: a test of import statements would not see it."""
    paths = [path for path in PACKAGE.glob("**/*.py") if "import_module(" in path.read_text()]
    expected = {"inputs/networks.py", "inputs/named_targets.py", "batch/samples.py"}
    assert {path.relative_to(PACKAGE).as_posix() for path in paths} == expected


def test_no_module_has_the_name_of_a_public_object() -> None:
    modules = {path.stem for path in PACKAGE.glob("**/*.py")}
    for package in PUBLIC:
        assert not modules & set(importlib.import_module(package).__all__), package


def test_public_names_exist() -> None:
    for package in PUBLIC:
        module = importlib.import_module(package)
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], package


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them by their names alone."""
    names = [path.name for path in Path(__file__).parent.glob("**/test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
