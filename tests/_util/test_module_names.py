"""Modules found by name, those of compiled networks too, and the layers that errors name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spade_fast import InvalidValueError
from spade_fast._util.module_names import named_module


def test_an_unknown_layer_is_answered_with_layers_that_exist() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU())
    assert named_module(network, "1") is network[1] and named_module(network, "") is network
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(13)))
    for model, layer, hint in (
        (network, "11", r": did you mean '1'\?"),
        (network, "encoder", ": it has, for example, 0, 1"),
        (many, "encoder", ": it has, for example, 0, 3, 6, 9, 12"),
        (nn.Identity(), "encoder", ""),
    ):
        with pytest.raises(InvalidValueError, match=rf"^the model has no layer '{layer}'{hint}$"):
            named_module(model, layer)


def test_modules_of_compiled_networks_have_their_names() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    network = nn.Sequential(torch.compile(layers, backend="eager"), nn.Linear(2, 2))
    for model in (network, torch.compile(network, backend="eager")):
        for name in ("0.0", "0._orig_mod.0", "_orig_mod.0._orig_mod.0"):
            assert named_module(model, name) is layers[0]
    with pytest.raises(InvalidValueError, match=r"no layer '0\.7': did you mean '0'"):
        named_module(network, "0.7")
