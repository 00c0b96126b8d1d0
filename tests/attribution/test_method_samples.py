"""Spade on several inputs, and on inputs that are one sample as a whole: it equals Captum, and each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

captum_attr = pytest.importorskip("captum.attr")

from captum.attr import (  # noqa: E402
    Attribution,
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    FeaturePermutation,
    GradientShap,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    KernelShap,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    NeuronConductance,
    NeuronFeatureAblation,
    NeuronGradient,
    NeuronIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValues,
    ShapleyValueSampling,
    TextTokenInput,
)

from spade_fast.attribution import Spade  # noqa: E402
from spade_fast.attribution.method_samples import samples_of  # noqa: E402
from spade_fast.pruning.tracing import trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

S = 3
SETTINGS: dict[str, Any] = {"sparsity": 0.5, "solver": "sparsegpt"}


class Pair(nn.Module):
    """Returns its two arguments."""

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first * 1, second * 1


class Two(nn.Module):
    """Maps rows of 3 features, multiplied by a gain, and images ``[N, 2, 4, 4]`` to 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.pair = nn.Linear(3, 6), nn.Conv2d(2, 3, 3, padding=1), Pair()
        self.act1, self.act2, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(54, 4)

    def forward(self, rows: Tensor, images: Tensor, gain: Any = 1.0, sign: str = "+") -> Tensor:
        first, second = self.pair(self.act1(self.linear(rows * gain)), self.act2(self.conv(images)))
        logits = self.head(torch.cat([first, second.flatten(1)], 1))
        return logits if sign == "+" else -logits


