"""SmoothGrad against a plain loop over noisy copies, for every gradient method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("captum")

from spade_fast._util.draws import generator_of
from spade_fast._util.errors import UserError
from spade_fast.attribution import (
    METHODS,
    Question,
    SmoothGrad,
    attribution_map,
    make_recipe,
    methods,
    prepare_for_attribution,
)
from spade_fast.attribution.methods import seeded
from spade_fast.pruning.tracing import trace

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor", "ignore:Setting (backward|forward)")
SMOOTH = SmoothGrad(noise=0.3, copies=11)


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    for name, value in {"_IG_STEPS": 3, "_SHAP_SAMPLES": 3, "_LIME_SAMPLES": 12, "_OCCLUSION_PATCHES": 3}.items():
        monkeypatch.setattr(methods, name, value)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    ).to(dtype)


def question(dtype: torch.dtype = torch.float32) -> Question:
    image = 3 * torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)) - 1
    return Question(prepare_for_attribution(network(dtype).eval()), image.to(dtype), 2, torch.full((1, 3, 1, 1), -1.0))


def copies_of(image: torch.Tensor, smooth: SmoothGrad) -> list[torch.Tensor]:
    """The noisy copies, one draw each."""
    deviation = smooth.noise * (image.max() - image.min())
    generators = [generator_of(f"smoothgrad/{i}") for i in range(smooth.copies)]
    return [image + deviation * torch.randn(image.shape[1:], generator=one) for one in generators]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].smooth and name != "gradient-shap"])
def test_the_map_is_that_of_the_mean_signed_attribution(name):
    asked = question()
    recipe = make_recipe(name, asked)
    arguments = recipe.arguments | ({"abs": False} if name == "saliency" else {})
    each = [recipe.attribution.attribute(one, **arguments).detach() for one in copies_of(asked.image, SMOOTH)]
    expected = torch.cat(each).mean(0).abs().sum(0)
    found = attribution_map(name, asked, SMOOTH)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert torch.equal(attribution_map(name, asked, SMOOTH), found), "the same map again"
    assert not torch.allclose(found, attribution_map(name, asked), rtol=0.1)


def test_signs_cancel_out():
    """In a network that is even in each pixel the gradient changes sign with the noise at a pixel of zero."""
    asked = Question(Square(), torch.zeros(1, 3, 4, 4), 1, torch.zeros(1, 3, 1, 1))
    asked.image[0, 0, 0, 0] = 1
    found = attribution_map("saliency", asked, SmoothGrad(noise=0.5, copies=400))
    # The mean of 2 (x + noise): magnitudes would add up to 3 · 2 · 0.5 · sqrt(2 / pi) = 2.4.
    assert abs(float(found[0, 0]) - 2) < 0.3 and float(found.flatten()[1:].max()) < 0.5


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.flatten(1).sum(1), x.square().flatten(1).sum(1)], 1)


def test_gradient_shap_takes_the_copies_one_by_one():
    asked, seen = question(), []
    asked.model.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    found = attribution_map("gradient-shap", asked, SMOOTH)
    assert set(seen) == {methods._SHAP_SAMPLES} and len(seen) == SMOOTH.copies
    recipe = make_recipe("gradient-shap", asked)
    with seeded(asked.image.device):
        each = [recipe.attribution.attribute(one, **recipe.arguments) for one in copies_of(asked.image, SMOOTH)]
    assert torch.allclose(found, torch.cat(each).mean(0).abs().sum(0).detach(), rtol=1e-4, atol=1e-6)


def test_copies_go_through_the_network_in_batches():
    asked, seen = question(), []
    asked.model.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    attribution_map("saliency", asked, SMOOTH)
    assert seen == [8, 3]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.smooth])
def test_other_methods_give_their_plain_map(name):
    asked = question()
    assert torch.equal(attribution_map(name, asked, SMOOTH), attribution_map(name, asked))


def test_without_noise_it_is_the_plain_map():
    asked = question()
    found = attribution_map("saliency", asked, SmoothGrad(noise=0, copies=3))
    assert torch.allclose(found, attribution_map("saliency", asked), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_have_the_same_noise(dtype):
    found, expected = (attribution_map("saliency", question(one), SMOOTH) for one in (dtype, torch.float32))
    off = float((found - expected).norm() / expected.norm())
    assert found.dtype == torch.promote_types(dtype, torch.float32) and off < (1e-5 if dtype == torch.float64 else 0.3)


def test_on_a_trace_it_is_that_of_the_pruned_network():
    asked = question()
    made = trace(asked.model, asked.image.expand(4, -1, -1, -1), sparsity=0.6)
    with made.applied(asked.model):
        found = attribution_map("saliency", asked, SMOOTH)
    pruned = question()
    weights = {f"{report.name}.weight": made.weight(report.name) for report in made.reports}
    pruned.model.load_state_dict(asked.model.state_dict() | weights)
    assert torch.equal(found, attribution_map("saliency", pruned, SMOOTH))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": -0.1}, ValueError, "noise must be finite and at least 0, got -0.1"),
        ({"noise": float("nan")}, ValueError, "noise must be finite and at least 0, got nan"),
        ({"noise": float("inf")}, ValueError, "noise must be finite"),
        ({"noise": None}, TypeError, "noise must be a number, got None"),
        ({"noise": True}, TypeError, "noise must be a number, got True"),
        ({"copies": 0}, ValueError, "copies must be at least 1, got 0"),
        ({"copies": 2.0}, TypeError, "copies must be an integer, got 2.0"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message) as caught:
        SmoothGrad(**options)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("smooth", [True, 0.2, SmoothGrad])
def test_no_smoothgrad(smooth):
    with pytest.raises(UserError, match="smooth must be a SmoothGrad or None, got "):
        attribution_map("saliency", question(), smooth)


def test_noise_too_large_for_the_dtype():
    with pytest.raises(UserError, match=r"is too large for torch.float16"):
        attribution_map("saliency", question(torch.float16), SmoothGrad(noise=1e6))
