"""Which calls of Captum's methods count as the same through Spade."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("captum.attr")

from captum.attr import Saliency


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return import_module("captum_calls")


class Scaled(Saliency):
    def attribute(self, inputs: Any, target: Any = None, scale: float = 1.0) -> Any:
        return scale * super().attribute(inputs, target)


class Centred(Saliency):
    """Depends on the other samples of the batch."""

    def attribute(self, inputs: Any, target: Any = None) -> Any:
        found = super().attribute(inputs, target)
        return found - found.mean()


class Unnamed(Saliency):
    """Has arguments that Spade cannot tell apart."""

    def attribute(self, inputs: Any, *args: Any) -> Any:
        return super().attribute(inputs, *args)


def test_calls_are_made_again_through_spade(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = script.Calls(verbose=False)
    for kind in (Scaled, Centred, Unnamed):
        monkeypatch.setattr(kind, "attribute", kind.attribute)  # put back after the test
        calls.watch(kind)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.rand(2, 3)
    before = torch.get_rng_state()
    assert Scaled(model).attribute(inputs, target=1, scale=2.0).shape == (2, 3)
    Scaled(lambda x: model(x)).attribute(inputs, 1)
    Centred(model).attribute(inputs, target=1)
    Unnamed(model).attribute(inputs, 1)
    with pytest.raises(AssertionError):
        Scaled(model).attribute(inputs, target="cat")  # which Captum refuses: it does not count
    assert torch.equal(before, torch.get_rng_state())
    assert calls.outcomes == {"Scaled": {"same": 2}, "Centred": {"different": 1}, "Unnamed": {"error": 1}}
    report = calls.report()
    assert "Centred: numbers that differ by up to" in report
    assert "Unnamed: InvalidTypeError: pass the arguments of Unnamed.attribute by name" in report


def test_differences(script: Any) -> None:
    one, other = torch.ones(2, 3), torch.ones(3, 2)
    assert script.difference((one, [other]), (one.clone(), [other]), 1e-5) == ""
    assert script.difference(one, other, 1e-5) == "[3, 2] instead of [2, 3]"
    assert script.difference((one,), [one], 1e-5) == "list instead of tuple"
    assert script.difference((one,), (one, one), 1e-5) == "2 entries instead of 1"
    assert script.difference(one, one.double(), 1e-5) == "torch.float64 instead of torch.float32"
    assert script.difference(one, one + 1e-6, 1e-5) == script.difference(one, 2 * one, None) == ""
    assert script.difference(one, 2 * one, 1e-5) == "numbers that differ by up to 1e+00"
