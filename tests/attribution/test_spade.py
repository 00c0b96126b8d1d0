"""Spade around Captum's methods."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

captum_attr = pytest.importorskip("captum.attr")

from captum.attr import (  # noqa: E402
    DeepLift,
    FeatureAblation,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)

from spade_fast import DecisionWarning, TraceAppliedError  # noqa: E402
from spade_fast.attribution import Spade, prepare_for_attribution  # noqa: E402
from spade_fast.inputs.augment import ImageAugmenter  # noqa: E402
from spade_fast.pruning.tracing import trace  # noqa: E402
from spade_fast.targets import class_against, neuron, token  # noqa: E402
from tests.networks import Small  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")

SETTINGS = {"sparsity": 0.5, "solver": "sparsegpt"}
AUGMENTER = ImageAugmenter(n=6, seed=1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def by_hand(model, method, image, sample_id, **arguments):
    made = trace(model, AUGMENTER(image, sample_id), sample_id=sample_id, seed=1, **SETTINGS)
    with made.applied(model):
        return method.attribute(image[None], **arguments)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


METHODS = {
    "saliency": (lambda m: Saliency(m), {}),
    "integrated gradients": (lambda m: IntegratedGradients(m), {"n_steps": 4}),
    "input x gradient": (lambda m: InputXGradient(m), {}),
    "guided gradcam": (lambda m: GuidedGradCam(m, m.conv2), {}),
    "layer gradcam": (lambda m: LayerGradCam(m, m.conv2), {}),
    "guided backprop": (lambda m: GuidedBackprop(m), {}),
    "deep lift": (lambda m: DeepLift(m), {}),
    "occlusion": (lambda m: Occlusion(m), {"sliding_window_shapes": (3, 6, 6), "strides": (3, 6, 6)}),
    "feature ablation": (lambda m: FeatureAblation(m), {"feature_mask": torch.arange(3).view(1, 3, 1, 1)}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_equals_trace_by_hand(name, model, images):
    make, arguments = METHODS[name]
    prepared = prepare_for_attribution(model)
    method = make(prepared)
    before = state(model)
    spade = Spade(method, AUGMENTER, **SETTINGS)
    found = spade.attribute(images, target=[0, 3, 1], **arguments)
    assert_untouched(model, before)
    expected = [
        by_hand(prepared, method, image, str(index), target=target, **arguments)
        for index, (image, target) in enumerate(zip(images, [0, 3, 1], strict=True))
    ]
    assert torch.equal(found, torch.cat(expected))
    assert [made.sample_id for made in spade.traces] == ["0", "1", "2"]
    assert all(made.header["settings"]["seed"] == 1 for made in spade.traces)
    dense = method.attribute(images, target=[0, 3, 1], **arguments)
    assert found.shape == dense.shape and not torch.allclose(found, dense)


def test_group_size_changes_nothing(model, images):
    one = Spade(Saliency(model), AUGMENTER, samples_per_solve=1, **SETTINGS).attribute(images, target=0)
    three = Spade(Saliency(model), AUGMENTER, samples_per_solve=3, **SETTINGS).attribute(images, target=0)
    assert torch.allclose(one, three, atol=1e-6)


def test_groups_share_a_compiled_network(model, images, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graphs.append(graph) or graph)
    options = {"samples_per_solve": 1, **SETTINGS}
    compiled = Spade(Saliency(model), AUGMENTER, compile=True, **options).attribute(images, target=0)
    assert len(graphs) == 1
    assert torch.allclose(compiled, Spade(Saliency(model), AUGMENTER, **options).attribute(images, target=0), atol=1e-6)


def test_convergence_delta_and_tuple_input(model, images):
    spade = Spade(IntegratedGradients(model), AUGMENTER, **SETTINGS)
    (attributions,), delta = spade.attribute((images,), target=1, n_steps=4, return_convergence_delta=True)
    assert attributions.shape == images.shape and delta.shape == (3,)
    assert spade.has_convergence_delta() and spade.multiplies_by_inputs


def test_positional_arguments(model, images):
    spade = Spade(IntegratedGradients(model), AUGMENTER, **SETTINGS)
    found = spade.attribute(images[:1], torch.zeros_like(images[:1]), 2, n_steps=3)
    assert torch.equal(found, spade.attribute(images[:1], baselines=0, target=2, n_steps=3))


def test_inside_noise_tunnel(model, images):
    tunnel = NoiseTunnel(Spade(Saliency(model), AUGMENTER, **SETTINGS))
    assert tunnel.attribute(images[:1], nt_samples=2, stdevs=0.1, target=0).shape == (1, 3, 12, 12)


def test_sample_ids_fix_the_augmentations(model, images):
    spade = Spade(Saliency(model), AUGMENTER, **SETTINGS)
    together = spade.attribute(images, target=0, sample_ids=["a", "b", "c"])
    alone = spade.attribute(images[2:], target=0, sample_ids=["c"])
    assert torch.allclose(together[2:], alone, atol=1e-6)
    with pytest.raises(ValueError, match="each of the 3 samples"):
        spade.attribute(images, target=0, sample_ids=["a"])


def test_batches_given_directly_make_one_trace(model, images):
    spade = Spade(Saliency(model), images, **SETTINGS)
    found = spade.attribute(images, target=0)
    made = trace(model, images, **SETTINGS)
    with made.applied(model):
        assert torch.equal(found, Saliency(model).attribute(images, target=0))
    assert len(spade.traces) == 1


def test_function_needs_the_model_named(model, images):
    method = Saliency(lambda x: model(x).softmax(1))
    with pytest.raises(TypeError, match=r"model="):
        Spade(method, AUGMENTER, **SETTINGS)
    found = Spade(method, AUGMENTER, model=model, **SETTINGS).attribute(images[:1], target=0)
    assert torch.equal(found, by_hand(model, method, images[0], "0", target=0))


def test_compiled_networks(model, images):
    compiled = torch.compile(model, backend="eager")
    found = Spade(Saliency(compiled), AUGMENTER, **SETTINGS).attribute(images, target=0)
    assert torch.allclose(found, Spade(Saliency(model), AUGMENTER, **SETTINGS).attribute(images, target=0), atol=1e-6)


def test_the_named_model_must_be_the_methods(model, images):
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"shares no parameters with the Small that Saliency was built on"):
        Spade(Saliency(other), AUGMENTER, model=model, **SETTINGS)
    for method in (Saliency(prepare_for_attribution(model)), NoiseTunnel(Saliency(nn.Sequential(model)))):
        Spade(method, AUGMENTER, model=model, **SETTINGS)


def test_model_is_restored_after_an_error(model, images):
    before = state(model)
    spade = Spade(Saliency(model), AUGMENTER, **SETTINGS)
    with pytest.raises(Exception, match=r"(?i)target|index"):
        spade.attribute(images, target=99)
    assert_untouched(model, before)
    assert spade.attribute(images, target=0).shape == images.shape


class Normed(nn.Module):
    """Has batch norms and dropout, counts its calls, and can have a baseline subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.norm1, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()
        self.head = nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.dropout(self.norm1(self.hidden(x))))


