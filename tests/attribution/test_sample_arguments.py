"""Each sample gets its own part of the arguments: Spade equals the method run on each sample's trace by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

captum_attr = pytest.importorskip("captum.attr")

from captum.attr import (  # noqa: E402
    LRP,
    DataLoaderAttribution,
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    FeaturePermutation,
    GradientShap,
    IntegratedGradients,
    InternalInfluence,
    KernelShap,
    LayerConductance,
    LayerDeepLift,
    LayerDeepLiftShap,
    LayerFeatureAblation,
    LayerFeaturePermutation,
    LayerGradientShap,
    LayerIntegratedGradients,
    LayerLRP,
    Lime,
    NeuronConductance,
    NeuronDeepLift,
    NeuronDeepLiftShap,
    NeuronFeatureAblation,
    NeuronGradientShap,
    NeuronIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValues,
    ShapleyValueSampling,
)
from captum.attr._utils.lrp_rules import GammaRule  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from spade_fast.attribution import Spade  # noqa: E402
from spade_fast.attribution.lime import Ridge  # noqa: E402
from spade_fast.pruning.tracing import trace  # noqa: E402
from spade_fast.targets import class_score  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {"sparsity": 0.5, "solver": "sparsegpt"}
S = 3


class Net(nn.Module):
    """Maps images of 3 channels (as many as samples), or rows of 3 features, to 4 classes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1) if len(shape) == 3 else nn.Linear(3, 3)
        self.act = nn.ReLU()
        self.head = nn.Linear(int(np.prod(shape)), 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.head(self.act(self.first(x)).flatten(1))
        return y if scale is None else y * scale


def calibration(sample: Tensor, sample_id: str) -> Tensor:
    noise = torch.randn(20, *sample.shape[1:], generator=torch.Generator().manual_seed(int(sample_id)))
    return sample + noise


@pytest.fixture
def images() -> Tensor:
    return torch.rand(S, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows() -> Tensor:
    return torch.rand(S, 3, generator=torch.Generator().manual_seed(2))


def values(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def features(*shape: int) -> Tensor:
    """Masks of two features, which differ from entry to entry."""
    return (values(*shape) > 0.5).long()


def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def assert_as_by_hand(method, model: nn.Module, inputs: Tensor, shared: dict, of_samples: dict) -> None:
    """`shared` go to each sample whole; of each tensor in `of_samples`, a sample gets its own entry."""
    seeded()
    found = Spade(method, calibration, **SETTINGS).attribute(inputs, target=[0, 1, 2], **shared, **of_samples)
    seeded()
    expected = []
    for index in range(S):
        sample = inputs[index : index + 1]
        own = {name: value[index : index + 1] for name, value in of_samples.items()}
        with trace(model, calibration(sample, str(index)), **SETTINGS).applied(model):
            expected.append(method.attribute(sample, target=index, **shared, **own))
    found, expected = (one if isinstance(one, Tensor) else one[0] for one in (found, torch.cat(expected)))
    assert torch.equal(found, expected) and found.shape[0] == S


WINDOWS = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}
IMAGE = (3, 8, 8)
# Method, arguments shared by all samples, arguments with an entry per sample.
ON_IMAGES = {
    "occlusion, baseline per channel": (Occlusion, {**WINDOWS, "baselines": values(3, 1, 1)}, {}),
    "occlusion, baseline image": (Occlusion, {**WINDOWS, "baselines": values(*IMAGE)}, {}),
    "occlusion, baseline per column": (Occlusion, {**WINDOWS, "baselines": values(8)}, {}),
    "occlusion, baseline for all": (Occlusion, {**WINDOWS, "baselines": values(1, *IMAGE)}, {}),
    "occlusion, baselines": (Occlusion, WINDOWS, {"baselines": values(S, *IMAGE)}),
    "occlusion, baseline numbers": (Occlusion, WINDOWS, {"baselines": values(S, 1, 1, 1)}),
    "ablation, mask of an image": (FeatureAblation, {"feature_mask": features(*IMAGE)}, {}),
    "ablation, mask of pixels": (FeatureAblation, {"feature_mask": features(8, 8)}, {}),
    "ablation, mask for all": (FeatureAblation, {"feature_mask": features(1, 1, 8, 8)}, {}),
    "ablation, masks": (FeatureAblation, {}, {"feature_mask": features(S, *IMAGE)}),
    "ablation, both": (FeatureAblation, {"baselines": values(3, 1, 1)}, {"feature_mask": features(S, 1, 8, 8)}),
    "gradients, baseline": (IntegratedGradients, {"n_steps": 3, "baselines": values(1, *IMAGE)}, {}),
    "gradients, baselines": (IntegratedGradients, {"n_steps": 3}, {"baselines": values(S, *IMAGE)}),
    "gradients, scales": (IntegratedGradients, {"n_steps": 3}, {"additional_forward_args": values(S, 1)}),
    "gradients, scale": (Saliency, {"additional_forward_args": torch.tensor(2.0)}, {}),
    "deep lift": (DeepLift, {}, {"baselines": values(S, *IMAGE)}),
    "gradient shap": (GradientShap, {"n_samples": 4, "baselines": values(S, *IMAGE)}, {}),
    "deep lift shap": (DeepLiftShap, {"baselines": values(S, *IMAGE)}, {}),
    "shapley": (ShapleyValueSampling, {"n_samples": 2, "feature_mask": features(*IMAGE)}, {}),
    "exact shapley": (ShapleyValues, {}, {"feature_mask": features(S, *IMAGE)}),
    "tunnel": (lambda m: NoiseTunnel(Saliency(m)), {"nt_samples": 2, "stdevs": 0.1}, {}),
    "tunnel, baselines": (
        lambda m: NoiseTunnel(IntegratedGradients(m)),
        {"nt_samples": 2, "n_steps": 2},
        {"baselines": values(S, *IMAGE)},
    ),
    "tunnel, distribution": (
        lambda m: NoiseTunnel(IntegratedGradients(m)),
        {"nt_samples": 2, "n_steps": 2, "draw_baseline_from_distrib": True, "baselines": values(S, *IMAGE)},
        {},
    ),
    "layer gradient shap": (
        lambda m: LayerGradientShap(m, m.first),
        {"n_samples": 4, "baselines": values(S, *IMAGE)},
        {},
    ),
    "layer deep lift shap": (lambda m: LayerDeepLiftShap(m, m.first), {"baselines": values(S, *IMAGE)}, {}),
    "layer deep lift": (lambda m: LayerDeepLift(m, m.first), {}, {"baselines": values(S, *IMAGE)}),
    "layer gradients": (
        lambda m: LayerIntegratedGradients(m, m.first),
        {"n_steps": 3},
        {"baselines": values(S, *IMAGE)},
    ),
    "conductance": (lambda m: LayerConductance(m, m.first), {"n_steps": 3}, {"baselines": values(S, *IMAGE)}),
    "influence": (lambda m: InternalInfluence(m, m.first), {"n_steps": 3}, {"baselines": values(S, *IMAGE)}),
    "layer ablation, mask of a layer": (
        lambda m: LayerFeatureAblation(m, m.first),
        {"layer_mask": features(*IMAGE), "layer_baselines": values(3, 1, 1)},
        {},
    ),
    "layer ablation, masks": (
        lambda m: LayerFeatureAblation(m, m.first),
        {},
        {"layer_mask": features(S, *IMAGE), "layer_baselines": values(S, 1, 1, 1)},
    ),
    "layer ablation of a flat layer": (
        lambda m: LayerFeatureAblation(m, m.head),
        {},
        {"layer_mask": features(S, 4), "layer_baselines": values(S, 4)},
    ),
    "layer ablation of a layer's input": (
        lambda m: LayerFeatureAblation(m, m.act),
        {"attribute_to_layer_input": True, "layer_mask": features(3, 1, 1)},
        {"layer_baselines": values(S, *IMAGE)},
    ),
}


@pytest.mark.parametrize("name", ON_IMAGES)
def test_arguments_of_images(name, images):
    make, shared, of_samples = ON_IMAGES[name]
    model = Net(*IMAGE).eval()
    assert_as_by_hand(make(model), model, images, shared, of_samples)


ON_ROWS = {
    "ablation, mask of a row": (FeatureAblation, {"feature_mask": torch.tensor([0, 0, 1])}, {}),
    "ablation, masks": (FeatureAblation, {}, {"feature_mask": torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 0]])}),
    "ablation, baseline row": (FeatureAblation, {"baselines": values(3)}, {}),
    "lime": (Lime, {"n_samples": 20, "feature_mask": torch.tensor([0, 0, 1])}, {}),
    "kernel shap": (KernelShap, {"n_samples": 20}, {"feature_mask": torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 0]])}),
}