def values(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = values(S, 3, seed=1), values(S, 2, 4, 4, seed=2)
MASKS = torch.tensor([[0, 0, 1]]), torch.tensor([2, 3]).view(1, 2, 1, 1)
GAINS = 0.5 + values(S, 1, seed=4)


def calibration(sample: tuple[Tensor, ...], sample_id: str) -> list[tuple[Tensor, ...]]:
    """Two batches around a sample of several tensors."""
    assert all(len(one) == 1 for one in sample)
    generator = torch.Generator().manual_seed(len(sample_id) + sum(map(ord, sample_id)))
    return [tuple(one + torch.randn(9, *one.shape[1:], generator=generator) for one in sample) for _ in range(2)]


@pytest.fixture
def model() -> Two:
    torch.manual_seed(0)
    return Two().eval()


DETERMINISTIC: dict[str, tuple[Callable[[Two], Attribution], dict[str, Any]]] = {
    "saliency": (Saliency, {}),
    "integrated gradients": (
        IntegratedGradients,
        {"n_steps": 3, "baselines": (0.5, values(S, 2, 4, 4)), "return_convergence_delta": True},
    ),
    "integrated gradients, one baseline": (IntegratedGradients, {"n_steps": 3, "baselines": (values(1, 3), 0)}),
    "input x gradient": (InputXGradient, {}),
    "guided backprop": (GuidedBackprop, {}),
    "deconvolution": (Deconvolution, {}),
    "guided gradcam": (lambda m: GuidedGradCam(m, m.conv), {}),
    "deep lift": (DeepLift, {"return_convergence_delta": True, "baselines": (values(S, 3), values(1, 2, 4, 4))}),
    "deep lift shap": (DeepLiftShap, {"baselines": (values(2, 3), values(2, 2, 4, 4))}),
    "ablation": (FeatureAblation, {"feature_mask": MASKS, "perturbations_per_eval": 2}),
    "ablation, masks": (
        FeatureAblation,
        {
            "feature_mask": (torch.tensor([[0, 0, 1], [0, 1, 1], [1, 0, 1]]), torch.tensor([[[[2]]]])),
            "baselines": (1, 0),
        },
    ),
    "occlusion": (Occlusion, {"sliding_window_shapes": ((1,), (2, 2, 2)), "strides": (1, (1, 2, 2))}),
    "shapley": (ShapleyValues, {"feature_mask": MASKS}),
    "layer of two outputs": (lambda m: LayerActivation(m, m.pair), {}),
    "inputs of a layer": (lambda m: LayerActivation(m, m.pair), {"attribute_to_layer_input": True}),
    "layer gradients of two outputs": (lambda m: LayerIntegratedGradients(m, m.pair), {"n_steps": 3}),
    "layers": (lambda m: LayerIntegratedGradients(m, [m.linear, m.conv]), {"n_steps": 3}),
    "conductance": (lambda m: LayerConductance(m, m.conv), {"n_steps": 3, "return_convergence_delta": True}),
    "influence": (lambda m: InternalInfluence(m, m.linear), {"n_steps": 3}),
    "gradient x activation": (lambda m: LayerGradientXActivation(m, m.pair), {}),
    "layer gradcam": (lambda m: LayerGradCam(m, m.conv), {}),
    "neuron gradient": (lambda m: NeuronGradient(m, m.head), {"neuron_selector": 2}),
    "neuron conductance": (lambda m: NeuronConductance(m, m.head), {"neuron_selector": 1, "n_steps": 3}),
    "neuron gradients": (lambda m: NeuronIntegratedGradients(m, m.head), {"neuron_selector": 1, "n_steps": 3}),
    "neuron ablation": (lambda m: NeuronFeatureAblation(m, m.head), {"neuron_selector": 1, "feature_mask": MASKS}),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_at_sparsity_zero_it_equals_captum(name: str, model: Two) -> None:
    make, arguments = DETERMINISTIC[name]
    method = make(model)
    if not name.startswith(("neuron", "layer of", "inputs of")) or name == "neuron conductance":
        arguments = {**arguments, "target": [0, 3, 1]}
    arguments = {**arguments, "additional_forward_args": (GAINS, "-")}
    expected = method.attribute(INPUTS, **arguments)
    found = Spade(method, calibration, sparsity=0).attribute(INPUTS, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


RANDOM: dict[str, tuple[Callable[[Two], Attribution], dict[str, Any]]] = {
    "saliency": (Saliency, {}),
    "gradient shap": (GradientShap, {"n_samples": 2, "baselines": (values(2, 3), values(2, 2, 4, 4))}),
    "tunnel": (lambda m: NoiseTunnel(IntegratedGradients(m)), {"nt_samples": 2, "stdevs": (0.1, 0.2), "n_steps": 2}),
    "lime": (KernelShap, {"n_samples": 10, "feature_mask": MASKS}),
    "shapley": (ShapleyValueSampling, {"n_samples": 2, "feature_mask": MASKS}),
}


@pytest.mark.parametrize("name", RANDOM)
def test_each_sample_is_explained_on_its_own_trace(name: str, model: Two) -> None:
    make, arguments = RANDOM[name]
    method, targets = make(model), [0, 3, 1]
    torch.manual_seed(0)
    np.random.seed(0)
    spade = Spade(method, calibration, **SETTINGS)
    found = spade.attribute(INPUTS, target=targets, additional_forward_args=(GAINS, "-"), **arguments)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = []
    for index, target in enumerate(targets):
        sample, gain = tuple(one[index : index + 1] for one in INPUTS), GAINS[index : index + 1]
        batches = [(*batch, gain.expand(9, 1), "-") for batch in calibration(sample, str(index))]
        with trace(model, batches, **SETTINGS).applied(model):
            expected.append(method.attribute(sample, target=target, additional_forward_args=(gain, "-"), **arguments))
    torch.testing.assert_close(found, tuple(map(torch.cat, zip(*expected, strict=True))), rtol=1e-4, atol=1e-6)
    assert len(spade.traces) == S


class Noisy:
    """Has noise, of which it makes copies too."""

    noise = 0.1

    def __call__(self, sample: tuple[Tensor, ...], sample_id: str) -> list[tuple[Tensor, ...]]:
        return calibration(sample, sample_id)

    def noisy(self, sample: tuple[Tensor, ...], sample_id: str, count: int) -> tuple[Tensor, ...]:
        self.asked = sample_id, count
        return tuple(one + 0.01 * torch.arange(count).view(-1, *(1 for _ in one.shape[1:])) for one in sample)


def test_automatic_sparsity_and_means_over_traces(model: Two) -> None:
    with torch.no_grad():
        model.head.weight *= 20
    spade = Spade(InputXGradient(model), Noisy(), keep=(0.9, 0.5), draws=2, solver="sparsegpt")
    found = spade.attribute(INPUTS, target=2, additional_forward_args=GAINS)
    assert spade.calibration.asked == ("2", 4) and len(spade.traces) == 4 * S
    assert all(made.auto and made.auto.kept for made in spade.traces)
    for index in range(S):
        sample, parts = tuple(one[index : index + 1] for one in INPUTS), []
        for made in spade.traces[4 * index : 4 * index + 4]:
            with made.applied(model):
                maps = InputXGradient(model).attribute(sample, 2, additional_forward_args=GAINS[index : index + 1])
            parts.append([one / sum(each.abs().sum() for each in maps) for one in maps])
        expected = [torch.stack(of_input).mean(0)[0] for of_input in zip(*parts, strict=True)]
        torch.testing.assert_close([one[index] for one in found], expected, rtol=1e-4, atol=1e-6)


def test_batches_given_directly(model: Two) -> None:
    batches = [(*INPUTS, GAINS)]
    spade = Spade(FeaturePermutation(model), batches, **SETTINGS)
    torch.manual_seed(0)
    found = spade.attribute(INPUTS, target=1, feature_mask=MASKS, additional_forward_args=GAINS)
    torch.manual_seed(0)
    with trace(model, batches, **SETTINGS).applied(model):
        expected = FeaturePermutation(model).attribute(INPUTS, 1, feature_mask=MASKS, additional_forward_args=GAINS)
    torch.testing.assert_close(found, expected)
    assert Spade(Saliency(model), [INPUTS]).attribute(INPUTS, target=1)[1].shape == INPUTS[1].shape
    with pytest.raises(ValueError, match="batch 0 lacks the additional_forward_args, which differ by sample"):
        Spade(Saliency(model), [INPUTS], **SETTINGS).attribute(INPUTS, target=1, additional_forward_args=GAINS)


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (lambda m: lambda *given: m(*given).sum().abs(), INPUTS),
        (lambda m: lambda *given: m(*given).sum().abs().reshape(1), INPUTS),
        (lambda m: lambda *given: m(*given).sum().abs().item(), INPUTS),
        (lambda m: lambda rows, images: m(rows.expand(S, 3), images).sum().abs(), (INPUTS[0][:1], INPUTS[1])),
        (lambda m: lambda row, images: m(row[None], images).sum().abs(), (INPUTS[0][0], INPUTS[1][:1])),
    ],
)
def test_what_has_one_result_is_one_sample(network: Any, inputs: tuple[Tensor, ...], model: Two) -> None:
    given = []

    def batches(sample: tuple[Tensor, ...], name: str) -> list[tuple[Tensor, ...]]:
        given.append((name, sample))
        return [INPUTS]

    method = FeatureAblation(network(model))
    found = Spade(method, batches, sparsity=0, model=model).attribute(inputs)
    torch.testing.assert_close(found, method.attribute(inputs), rtol=1e-4, atol=1e-6)
    ((name, sample),) = given
    assert name == "0" and [one.shape for one in sample] == [one.shape for one in inputs]
    spade = Spade(method, batches, model=model, solver="sparsegpt")
    spade.attribute(inputs)
    assert len(spade.traces) == 1 and spade.traces[0].auto is not None and spade.traces[0].decision is None


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": self.encode(text), "offset_mapping": [(one, one + 1) for one in range(len(text))]}

    def encode(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [ord(one) - ord("a") for one in text]
        return torch.tensor([ids]) if return_tensors else ids

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return chr(ids + ord("a")) if isinstance(ids, int) else [chr(int(one) + ord("a")) for one in ids]

    def decode(self, ids: Any) -> str:
        return "".join(self.convert_ids_to_tokens(ids))


class NextLetter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(26, 8), nn.Linear(8, 26)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.linear(self.embed(input_ids).cumsum(1)))


def test_texts() -> None:
    torch.manual_seed(0)
    model, tokenizer = NextLetter().eval(), Letters()
    method = LLMAttribution(FeatureAblation(model), tokenizer)
    text, given = TextTokenInput("spade", tokenizer), []

    def batches(sample: TextTokenInput, name: str) -> Tensor:
        given.append((name, sample))
        return torch.randint(26, (30, 7), generator=torch.Generator().manual_seed(0))

    arguments = {"target": "fast", "use_cached_outputs": False}
    found = Spade(method, batches, sparsity=0.5, layers="linear").attribute(text, **arguments)
    assert given == [("0", text)]
    with trace(model, batches(text, "0"), sparsity=0.5, layers="linear").applied(model):
        torch.testing.assert_close(found.token_attr, method.attribute(text, **arguments).token_attr)
    dense = Spade(method, batches, sparsity=0).attribute(text, **arguments)
    torch.testing.assert_close(dense.seq_attr, method.attribute(text, **arguments).seq_attr)
    assert not torch.allclose(dense.seq_attr, found.seq_attr)
    with pytest.raises(ValueError, match="needs the samples as tensors: give a number for LLMAttribution"):
        Spade(method, batches)
    with pytest.raises(ValueError, match="the results of LLMAttribution have no mean: ask for one draw"):
        Spade(method, batches, sparsity=0.5, draws=2)


def test_texts_by_gradients() -> None:
    torch.manual_seed(0)
    model, tokenizer = NextLetter().eval(), Letters()
    model.device = torch.device("cpu")
    method = LLMGradientAttribution(LayerIntegratedGradients(model, model.embed), tokenizer)
    text, batches = TextTokenInput("spade", tokenizer), torch.randint(26, (30, 7))
    found = Spade(method, [batches], sparsity=0.5, layers="linear").attribute(text, target="fast")
    with trace(model, [batches], sparsity=0.5, layers="linear").applied(model):
        torch.testing.assert_close(found.seq_attr, method.attribute(text, target="fast").seq_attr)


def test_what_a_sample_is() -> None:
    def count(network: Any, inputs: Any, more: Any = None) -> int:
        return len(samples_of(Saliency(network), inputs, {"additional_forward_args": more}))

    rows, linear = torch.rand(3, 2), nn.Linear(2, 2)
    assert count(linear, rows) == 3 and count(linear, (rows,)) == 3 and count(linear, rows[:1]) == 1
    assert count(lambda x: {"logits": linear(x)}, rows) == 3
    assert count(lambda x, scale: linear(x) * scale, rows, torch.rand(3, 1)) == 3
    assert count(nn.Linear(3, 1), torch.rand(3)) == 1  # whose only dimension counts features
    assert count(lambda x: torch.zeros(2), rows) == 1
    assert count(lambda x: linear(x[:1]) if len(x) == 1 else linear(x[:9, :, None]), rows) == 3  # one at a time
    assert count(lambda x, y: linear(x), (rows, rows[:0])) == count(lambda x, y: linear(x), (rows, rows[:1])) == 1
    for inputs, message in (([rows], "got list"), ((rows, 1), "got int"), ((), "got an empty tuple")):
        with pytest.raises(TypeError, match=f"a tensor or a tuple of tensors, {message}"):
            count(linear, inputs)
    for tensor in (torch.tensor(1.0), rows[:0]):
        with pytest.raises(ValueError, match=r"with at least one sample, got \["):
            count(linear, tensor)