@pytest.mark.parametrize("calibration", ["augmenter", "batches"])
@pytest.mark.parametrize("built_on", ["model", "copy", "function"])
@pytest.mark.parametrize("count", [1, 8])
def test_networks_in_training_mode_are_explained_in_evaluation_mode(calibration, built_on, count, images):
    torch.manual_seed(0)
    images = torch.rand(count, 3, 12, 12)
    model = Normed().train()
    model.hidden.eval()
    network = {"model": model, "copy": prepare_for_attribution(model, images), "function": lambda x: model(x)}[built_on]
    network = network.train() if built_on == "copy" else network
    given = AUGMENTER if calibration == "augmenter" else images
    spade = Spade(IntegratedGradients(network), given, model=model, **SETTINGS)
    before, modes = state(model), [module.training for module in model.modules()]
    found = spade.attribute(images, target=0, n_steps=3)
    assert torch.equal(found, spade.attribute(images, target=0, n_steps=3))
    with pytest.raises(Exception, match=r"(?i)target|index"):
        spade.attribute(images, target=99)
    assert_untouched(model, before)
    assert [module.training for module in model.modules()] == modes
    assert built_on != "copy" or all(module.training for module in network.modules())
    model.eval()
    network = network.eval() if built_on == "copy" else network
    spade = Spade(IntegratedGradients(network), given, model=model, **SETTINGS)
    assert torch.equal(found, spade.attribute(images, target=0, n_steps=3))


