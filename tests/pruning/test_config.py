"""The one configuration: checked when it is made, never changed, and recorded as JSON."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch

import spade_fast.batch
from spade_fast import PruneConfig, trace, trace_batch, tune


def test_every_function_has_its_defaults() -> None:
    """The layers and sparsities that are pruned when nothing is said: the same for every network."""
    pytest.importorskip("captum")
    defaults = {field.name: field.default for field in fields(PruneConfig)}
    assert defaults["layers"] is None and defaults["sparsity"] == "auto"
    for function in (trace, trace_batch, tune, spade_fast.Spade.__init__, spade_fast.batch.run):
        found = {name: one.default for name, one in inspect.signature(function).parameters.items() if name in defaults}
        assert found == {name: defaults[name] for name in found} and {"layers", "keep", "solver"} <= set(found)


def test_it_is_checked_once_and_frozen() -> None:
    config = PruneConfig(sparsity=0.5, layers="a*", memory_limit="2 KiB")
    assert config.layers == ("a*",) and config.memory_limit == 2048
    assert PruneConfig(sparsity=0.5, layers=["a", "b"]).layers == ("a", "b")
    with pytest.raises(FrozenInstanceError):
        config.sparsity = 0.7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity must lie between 0 and 1, got 1.5"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({"sparsity": None}, TypeError, "sparsity must be a number between 0 and 1, a mapping, a function or 'auto'"),
        ({"sparsity": "Auto"}, TypeError, "or 'auto', got 'Auto'"),
        ({"keep": 0}, ValueError, "keep must be above 0 and at most 1, got 0: to prune harder, give a small share"),
        ({"keep": -1}, ValueError, "keep must be above 0 and at most 1, got -1$"),
        ({"keep": 90}, ValueError, "keep must be above 0 and at most 1, got 90: did you mean 0.9[?]"),
        ({"keep": math.nan}, ValueError, "keep must be above 0"),
        ({"keep": ()}, ValueError, "keep is empty"),
        ({"keep": (0.9, 0.5), "sparsity": 0.5}, ValueError, r"keep=\(0.9, 0.5\) needs sparsity='auto'"),
        ({"sparsity": np.ones(2)}, TypeError, "sparsity must be a number between 0 and 1, a mapping"),
        ({"keep": "0.9"}, TypeError, "keep must be a number above 0 and at most 1, got '0.9'"),
        ({"keep": (0.9, True)}, TypeError, "keep must be a number above 0 and at most 1, got True"),
        ({"keep": np.array(0.9)}, TypeError, r"keep must be a number above 0 and at most 1, got array\(0.9\)"),
        ({"keep": torch.tensor(0.9)}, TypeError, r"keep must be a number above 0 and at most 1, got tensor\(0.9"),
        ({"sparsity": np.array([0.5, 0.5])}, TypeError, r"sparsity must be a number.*got array\(\[0.5, 0.5\]\)"),
        ({"sparsity": {"a": -1}}, ValueError, r"sparsity\['a'\] must lie between 0 and 1"),
        ({"solver": "obs"}, ValueError, "unknown solver 'obs': choose from exact, sparsegpt"),
        ({"precision": "half"}, ValueError, "unknown precision 'half'"),
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"block": 1.0}, TypeError, "block must be an integer"),
        ({"damping": float("nan")}, ValueError, "damping must be a number of at least 0"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"strict": "no"}, TypeError, "strict must be True or False"),
        ({"compile": "yes"}, TypeError, "compile must be True or False, got 'yes'"),
        ({"layers": 5}, TypeError, "layers must be names or patterns, got 5"),
        ({"memory_limit": "2 cats"}, ValueError, "memory_limit must be"),
    ],
)
def test_bad_fields_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PruneConfig(**{"sparsity": 0.5, **options})


def test_a_mapping_is_copied() -> None:
    shares = {"a": 0.5}
    config = PruneConfig(sparsity=shares)
    shares["a"] = 5.0
    assert config.sparsity == {"a": 0.5}


def test_the_record_is_json_and_makes_the_same_configuration() -> None:
    config = PruneConfig(sparsity={"a": 1, "b*": 0.25}, solver="sparsegpt", layers=("a", "b*"), seed=3, strict=True)
    assert PruneConfig(**json.loads(json.dumps(config.record()))) == config
    assert PruneConfig(sparsity=lambda name: 0.5).record()["sparsity"] == "function"
    assert PruneConfig(**config.options()) == config


def test_shares_to_keep() -> None:
    assert PruneConfig().keep == 0.9 and PruneConfig().record()["keep"] == 0.9
    config = PruneConfig(keep=[0.5, 1, 0.5])
    assert config.keep == config.keeps == (1.0, 0.5) and config.record()["keep"] == [1.0, 0.5]
    assert PruneConfig(keep=(0.5,)).keeps == PruneConfig(keep=np.array([0.5])).keeps == (0.5,)
    assert PruneConfig(**config.record()).keep == (1.0, 0.5)
