"""Targets as commands and batches are given them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spade_fast.inputs import LoadedModel, load_model
from spade_fast.inputs.named_targets import named_class, named_function, names_function


def test_classes():
    model = LoadedModel("tiny", torch.nn.Flatten(), class_names=("ant", "bee"))
    assert [named_class("target", given, model, 2) for given in (1, "1", "BEE", np.int64(1))] == [1] * 4
    assert model.class_index("bee") == 1
    for given in (2, "-1"):
        with pytest.raises(ValueError, match=f"against must be a class from 0 to 1, got {given}"):
            named_class("against", given, model, 2)
    for given in (True, 1.0, [1], len, b"1"):
        with pytest.raises(TypeError, match="target must be a class from 0 to 1 or a name, in batches also"):
            named_class("target", given, model, 2)
    with pytest.raises(ValueError, match=r"no class 'bea': did you mean 'bee' \(1\)"):
        model.class_index("bea")


def test_functions(small):
    load_model(small)
    target = named_function("small_network:margin")
    assert names_function("small_network:margin") and target.name == "margin"
    assert target(torch.tensor([[1.0, 0.0, 0.0, 4.0]])).tolist() == [3.0]
    assert not any(map(names_function, (3, None, "bull mastiff", "a: b")))
    for name in ("small_network:marjin", "absent:margin"):
        with pytest.raises(ValueError, match=f"target '{name}' cannot be loaded: "):
            named_function(name)
    with pytest.raises(TypeError, match=r"target 'small_network:number' must be a function .* got 3"):
        named_function("small_network:number")
