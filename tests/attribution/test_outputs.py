"""What automatic sparsity keeps, for each form of target and output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

captum_attr = pytest.importorskip("captum.attr")

from captum.attr import NoiseTunnel, Saliency  # noqa: E402

from spade_fast.attribution.outputs import score_of_target  # noqa: E402
from spade_fast.targets import class_against, neuron  # noqa: E402


class Returning(nn.Module):
    """Returns a given output, multiplied by its input."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, x, factor=1.0):
        return self.output * x.flatten()[0] * factor if isinstance(self.output, torch.Tensor) else self.output


SAMPLE = torch.ones(1, 2)


def score(output, target=None, **arguments) -> float:
    model = Returning(output)
    return score_of_target(NoiseTunnel(Saliency(model)), model, SAMPLE, {"target": target, **arguments})(SAMPLE)


def test_logits():
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    expected = logits.softmax(1)[0]
    for target in (1, [1], torch.tensor(1), torch.tensor([1]), -2, (1,), [(1,)]):
        assert score(logits, target) == pytest.approx(float(expected[1]))
    assert score(logits) == pytest.approx(float(expected[2]))
    doubled = score(logits, 1, additional_forward_args=2.0)
    assert doubled == pytest.approx(float((2 * logits).softmax(1)[0, 1]))
    assert score(expected[None], 1) == pytest.approx(float(expected[1]))  # a network that ends in a softmax


def test_other_outputs():
    assert score(torch.tensor([[4.0]])) == score(torch.tensor([[4.0]]), 0) == score(torch.tensor([4.0])) == 4.0
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert score(maps, (1, 2, 3)) == 23.0
    model = Returning(maps)
    given = score_of_target(Saliency(model), model, SAMPLE, {"target": [lambda output: output.flatten(1).sum(1)]})
    assert given(SAMPLE) == 276.0 and given(2 * SAMPLE) == 552.0
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    for structured in ({"logits": logits}, (logits, maps)):
        assert score(structured, 1) == score(logits, 1)


def test_what_a_function_keeps_and_what_it_is_called():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid())
    with torch.no_grad():
        layer, output = model[0](SAMPLE), model(SAMPLE)
    for target, expected in (
        (class_against(2, 0), (output[0, 2] - output[0, 0]).sigmoid()),
        (neuron("0", 1), layer[0, 1]),
    ):
        found = score_of_target(Saliency(lambda x: model(x)), model, SAMPLE, {"target": target})
        assert found(SAMPLE) == pytest.approx(float(expected)) and found.target == str(target)
    assert score_of_target(Saliency(model), model, SAMPLE, {"target": -1}).target == "class 2"
    assert not model[0]._forward_hooks


def test_bad_targets():
    for target in (3, (1, 1), "cat"):
        with pytest.raises(ValueError, match=r"target .* does not fit the output \[1, 3\]"):
            score(torch.randn(1, 3), target)
    with pytest.raises(ValueError, match=r"the network returns \[1, 2, 3, 4\], where the target None"):
        score(torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"target \(5, 0, 0\) does not fit the output"):
        score(torch.randn(1, 2, 3, 4), (5, 0, 0))
    with pytest.raises(TypeError, match="the network returns dict with the entries a, b: give a function of that"):
        score({"a": torch.randn(1, 3), "b": 1}, 1)
    with pytest.raises(ValueError, match="target the output must be finite, got nan"):
        score(torch.full((1, 1), torch.nan))
    model = nn.Linear(3, 2)
    for target in (None, len):
        with pytest.raises(ValueError, match=r"the model cannot run inputs \(torch.float32 \[1, 2\]\)"):
            score_of_target(Saliency(model), model, SAMPLE, {"target": target})
