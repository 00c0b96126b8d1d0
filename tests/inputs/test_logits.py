"""Outputs that are not one logit per class."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spade_fast import InvalidValueError, prepare_for_attribution, trace
from spade_fast.attribution import metrics
from spade_fast.inputs import predict, two_classes
from spade_fast.inputs.logits import class_logits


def network(classes: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes)
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_one_logit_becomes_two_classes(dtype):
    model = network().to(dtype)
    image = torch.rand(1, 3, 8, 8, dtype=dtype)
    both = two_classes(model)
    logit = model(image)
    assert logit.shape == (1, 1), "the model itself returns what it did"
    found = predict(both, image)
    expected = logit.to(found.dtype)[0, 0].sigmoid()
    assert torch.allclose(found, torch.stack([1 - expected, expected]), atol=1e-6 if dtype != torch.float16 else 1e-3)
    assert type(both) is type(model) and list(both.state_dict()) == list(model.state_dict())
    assert all(ours is theirs for ours, theirs in zip(both.parameters(), model.parameters(), strict=True))
    assert torch.equal(copy.deepcopy(both)(image), both(image))


def test_both_classes_have_evidence():
    model = network()
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(model(image)[0, 0], image)
    for target, sign in ((0, -1), (1, 1)):
        (gradient,) = torch.autograd.grad(two_classes(model)(image)[0, target], image)
        assert torch.allclose(gradient, sign * expected / 2)


def test_the_trace_of_two_classes_is_one_of_the_model_itself():
    model, batches = network(), torch.rand(8, 3, 8, 8)
    ours, theirs = (trace(one, batches, sparsity=0.5) for one in (two_classes(model), model))
    assert ours.layers == theirs.layers == ("0", "4") and ours.model_hash == theirs.model_hash
    image = batches[:1]
    both = prepare_for_attribution(two_classes(model), image)
    with ours.applied(both):
        traced = both(image)
    with theirs.applied(model):
        assert torch.allclose(traced[0, 1] * 2, model(image)[0, 0], atol=1e-6)


def test_a_single_logit_is_an_error_where_classes_are_needed():
    model, images, maps = network(), torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8)
    with pytest.raises(InvalidValueError, match=r"single logit.*two_classes"):
        predict(model, images[:1])
    with pytest.raises(InvalidValueError, match=r"single logit.*two_classes"):
        metrics.agreement(model(images), model(images))
    with pytest.raises(InvalidValueError, match=r"single logit.*two_classes"):
        metrics.deletion_curve(model, images, maps, 0, steps=4)
    curve = metrics.deletion_curve(two_classes(model), images, maps, 1, steps=4)
    assert torch.allclose(curve[:, 0], model(images)[:, 0].sigmoid().double(), atol=1e-6)


def test_two_classes_refuses_what_has_not_one_logit():
    with pytest.raises(TypeError, match="function"):
        two_classes(network)
    with pytest.raises(ValueError, match=r"\[N, 1\], got \[1, 3\]"):
        two_classes(network(3))(torch.rand(1, 3, 8, 8))


class Structured(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = network(3), kind

    def forward(self, images):
        logits = self.body(images)
        if self.kind == "dict":
            return {"logits": logits, "features": images}
        return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_logits_in_structures_are_taken(kind):
    model, image = Structured(kind).eval(), torch.rand(1, 3, 8, 8)
    changed, output = class_logits("x", model, image)
    assert torch.equal(changed(image), model.body(image)) and torch.equal(output, model.body(image))
    assert not isinstance(model(image), torch.Tensor)
    assert predict(prepare_for_attribution(changed, image), image).shape == (3,)


class Ends(nn.Module):
    def __init__(self, end, classes):
        super().__init__()
        self.body, self.end = network(classes), end

    def forward(self, images):
        return self.end(self.body(images))


@pytest.mark.parametrize(
    ("end", "classes", "name"),
    [
        (nn.Softmax(1), 3, "softmax"),
        (nn.Sigmoid(), 1, "sigmoid"),
        (nn.Sigmoid(), 3, "sigmoid"),
        (lambda logits: logits.softmax(1), 3, "softmax"),
        (lambda logits: logits.sigmoid().squeeze(1)[:, None], 1, "sigmoid"),
        (lambda logits: F.softmax(logits[:, :, None], 1).flatten(1), 3, "softmax"),
        (lambda logits: {"logits": logits.softmax(1)}, 3, "softmax"),
    ],
)
def test_probabilities_are_refused(end, classes, name):
    with pytest.raises(InvalidValueError, match=f"my network ends in a {name}, so that it returns probabilities"):
        class_logits("my network", Ends(end, classes).eval(), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("end", [nn.LogSoftmax(1), nn.Identity(), nn.ReLU(), lambda logits: logits.sigmoid() * 10 - 5])
def test_other_ends_are_logits(end):
    model = Ends(end, 3).eval()
    assert class_logits("x", model, torch.rand(1, 3, 8, 8))[0] is model


def test_nonfinite_logits_are_an_error():
    model = network(3).half()
    with torch.no_grad():
        model[4].weight.fill_(60000)
    with pytest.raises(InvalidValueError, match=r"NaN or infinite logits in torch\.float16"):
        predict(model, torch.full((1, 3, 8, 8), 60000, dtype=torch.float16))
