"""What the documents show is true: their Python runs, their commands and links exist, the reference is complete."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import spade_fast

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "spade_fast").rglob("*.py"))
    if re.search(r"^ *>>> (?!.*\+SKIP)", path.read_text(), re.MULTILINE)
]
FOLDERS = ("attribution", "batch", "compat", "inputs", "ops", "pruning", "targets")
PACKAGES = ("spade_fast", *(f"spade_fast.{folder}" for folder in FOLDERS))
ENTRY = re.compile(r"\.\. (?:auto)?(?:class|data|exception|function):: (?:[\w.]+\.)?(\w+)$", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# The tests of methods run docs/methods.md, and look at what comes of it.
RUN_HERE = [page for page in PAGES if blocks(page, "python") and page != DOCS / "methods.md"]


@pytest.fixture
def _one_thread():
    """One thread: more do not speed up small tensors, and are far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("page", RUN_HERE, ids=name)
def test_python_blocks(page, tmp_path, monkeypatch):
    """One after the other, in one namespace, with fewer augmentations and steps."""
    pytest.importorskip("captum")
    pytest.importorskip("yaml")
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        shorter = block.replace("n=64", "n=8").replace("steps=128", "steps=2")
        exec(compile(shorter, name(page), "exec"), namespace)
    assert "spade_fast" in namespace or "run" in namespace or "TrueOBS" in namespace


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    pytest.importorskip("captum")
    pytest.importorskip("kornia")
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0


def test_commands():
    """The commands in shell blocks exist, with these options."""
    app = pytest.importorskip("spade_fast.cli.app").app
    commands = importlib.import_module("typer.main").get_command(app).commands
    options = {
        command: {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for command, found in commands.items()
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    for line in shown:
        words = shlex.split(line, comments=True)
        if words[:1] == ["spade-fast"]:
            used = [word for word in words if word in commands]
            allowed = {option for command in used for option in options[command]}
            assert words[1] in commands, line
            assert {word for word in words if word.startswith("--")} <= allowed, line
        elif words[:1] == ["make"]:
            assert words[1] in targets, line
    assert any(line.startswith("spade-fast") for line in shown)
    listed = re.findall(r"^\| `spade-fast (\w+)", (DOCS / "reference" / "commands.md").read_text(), re.MULTILINE)
    assert set(listed) == set(commands)


def test_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(ENTRY.findall(pages))
    public = {entry for package in PACKAGES for entry in importlib.import_module(package).__all__}
    assert public - documented == {"compat", "metrics", "ops", "targets"}  # which have pages
    from spade_fast.attribution import metrics

    assert documented - public <= set(dir(metrics))


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=name)
def test_links(page):
    """Those of the site's own pages are checked by `make docs`."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (ROOT / target).exists(), target


def test_version_is_the_cited_one():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None and cited[1] == spade_fast.__version__
