"""Records of finished measurements, one JSON object per line, so that nothing is measured twice."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spade_fast
from spade_fast._util.hashes import hash_tensors
from studies.shared.photos import CACHE

Key = tuple[str, ...]
_ROOT = Path(__file__).parents[2]
_PACKAGE = Path(spade_fast.__file__).parent
_CODE = (
    *(_PACKAGE / folder for folder in ("ops", "pruning", "inputs", "attribution")),
    _PACKAGE / "_util" / "draws.py",
    *(
        _ROOT / "studies" / "shared" / f"{name}.py"
        for name in ("ladders", "pathways", "plain_maps", "signed_smoothgrad", "making", "scores")
    ),
)


class Records:
    """Measurements by key, with a file for each name and settings.

    The settings, the versions of torch and of the code that makes traces and maps are part of the file's name. A line
    that an interruption cut off is dropped.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        everything = {**settings, "torch": torch.__version__, "code": code_digest(_CODE)}
        self.path = CACHE / f"{name}-{digest(everything)}.jsonl"
        self._found: dict[Key, dict[str, Any]] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            record = json.loads(line)
            self._found[tuple(record.pop("key"))] = record

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._found[key]

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return a measurement, or None if there is none."""
        return self._found.get(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._found)

    def add(self, key: Key, record: Mapping[str, Any]) -> None:
        """Add a measurement, and append it to the file."""
        self._found[key] = dict(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n")


def digest(settings: Any) -> str:
    """Return a short name of anything that JSON can represent."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=5).hexdigest()


def hash_weights(module: nn.Module) -> dict[str, str]:
    """Return hashes of all parameters and buffers of a network, by name."""
    return hash_tensors([*module.named_parameters(), *module.named_buffers()])


@cache
def code_digest(paths: Iterable[Path]) -> str:
    """Return a short name of Python files, and of folders of them: what they do, not their comments and docstrings."""
    files = [file for path in paths for file in (sorted(path.glob("**/*.py")) if path.is_dir() else [path])]
    return digest([_without_docstrings(file.read_text(encoding="utf-8")) for file in files])


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