def test_bad_arguments(model, images):
    with pytest.raises(TypeError, match=r"captum\.attr"):
        Spade(model, AUGMENTER, **SETTINGS)
    with pytest.raises(ValueError, match="samples_per_solve"):
        Spade(Saliency(model), AUGMENTER, samples_per_solve=0, **SETTINGS)
    spade = Spade(Saliency(model), AUGMENTER, **SETTINGS)
    with pytest.raises(TypeError, match="steps"):
        spade.attribute(images, target=0, steps=3)
    with pytest.raises(ValueError, match="3 samples, got 2"):
        spade.attribute(images, target=[0, 1])
    with pytest.raises(TypeError, match="batch 0 has 1 value, but the network is called with 2 inputs"):
        Spade(Saliency(model), images, **SETTINGS).attribute((images, images), target=0)
    with pytest.raises(ValueError, match="shape"):
        spade.attribute(images[:0], target=0)
    with pytest.raises(ValueError, match="NaN"):
        spade.attribute(torch.full_like(images, float("nan")), target=0)
    with pytest.raises(ValueError, match="sparsity"):
        Spade(Saliency(model), AUGMENTER, sparsity=1.5).attribute(images, target=0)


def test_an_iterator_as_calibration_is_refused():
    model = nn.Linear(4, 2)
    with pytest.raises(TypeError, match="calibration is an iterator"):
        Spade(Saliency(model), (torch.randn(3, 4) for _ in range(2)), sparsity=0.5)


def test_traces_know_their_decisions(model, images):
    spade = Spade(Saliency(model), AUGMENTER, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecisionWarning)
        spade.attribute(images, target=1)
    for made, image in zip(spade.traces, images, strict=True):
        assert made.decision == made.record_decision(model, image[None])
    with torch.no_grad():  # without weights, the network predicts the class of the largest bias
        model.head.bias.zero_()[model(images).argmin(1)[0]] = 1e-6
    everything = Spade(Saliency(model), AUGMENTER, sparsity=1.0)
    with pytest.warns(DecisionWarning, match=r"3 of 3 traces lost the decision \('0', '1', '2'\)") as caught:
        everything.attribute(images, target=1)
    (warned,) = [one for one in caught if one.category is DecisionWarning]
    assert warned.filename == __file__ and not any(made.decision.kept for made in everything.traces)


def test_decisions_matter_where_classes_are_asked_for(model, images):
    with torch.no_grad():
        model.head.bias.zero_()[model(images).argmin(1)[0]] = 1e-6
    spade = Spade(Saliency(model), AUGMENTER, sparsity=1.0, layers="head")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecisionWarning)
        for target in (neuron("conv1", 0), [neuron("conv1", 0)] * 3, lambda logits: logits[:, 0]):
            spade.attribute(images, target=target)
            assert not any(made.decision.kept for made in spade.traces)
    with pytest.warns(DecisionWarning, match="1 of 3 traces lost the decision"):
        spade.attribute(images, target=[neuron("conv1", 0), 1, neuron("conv1", 0)])


def test_decisions_are_among_the_answers_to_the_target(model, images):
    with torch.no_grad():
        model.head.bias.zero_()[2] = 2.0  # all that is left without weights
        scores = model(images)
    spade = Spade(Saliency(model), AUGMENTER, sparsity=1.0, layers="head")
    for target in (class_against(1, 2), class_against(2, 1)):
        lost = int((scores[:, 1] > scores[:, 2]).sum())
        with pytest.warns(DecisionWarning, match=f"{lost} of 3") if lost else nullcontext():
            spade.attribute(images, target=target)
        for made, (one, two) in zip(spade.traces, scores[:, 1:3].tolist(), strict=True):
            decision = made.decision
            assert (decision.class_before, decision.class_after) == (1 if one > two else 2, 2)
            assert decision.probability_before == pytest.approx(1 / (1 + math.exp(-abs(one - two))))
            assert decision.probability_after == pytest.approx(1 / (1 + math.exp(-2)))
    tagger = nn.Sequential(model, nn.Unflatten(1, (1, -1)))  # of one token per image
    expected = [made.record_decision(model, one[None]) for made, one in zip(spade.traces, images, strict=True)]
    spade = Spade(Saliency(tagger), AUGMENTER, sparsity=1.0, layers="0.head")
    spade.attribute(images, target=token(0, 1))
    assert [made.decision for made in spade.traces] == expected