@pytest.mark.parametrize("name", ON_ROWS)
def test_arguments_of_rows(name, rows):
    make, shared, of_samples = ON_ROWS[name]
    if make is Lime:
        pytest.importorskip("sklearn")
    model = Net(3).eval()
    assert_as_by_hand(make(model), model, rows, shared, of_samples)


NEURONS = {
    "conductance": (NeuronConductance, {"n_steps": 2, "target": 1}, {"baselines": values(S, *IMAGE)}),
    "deep lift": (NeuronDeepLift, {}, {"baselines": values(S, *IMAGE)}),
    "deep lift shap": (NeuronDeepLiftShap, {"baselines": values(S, *IMAGE)}, {}),
    "gradient shap": (NeuronGradientShap, {"n_samples": 4, "baselines": values(S, *IMAGE)}, {}),
    "gradients": (NeuronIntegratedGradients, {"n_steps": 2}, {"baselines": values(S, *IMAGE)}),
    "ablation, mask": (NeuronFeatureAblation, {"feature_mask": features(*IMAGE)}, {}),
    "ablation, masks": (NeuronFeatureAblation, {}, {"feature_mask": features(S, *IMAGE)}),
}


@pytest.mark.parametrize("name", NEURONS)
def test_arguments_of_neurons(name, images):
    kind, shared, of_samples = NEURONS[name]
    model = Net(*IMAGE).eval()
    method = kind(model, model.first)
    shared = {"neuron_selector": (1, 2, 3), **shared}
    seeded()
    found = Spade(method, calibration, **SETTINGS).attribute(images, **shared, **of_samples)
    seeded()
    for index in range(S):
        sample = images[index : index + 1]
        own = {name: value[index : index + 1] for name, value in of_samples.items()}
        with trace(model, calibration(sample, str(index)), **SETTINGS).applied(model):
            assert torch.equal(found[index : index + 1], method.attribute(sample, **shared, **own))


