"""The file of a search for sparsities: written, read back, written by hand, and hostile."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from spade_fast import InputError, InvalidValueError, Tuning, load_sparsity, trace
from spade_fast.pruning.tuning_result import Trial


def made() -> Tuning:
    history = (Trial(1, "1", 0.5, 0.25), Trial(1, "blocks.0", 0.99, 1 / 3))
    settings = {
        "solver": "exact",
        "candidates": [0.0, 0.5, 0.99],
        "layers": None,
        "stages": {"1": ["1"], "a": ["0.0", "on"]},
    }
    return Tuning({"0.0": 0.99, "on": 0.99, "1": 0.0}, 0.1, 1 / 3, history, settings)


def test_file_can_be_read_by_people_and_back(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "tuned.yaml"
    made().save(path)
    assert Tuning.load(path) == made() and load_sparsity(path) == made().sparsity
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and "tuned.yaml" in lines[0]
    assert lines[2:6] == ["sparsity:", "  '0.0': 0.99", "  'on': 0.99", "  '1': 0.0"]
    assert "- {round: 1, stage: '1', sparsity: 0.5, score: 0.25}" in lines
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.yaml"]
    assert made().summary().splitlines() == ["1  0", "a  0.99", "mean score 0.1000 -> 0.3333 after 2 trials"]
    with pytest.raises(FileNotFoundError, match=r"cannot write the sparsities"):
        made().save(tmp_path / "absent" / "tuned.yaml")


def test_files_written_by_hand(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "own.yml"

    def refuse(text: str, message: str) -> None:
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            load_sparsity(path)

    path.write_text('sparsity:\n  "body.*": 0.5\n  head: 1\n')
    assert load_sparsity(path) == {"body.*": 0.5, "head": 1.0}
    network = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), head=nn.Linear(4, 2)))
    assert len(trace(network, torch.randn(9, 4), sparsity=load_sparsity(path)).layers) == 3
    with pytest.raises(ValueError, match=r"own.yml has sparsities, but is not the complete result of a search"):
        Tuning.load(path)
    for text in ("", "0.5", "sparsity: 0.5", "sparsity: {}", "other: {a: 0.5}", "[1]"):
        refuse(text, "own.yml has no entry 'sparsity'")
    refuse("sparsity: {", "own.yml is not a YAML file")
    refuse("sparsity: {\xe9: 1}", "own.yml is not a YAML file")
    refuse("sparsity: {0: 0.5}", 'layer names must be strings; write "0" in quotes')
    refuse("sparsity: {head: 1.5}", "own.yml: the sparsity of 'head' must lie between 0 and 1, got 1.5")
    refuse("sparsity: {head: much}", "own.yml: the sparsity of 'head' must be a number")
    with pytest.raises(FileNotFoundError, match=r"no such sparsity file: .*absent.yaml"):
        load_sparsity(tmp_path / "absent.yaml")


BOMB = "a: &a [x, x]\n" + "".join(f"{chr(i + 1)}: &{chr(i + 1)} [*{chr(i)}, *{chr(i)}]\n" for i in range(97, 120))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "sparsity: {a: 0.5}", "it has an alias .'a'."),
        ("sparsity: &all {a: *all}", "it has an alias"),
        ("sparsity: {a: 0.5, a: 0.7}", "it has key 'a' twice"),
        ("sparsity: {a: 0.5}\nsparsity: {a: 0.7}", "it has key 'sparsity' twice"),
        ("sparsity: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("sparsity: " + "{a: " * 5000 + "}" * 5000, "nested too deeply"),
        ("sparsity: " + "{a: " * 40 + "1" + "}" * 40, "nested too deeply"),
        ("sparsity:" + "".join("\n" + " " * depth + "a:" for depth in range(1, 50)), "nested too deeply"),
        ("sparsity: {a: 1" + ":30" * 100_000 + "}", "a name or value of more than 10000 characters"),
        ("sparsity: {" + "a" * 10_001 + ": 0.5}", "a name or value of more than 10000 characters"),
        ("sparsity: {a: !!bool maybe}", "is not a YAML file"),
        ("sparsity: {a: !!int ''}", "is not a YAML file"),
        ("sparsity: {a: !!timestamp no}", "is not a YAML file"),
        ("sparsity: {a: 2020-99-99}", "is not a YAML file"),
        ("sparsity: {a: !!python/object/apply:os.getpid []}", "is not a YAML file"),
        ("sparsity: {a: " + "9" * 5000 + "}", "is not a YAML file"),
        ("sparsity: {[1]: 0.5}", "is not a YAML file"),
        ("sparsity: {a: .inf}", "must lie between 0 and 1"),
        ("sparsity: {a: .nan}", "must lie between 0 and 1"),
        ("sparsity: {a: [0.5]}", "must be a number"),
        ("sparsity: {a: true}", "must be a number"),
    ],
)
def test_hostile_files(tmp_path, text, message):
    pytest.importorskip("yaml")
    (tmp_path / "own.yml").write_text(text)
    for read in (load_sparsity, Tuning.load):
        with pytest.raises(InvalidValueError, match=message):
            read(tmp_path / "own.yml")


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.pop("score"),
        lambda kept: kept.update(score=[1, 2]),
        lambda kept: kept.update(score={"before": float("inf"), "after": 1}),
        lambda kept: kept.update(score={"before": "0.5", "after": 1}),
        lambda kept: kept.update(history=5),
        lambda kept: kept.update(history=[[1]]),
        lambda kept: kept.update(history={}),
        lambda kept: kept.update(history=""),
        lambda kept: kept["history"][0].update(round="1"),
        lambda kept: kept["history"][0].update(round=0),
        lambda kept: kept["history"][0].update(stage=1),
        lambda kept: kept["history"][0].update(sparsity=2),
        lambda kept: kept["history"][0].update(score=float("nan")),
        lambda kept: kept["history"][0].update(more=1),
        lambda kept: kept.update(settings=[]),
        lambda kept: kept.update(settings={}),
        lambda kept: kept["settings"].update(stages={"a": []}),
        lambda kept: kept["settings"].update(stages={"a": ["absent"]}),
        lambda kept: kept["settings"].update(stages={"a": 5}),
        lambda kept: kept["settings"].update(stages={"a": "1"}),
    ],
)
def test_results_that_make_no_sense(tmp_path, change):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "tuned.yaml"
    made().save(path)
    kept = yaml.safe_load(path.read_text())
    change(kept)
    path.write_text(yaml.safe_dump(kept))
    with pytest.raises(InvalidValueError, match="not the complete result of a search"):
        Tuning.load(path)
    assert load_sparsity(path) == made().sparsity


def test_saved_files_have_no_aliases(tmp_path):
    pytest.importorskip("yaml")
    names = ["0.0", "on"]
    one = replace(made(), settings={"stages": {"a": names, "b": names}})
    one.save(tmp_path / "tuned.yaml")
    assert Tuning.load(tmp_path / "tuned.yaml") == one


@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
def test_sparsities_from_pipes_and_devices(tmp_path, place):
    pytest.importorskip("yaml")
    if place == "pipe":
        os.mkfifo(tmp_path / place)
    with pytest.raises(InputError, match="Not a regular file"):
        load_sparsity(tmp_path / place)


def test_missing_yaml_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for use in (made().save, load_sparsity, Tuning.load):
        with pytest.raises(ImportError, match=r"need PyYAML: pip install 'spade_fast\[cli\]'"):
            use(tmp_path / "tuned.yaml")
    assert not list(tmp_path.iterdir())