def test_decisions_with_further_arguments_and_of_other_outputs(images):
    torch.manual_seed(0)
    scaled, scale = Small().eval(), torch.full((3, 5), 2.0)
    spade = Spade(Saliency(scaled), AUGMENTER, **SETTINGS)
    spade.attribute(images, target=1, additional_forward_args=(scale,))
    expected = [
        made.record_decision(scaled, one[None], scale[:1]) for made, one in zip(spade.traces, images, strict=True)
    ]
    assert [made.decision for made in spade.traces] == expected
    function = Spade(Saliency(lambda *given: {"logits": scaled(*given)}["logits"]), AUGMENTER, model=scaled, **SETTINGS)
    function.attribute(images, target=1, additional_forward_args=(scale,))
    assert [made.decision for made in function.traces] == expected
    total = Spade(Saliency(lambda *given: scaled(*given).sum(1)), AUGMENTER, model=scaled, **SETTINGS)
    total.attribute(images, additional_forward_args=(scale,))
    assert [made.decision for made in total.traces] == [None] * 3
    maps = nn.Conv2d(3, 4, 3).eval()
    spade = Spade(Saliency(maps), AUGMENTER, **SETTINGS)
    spade.attribute(images, target=(1, 2, 2))
    assert [made.decision for made in spade.traces] == [None] * 3


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.linear(self.conv(x).relu().permute(0, 2, 3, 1)).relu().mean((1, 2)))


@pytest.mark.parametrize(
    "make", [LayerGradCam, GuidedGradCam, lambda net, layer: NoiseTunnel(LayerGradCam(net, layer))]
)
def test_grad_cam_of_maps_with_channels_last_is_refused(make, images):
    torch.manual_seed(0)
    model = prepare_for_attribution(ChannelsLast().eval())
    with pytest.raises(ValueError, match=r"got \[1, .* 4\] with the channels last"):
        Spade(make(model, model.linear), AUGMENTER, **SETTINGS).attribute(images, target=1)
    with pytest.raises(ValueError, match="with the channels last"):
        Spade(make(model, model.linear), images, **SETTINGS).attribute(images, target=1, attribute_to_layer_input=True)
    of_conv = Spade(make(model, model.conv), AUGMENTER, **SETTINGS).attribute(images, target=1)
    assert len(of_conv) == len(images)


@pytest.fixture
def sure(model) -> nn.Module:
    """Return a network whose probabilities are far from uniform."""
    with torch.no_grad():
        model.conv2.bias += 1
        model.head.weight *= 40
    return model


def test_automatic_traces_keep_the_target(sure, images):
    model = sure
    spade = Spade(Saliency(model), AUGMENTER, solver="sparsegpt")
    found = spade.attribute(images, target=[0, 1, 2])
    for index, made in enumerate(spade.traces):
        dense = float(model(images[index : index + 1]).softmax(1)[0, index].detach())
        assert made.auto.dense == pytest.approx(dense) and made.auto.score >= 0.9 * dense
        alone = trace(
            model, AUGMENTER(images[index], index), inputs=images[index : index + 1], target=index, solver="sparsegpt"
        )
        assert alone.auto.error == made.auto.error
        with alone.applied(model):
            expected = Saliency(model).attribute(images[index : index + 1], target=index)
        assert torch.allclose(found[index], expected[0], atol=1e-5)


def test_means_over_levels_and_draws(sure, images):
    model = sure
    method = InputXGradient(model)
    spade = Spade(method, AUGMENTER, solver="sparsegpt", keep=(0.95, 0.6), draws=3)
    found = spade.attribute(images, target=1, sample_ids=["a", "b", "c"])
    assert [made.sample_id for made in spade.traces[:6]] == ["a", "a", "a/draw1", "a/draw1", "a/draw2", "a/draw2"]
    assert [made.auto.keep for made in spade.traces] == 9 * [0.95, 0.6]
    assert len({made.auto.error for made in spade.traces}) > 1
    for index, image in enumerate(images):
        parts = []
        for made in spade.traces[6 * index : 6 * index + 6]:
            with made.applied(model):
                part = method.attribute(image[None], target=1)
            parts.append(part / part.abs().sum())
        assert torch.allclose(found[index], torch.stack(parts).mean(0)[0], atol=1e-6)
    first = Spade(method, AUGMENTER, solver="sparsegpt", keep=0.95)
    first.attribute(images[:1], target=1, sample_ids=["a"])
    assert first.traces[0].auto.error == spade.traces[0].auto.error  # draw 0 is the sample's own
    fixed = Spade(method, AUGMENTER, sparsity=0.4, solver="sparsegpt", draws=2)
    fixed.attribute(images[:1], target=1)
    assert len(fixed.traces) == 2 and not torch.equal(fixed.traces[0].weight("conv1"), fixed.traces[1].weight("conv1"))