@pytest.mark.parametrize("target", [[(1,), (0,), (2,)], torch.tensor([1, 0, 2]), (2,), 2, torch.tensor(2), None])
def test_targets(target, images):
    model = Net(*IMAGE).eval()
    if target is None:
        model = nn.Sequential(model, nn.Linear(4, 1))
    found = Spade(Saliency(model), calibration, **SETTINGS).attribute(images, target=target)
    for index in range(S):
        own = (
            target[index : index + 1]
            if isinstance(target, list) or (torch.is_tensor(target) and target.dim())
            else target
        )
        sample = images[index : index + 1]
        with trace(model, calibration(sample, str(index)), **SETTINGS).applied(model):
            assert torch.equal(found[index : index + 1], Saliency(model).attribute(sample, target=own))


def test_arguments_in_tuples(images):
    model = Net(*IMAGE).eval()
    spade = Spade(FeatureAblation(model), calibration, **SETTINGS)
    masks, baseline = features(S, *IMAGE), values(3, 1, 1)
    (found,) = spade.attribute((images,), target=1, feature_mask=(masks,), baselines=(baseline,))
    assert torch.equal(found, spade.attribute(images, target=1, feature_mask=masks, baselines=baseline))


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (IntegratedGradients, {"baselines": values(2, *IMAGE)}),
        (FeatureAblation, {"feature_mask": features(4, *IMAGE)}),
        (lambda m: LayerFeatureAblation(m, m.head), {"layer_mask": features(2, 4)}),
        (lambda m: LayerFeatureAblation(m, m.head), {"layer_baselines": values(5, 4)}),
    ],
)
def test_entries_for_other_numbers_of_samples_are_refused(make, arguments, images):
    model = Net(*IMAGE).eval()
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"^{name} of \d dimensions must have one entry .* each of 3, got \["):
        Spade(make(model), calibration, **SETTINGS).attribute(images, target=0, **arguments)


@pytest.mark.parametrize("target", [[0, 1], torch.tensor([0, 1]), [], [class_score(0)] * 4])
def test_other_numbers_of_targets_are_refused(target, images):
    model = Net(*IMAGE).eval()
    for source in (calibration, [images]):
        spade = Spade(Saliency(model), source, **SETTINGS)
        with pytest.raises(ValueError, match=r"target must be one class for all samples or one for each of the 3"):
            spade.attribute(images, target=target)
        if len(target) > 1:
            with pytest.raises(ValueError, match=r"target must be one class for the sample, got [24]"):
                spade.attribute(images[:1], target=target)


def test_unknown_arguments_of_wrapped_methods_are_refused_before_tracing(images):
    model = Net(*IMAGE).eval()

    def never(sample: Tensor, sample_id: str) -> Tensor:
        raise AssertionError("traced")

    for method in (Saliency(model), NoiseTunnel(Saliency(model))):
        with pytest.raises(TypeError, match=r"Saliency\.attribute: .*'n_steps'"):
            Spade(method, never, **SETTINGS).attribute(images, target=0, n_steps=3)


@pytest.mark.parametrize("make", [KernelShap, lambda m: Lime(m, Ridge())])
def test_lime_coefficients_have_a_row_per_sample(make, rows):
    model = Net(3).eval()
    method = make(model)
    arguments = {"target": 0, "n_samples": 20, "return_input_shape": False}
    found = Spade(method, calibration, **SETTINGS).attribute(rows, **arguments)
    assert found.shape == method.attribute(rows, **arguments).shape == (S, 3)


