"""The table of docs/reference/networks.md: every cell is run, and must be what happens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("captum", reason="needs captum")

from captum.attr import InputXGradient, IntegratedGradients, Saliency

from spade_fast import Spade, Trace, UserError, trace
from spade_fast.attribution import LRP, GradCam
from spade_fast.attribution.cam import last_feature_layer
from tests.architectures import ARCHITECTURES, Architecture

pytestmark = [
    pytest.mark.filterwarnings("ignore::spade_fast.FallbackWarning", "ignore::spade_fast.DecisionWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor", "ignore:.*full_backward_hook", "ignore:.*non-full backward hook"),
]

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "networks.md").read_text()
LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
COLUMNS, ROWS = LINES[0], {row[0]: dict(zip(LINES[0], row, strict=True)) for row in LINES[2:]}
METHODS = {one.__name__: one for one in (Saliency, InputXGradient, IntegratedGradients, LRP)}
SETTINGS = {"sparsity": 0.3, "solver": "sparsegpt"}


@cache
def network(name: str) -> tuple[nn.Module, Tensor, Architecture]:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    return architecture.make().eval(), torch.randn(1, *architecture.shape), architecture


def views(sample: Tensor, name: str = "0") -> Tensor:
    """Calibration data of a sample."""
    return sample + 0.1 * torch.randn(3, *sample.shape[1:], generator=torch.Generator().manual_seed(1))


@cache
def made(name: str) -> Trace:
    model, sample, architecture = network(name)
    return trace(model, views(sample), layers=architecture.layers, **SETTINGS)


def some_layers(name: str) -> tuple[str, ...]:
    layers = made(name).layers
    return layers[:: max(1, len(layers) // 3)]


def method(name: str, model: nn.Module, sample: Tensor, architecture: Architecture) -> Any:
    if name != "GradCam":
        return METHODS[name](model)
    if architecture.layer is None:
        return GradCam(model, last_feature_layer(model, sample, architecture.target))
    return GradCam(model, model.get_submodule(architecture.layer), architecture.reshape)


def state(model: nn.Module) -> tuple[Any, ...]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()],
        [[list(vars(module)[kind].items()) for kind in hooks] for module in model.modules()],
        [(module.training, vars(module).get("forward")) for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
    )


def values(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def test_the_page_has_all_networks_and_methods():
    assert list(ROWS) == list(ARCHITECTURES)
    assert COLUMNS[3:] == ["Saliency", "InputXGradient", "IntegratedGradients", "GradCam", "LRP"]


@pytest.mark.parametrize("name", ROWS)
def test_trace(name):
    model, sample, _ = network(name)
    reports = made(name).reports
    notes = sorted({report.note.removeprefix("its weight is used by ") for report in reports if report.note})
    found = f"{len(made(name).layers)} of {len(reports)}" + (f": {', '.join(notes)}" if notes else "")
    assert found == ROWS[name]["trace"]
    with torch.no_grad():
        dense = model(sample)
        with made(name).applied(model):
            assert not torch.equal(model(sample), dense)
            for layer in made(name).layers:
                assert (made(name).weight(layer) == 0).any()
        assert torch.equal(model(sample), dense)


@pytest.mark.parametrize("name", ROWS)
def test_restored(name):
    model, sample, architecture = network(name)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    before, contents = state(model), values(model)
    layers = some_layers(name)
    one = trace(model, views(sample), layers=layers, **SETTINGS)
    with pytest.raises(KeyboardInterrupt), one.applied(model):
        raise KeyboardInterrupt
    Spade(Saliency(model), views, layers=layers, **SETTINGS).attribute(sample, target=architecture.target)
    after = state(model)
    model.eval()
    same = all(torch.equal(*both) for both in zip(values(model), contents, strict=True))
    assert ("yes" if same and after == before else "no") == ROWS[name]["restored"]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("column", COLUMNS[3:])
def test_methods(column, name):
    model, sample, architecture = network(name)
    layers, arguments = some_layers(name), {"target": architecture.target}
    if column == "IntegratedGradients":
        arguments["n_steps"] = 3
    answer, _, words = ROWS[name][column].partition(": ")
    if answer != "yes":
        with pytest.raises(UserError) as caught:
            method(column, model, sample, architecture).attribute(sample, **arguments)
        assert answer == "no" and words and words in str(caught.value)
        return
    attribution = method(column, model, sample, architecture)
    dense = attribution.attribute(sample, **arguments)
    spade = Spade(attribution, views, layers=layers, **SETTINGS)
    found = spade.attribute(sample, **arguments)
    with spade.traces[0].applied(model):
        by_hand = attribution.attribute(sample, **arguments)
    assert found.isfinite().all() and found.shape[0] == 1 and torch.equal(found, by_hand)
    assert not torch.allclose(found, dense, rtol=1e-3, atol=0)
