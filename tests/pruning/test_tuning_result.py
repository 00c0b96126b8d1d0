"""The file of a search for sparsities: written, read back, written by hand, and hostile."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from spade_fast import InputError, InvalidValueError, PruneConfig, Tuning, load_sparsity, trace
from spade_fast.pruning.tuning_result import Trial


def made() -> Tuning:
    history = (Trial(1, "1", 0.5, 0.25, 0.9, 0.25), Trial(1, "blocks.0", 0.99, 0.5, 0.4, None))
    settings = {
        "solver": "exact",
        "candidates": [0.0, 0.5, 0.99],
        "layers": None,
        "stages": {"1": ["1"], "a": ["0.0", "on"]},
    }
    return Tuning({"sparsity": {"0.0": 0.99, "on": 0.99, "1": 0.0}}, 0.1, 1 / 3, 0.93, history, settings)


def automatic() -> Tuning:
    history = (Trial(1, "auto", 0.9, 0.5, 0.95, 0.25), Trial(1, "auto", 0.5, 0.6, 0.7, None))
    options = {"sparsity": "auto", "keep": 0.9, "layers": ["0.0", "blocks.*"]}
    return Tuning(options, 0.1, 0.25, 0.95, history, {"keep": 0.8, "stages": "auto"})


def test_file_can_be_read_by_people_and_back(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "tuned.yaml"
    made().save(path)
    assert Tuning.load(path) == made() and load_sparsity(path) == made().options
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and "tuned.yaml" in lines[0]
    assert lines[2:6] == ["sparsity:", "  '0.0': 0.99", "  'on': 0.99", "  '1': 0.0"]
    assert "- {round: 1, stage: '1', candidate: 0.5, sparsity: 0.25, kept: 0.9, score: 0.25}" in lines
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.yaml"]
    scores = "mean score 0.1000 -> 0.3333 after 2 trials"
    kept = "the traces keep 93.0% of the dense network's probability"
    assert made().summary().splitlines() == ["1  0", "a  0.99", scores, kept]
    assert replace(made(), kept=None).summary().splitlines() == ["1  0", "a  0.99", scores]
    with pytest.raises(FileNotFoundError, match=r"cannot write the sparsity"):
        made().save(tmp_path / "absent" / "tuned.yaml")


def test_file_of_automatic_sparsity(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "tuned.yaml"
    automatic().save(path)
    assert Tuning.load(path) == automatic() and load_sparsity(path) == automatic().options
    assert path.read_text().splitlines()[2:7] == ["sparsity: auto", "keep: 0.9", "layers:", "- '0.0'", "- blocks.*"]
    assert automatic().stages == {} and automatic().sparsity == "auto"
    assert automatic().summary().splitlines() == [
        "keep 0.9   sparsity 50.0%  kept 95.0%  score 0.2500",
        "keep 0.5   sparsity 60.0%  kept 70.0%  keeps too little",
        "sparsity auto, keep 0.9",
        "mean score 0.1000 -> 0.2500 after 2 trials",
        "the traces keep 95.0% of the dense network's probability",
    ]
    tied = replace(automatic(), history=(*automatic().history, Trial(1, "auto", 0.8, 0.5, 0.95, 0.25)))
    assert "sparsity auto, keep 0.9, the largest of 2 shares with this score" in tied.summary().splitlines()
    sample, network = torch.randn(1, 64), nn.Sequential(nn.Linear(64, 4))
    path.write_text("sparsity: auto\nkeep: 0.5\nlayers: ['0']\n")
    made_of_it = trace(network, sample + 0.1 * torch.randn(9, 64), inputs=sample, **load_sparsity(path))
    assert made_of_it.auto is not None and made_of_it.auto.keep == 0.5
    path.write_text("sparsity: auto")
    assert load_sparsity(path) == {"sparsity": "auto"}
    path.write_text("sparsity: auto\nkeep: [0.5, 0.9]")
    assert PruneConfig(**load_sparsity(path)).keep == (0.9, 0.5)


def test_files_written_by_hand(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "own.yml"

    def refuse(text: str, message: str) -> None:
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            load_sparsity(path)

    path.write_text('sparsity:\n  "body.*": 0.5\n  head: 1\n')
    assert load_sparsity(path) == {"sparsity": {"body.*": 0.5, "head": 1.0}}
    network = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), head=nn.Linear(4, 2)))
    assert len(trace(network, torch.randn(9, 4), **load_sparsity(path)).layers) == 3
    with pytest.raises(ValueError, match=r"own.yml has a sparsity, but is not the complete result of a search"):
        Tuning.load(path)
    for text in ("", "0.5", "sparsity: 0.5", "sparsity: {}", "other: {a: 0.5}", "[1]"):
        refuse(text, "own.yml has no entry 'sparsity'")
    refuse("sparsity: {", "own.yml is not a YAML file")
    refuse("sparsity: {\xe9: 1}", "own.yml is not a YAML file")
    refuse("sparsity: {0: 0.5}", 'layer names must be strings; write "0" in quotes')
    refuse("sparsity: {head: 1.5}", "own.yml: the sparsity of 'head' must lie between 0 and 1, got 1.5")
    refuse("sparsity: {head: much}", "own.yml: the sparsity of 'head' must be a number")
    refuse("sparsity: automatic", "own.yml has no entry 'sparsity' .* or with 'auto'")
    refuse("sparsity: auto\nkeep: 90", "own.yml: keep must be above 0 and at most 1, got 90: did you mean 0.9?")
    for keep in ("high", "{a: 1}", "null", "'0.9'", "true", "[]"):
        refuse(f"sparsity: auto\nkeep: {keep}", "own.yml: keep ")
    for layers in ("0", "head", "[0]", "{head: 1}", "null"):
        refuse(f"sparsity: auto\nlayers: {layers}", "own.yml: layers must be a list of names or patterns")
    refuse("sparsity: {head: 0.5}\nkeep: 0.9", "own.yml: keep is an entry beside the sparsity 'auto' only")
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
        lambda kept: kept["history"][0].update(candidate=None),
        lambda kept: kept["history"][1].update(kept="much"),
        lambda kept: kept.pop("kept"),
        lambda kept: kept.update(kept=float("nan")),
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
    assert load_sparsity(path) == made().options


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
