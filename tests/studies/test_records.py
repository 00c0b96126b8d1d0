"""Records: resuming, and what makes measurements stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from studies.shared import records
from studies.shared.records import Records, code_digest, hash_weights


def test_records_resume_after_a_line_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    first = Records("name", {"a": 1})
    first.add(("x", "1"), {"value": 0.5})
    first.add(("x", "😀"), {"value": 1.5})
    with first.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": ["x", "2"], "value": 2})[:-3])
    second = Records("name", {"a": 1})
    assert list(second) == [("x", "1"), ("x", "😀")] and second["x", "😀"] == {"value": 1.5}
    second.add(("x", "2"), {"value": 3})
    assert Records("name", {"a": 1})["x", "2"] == {"value": 3}
    assert list(Records("name", {"a": 2})) == []


def test_what_has_not_been_measured_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CACHE", tmp_path)
    found = Records("name", {})
    found.add(("x", "1"), {"value": 0.5})
    assert found.get(("x", "1")) == {"value": 0.5} and found.get(("x", "2")) is None


def test_hashes_of_a_network_change_with_parameters_and_buffers() -> None:
    network = nn.BatchNorm1d(2)
    first = hash_weights(network)
    assert set(first) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    network.running_mean += 1
    assert {name for name, one in hash_weights(network).items() if one != first[name]} == {"running_mean"}


def test_what_code_does_counts_but_not_what_it_says(tmp_path: Path) -> None:
    def digest_of(name: str, source: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "module.py").write_text(source)
        return code_digest((folder,))

    first = digest_of("1", 'def f(x):\n    """Add one."""\n    return x + 1\n')
    assert digest_of("2", '"""Module."""\n\ndef f(x):\n    return x + 1  # one more\n') == first
    assert digest_of("3", "def f(x):\n    return x + 2\n") != first