def test_lost_decisions_of_levels_are_told_apart(sure, images):
    with torch.no_grad():  # two classes are as good as tied on the dense network
        first, second = sure(images[:1])[0].topk(2).indices.tolist()
        sure.head.bias[second] += float(sure(images[:1])[0, first] - sure(images[:1])[0, second]) - 1e-3
    spade = Spade(Saliency(sure), AUGMENTER, keep=(0.9, 0.5), layers="conv*")
    with pytest.warns(DecisionWarning) as caught:
        spade.attribute(images[:1], target=second, sample_ids=["a"])
    said = str(next(one.message for one in caught if one.category is DecisionWarning))
    assert said.startswith("2 of 2 traces lost the decision ('a' with keep=0.9, 'a' with keep=0.5): ")
    assert said.endswith("less pruning (a larger keep or a lower sparsity) often preserves it, but not always")


def test_one_automatic_trace_for_all_samples_keeps_their_mean(sure, images):
    model = sure
    spade = Spade(Saliency(model), torch.cat([*AUGMENTER(images[0]), *AUGMENTER(images[1])]), keep=(0.9, 0.5))
    found = spade.attribute(images, target=torch.tensor([0, 1, 2]))
    dense = model(images).softmax(1).diagonal().detach()
    assert len(spade.traces) == 2 and spade.traces[0].auto.dense == pytest.approx(float(dense[:3].mean()))
    assert torch.allclose(found[:2].flatten(1).abs().sum(1), torch.ones(2), atol=1e-5)


def test_noise_of_the_calibration_is_noise_of_the_goal(sure, images):
    model = sure
    augmenter = ImageAugmenter(n=6, seed=1, noise=0.3)
    spade = Spade(NoiseTunnel(Saliency(model)), augmenter, solver="sparsegpt")
    torch.manual_seed(0)
    spade.attribute(images[:1], target=1, nt_samples=2, stdevs=0.3)
    (made,) = spade.traces
    copies = augmenter.noisy(images[:1], "0", 4)
    with torch.no_grad():
        dense = model(copies).softmax(1)[:, 1].mean()
        with made.applied(model):
            assert float(model(copies).softmax(1)[:, 1].mean()) >= 0.9 * float(dense) - 1e-6


def test_bad_arguments_of_automatic_traces(model, images):
    with pytest.raises(ValueError, match=r"target 9 does not fit the output \[1, 5\]"):
        Spade(Saliency(model), AUGMENTER).attribute(images, target=9)
    with pytest.raises(ValueError, match="no convergence delta"):
        spade = Spade(IntegratedGradients(model), AUGMENTER, keep=(0.9, 0.5))
        spade.attribute(images, target=1, return_convergence_delta=True)
    with pytest.raises(ValueError, match="draws need an augmenter"):
        Spade(Saliency(model), images, draws=2)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        Spade(Saliency(model), AUGMENTER, draws=0)
    with pytest.raises(ValueError, match=r"sample 'b': target .*lambda> must be finite, got nan"):
        spade = Spade(Saliency(model), AUGMENTER)
        spade.attribute(images[:1], lambda output: output[:, 0] * math.nan, sample_ids=["b"])
    with pytest.raises(ValueError, match="sample '1': target output 1 must be finite, got nan"):
        Spade(Saliency(model), AUGMENTER).attribute(torch.stack([images[0], images[1] * math.nan]), 1)


def test_own_augmenters_may_have_noise_of_their_own(model, images):
    class Own:
        noise = 0.3

        def __call__(self, image: Tensor, sample_id: str) -> Iterable[Tensor]:
            return AUGMENTER(image, sample_id)

    expected = Spade(Saliency(model), AUGMENTER, seed=1).attribute(images[:1], 1)
    assert torch.equal(Spade(Saliency(model), Own(), seed=1).attribute(images[:1], 1), expected)


def test_the_dense_network_is_asked_while_no_trace_can_be_applied(model, images):
    other, refused = trace(model, AUGMENTER(images[0]), sparsity=0.5), []

    def forward(x: Tensor) -> Tensor:
        try:
            with other.applied(model):
                pass
        except TraceAppliedError as error:
            refused.append("being pruned" in str(error))
        return model(x)

    spade = Spade(Saliency(forward), AUGMENTER, sparsity=0.5, model=model)
    spade.attribute(images[:1], 0)
    assert refused == [True, False, False]  # the dense network, the trace's decision, the method