def test_lime_coefficients_of_masks_with_different_features(rows):
    method = Lime(Net(3).eval(), Ridge())
    mask = torch.tensor([[0, 0, 1], [0, 1, 2], [0, 0, 0]])
    arguments = {"target": 0, "n_samples": 20, "return_input_shape": False, "feature_mask": mask}
    found = Spade(method, calibration, **SETTINGS).attribute(rows, **arguments)
    assert found.shape == method.attribute(rows, **arguments).shape == (S, 3)
    assert (found != 0).sum(1).tolist() == [2, 3, 1]


@pytest.mark.parametrize("wrap", [lambda method: method, NoiseTunnel])
def test_methods_that_compare_samples_need_one_trace_for_all(wrap, images):
    model = Net(*IMAGE).eval()
    for method in (FeaturePermutation(model), LayerFeaturePermutation(model, model.first)):
        with pytest.raises(ValueError, match=rf"{type(method).__name__} compares samples, but .* calibration batches"):
            Spade(wrap(method), calibration, **SETTINGS)
    found = Spade(FeaturePermutation(model), images, **SETTINGS).attribute(
        images, target=0, feature_mask=features(1, *IMAGE)
    )
    assert found.shape == images.shape


def test_data_loader_attribution_is_on_one_trace(rows):
    model = Net(3).eval()
    method = DataLoaderAttribution(FeatureAblation(lambda x: model(x)[:, :1].sum(0)))
    loader = DataLoader(TensorDataset(rows), batch_size=2)
    (found,) = Spade(method, rows, model=model, **SETTINGS).attribute(loader)
    with trace(model, rows, **SETTINGS).applied(model):
        assert torch.equal(found, method.attribute(loader)[0])
    with pytest.raises(ValueError, match="DataLoaderAttribution compares samples"):
        Spade(method, calibration, model=model, **SETTINGS)


def test_a_data_loader_is_calibration_data(rows):
    model = Net(3).eval()
    loader = DataLoader(TensorDataset(rows), batch_size=2)
    found = Spade(Saliency(model), loader, **SETTINGS).attribute(rows, target=0)
    assert torch.equal(found, Spade(Saliency(model), rows, **SETTINGS).attribute(rows, target=0))
    labelled = DataLoader(TensorDataset(rows, torch.arange(S), torch.arange(S)), batch_size=2)
    with pytest.raises(TypeError, match=r"batch 0 has 3 values, .* called with 1 input: .*leave out labels"):
        Spade(Saliency(model), labelled, **SETTINGS).attribute(rows, target=0)


class OfNumbers(nn.Module):
    """Takes one number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None])


@pytest.mark.parametrize(
    ("kind", "of_samples"), [(Saliency, {}), (FeatureAblation, {"baselines": values(S)}), (IntegratedGradients, {})]
)
def test_inputs_of_one_dimension(kind, of_samples):
    model = OfNumbers().eval()
    assert_as_by_hand(kind(model), model, values(S), {}, of_samples)
    with pytest.raises(ValueError, match=r"\[samples, \.\.\.\]"):
        Spade(kind(model), calibration, **SETTINGS).attribute(torch.tensor(1.0), target=0)


@pytest.mark.parametrize("model", [nn.Flatten(), nn.LayerNorm([3]), nn.ConvTranspose1d(3, 4, 1)])
def test_networks_without_layers_to_prune_at_sparsity_zero(model, rows):
    inputs = rows[:, :, None] if isinstance(model, nn.ConvTranspose1d) else rows
    target = (0, 0) if isinstance(model, nn.ConvTranspose1d) else 0
    found = Spade(Saliency(model), calibration, sparsity=0).attribute(inputs, target=target)
    assert torch.equal(found, Saliency(model).attribute(inputs, target=target))


@pytest.mark.parametrize("kind", [LRP, lambda m: LayerLRP(m, m.first)])
def test_custom_rules_hold_for_every_sample_and_afterwards(kind, images):
    model = Net(*IMAGE).eval()
    rule = model.first.rule = GammaRule(gamma=0.5)
    method = kind(model)
    before = [set(vars(module)) for module in model.modules()]
    found = Spade(method, calibration, **SETTINGS).attribute(images, target=0)
    assert model.first.rule is rule and [set(vars(module)) for module in model.modules()] == before
    for index in range(S):
        alone, sample = copy.deepcopy(model), images[index : index + 1]
        with trace(alone, calibration(sample, str(index)), **SETTINGS).applied(alone):
            expected = kind(alone).attribute(sample, target=0)
        assert torch.equal(found[index : index + 1], expected)
    with pytest.raises(ValueError, match="target must be a class from 0 to 3, got 99"):
        Spade(method, calibration, **SETTINGS).attribute(images, target=99)
    assert model.first.rule is rule
