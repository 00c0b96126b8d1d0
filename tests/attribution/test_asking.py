"""Captum's methods in `Spade` on target functions: equal to classes where both say the same, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

attr = pytest.importorskip("captum.attr", reason="needs captum")

from spade_fast._util.errors import UserError  # noqa: E402
from spade_fast.attribution import LRP, GradCam, LayerCam, Spade, prepare_for_attribution  # noqa: E402
from spade_fast.attribution.lime import Ridge, nearness  # noqa: E402
from spade_fast.attribution.methods import seeded  # noqa: E402
from spade_fast.targets import Target, class_against, class_score, log_probability, neuron  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor"),
    pytest.mark.filterwarnings("ignore:Setting (backward|forward)"),
]
SETTINGS = {"sparsity": 0.3, "solver": "sparsegpt"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).double().eval()


IMAGES = torch.rand(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BATCH = IMAGES.repeat(6, 1, 1, 1) + 0.1 * torch.rand(12, 2, 6, 6, dtype=torch.float64)
ZEROS = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
SQUARES = torch.arange(4).repeat_interleave(9).reshape(1, 1, 6, 6)
# A neuron of the first layer that is active in both images.
ACTIVE = tuple(int(one) for one in (network()[0](IMAGES).amin(0) == network()[0](IMAGES).amin(0).max()).nonzero()[0])
# Each method on a network (and a layer of it), and its arguments.
METHODS = {
    "Saliency": (lambda net, _: attr.Saliency(net), {}),
    "InputXGradient": (lambda net, _: attr.InputXGradient(net), {}),
    "IntegratedGradients": (lambda net, _: attr.IntegratedGradients(net), {"n_steps": 4}),
    "IntegratedGradients, in parts": (
        lambda net, _: attr.IntegratedGradients(net),
        {"n_steps": 4, "internal_batch_size": 3, "return_convergence_delta": True},
    ),
    "GradientShap": (lambda net, _: attr.GradientShap(net), {"baselines": ZEROS, "n_samples": 3}),
    "NoiseTunnel": (lambda net, _: attr.NoiseTunnel(attr.Saliency(net)), {"nt_samples": 3, "stdevs": 0.1}),
    "FeatureAblation": (lambda net, _: attr.FeatureAblation(net), {"feature_mask": SQUARES}),
    "Occlusion": (
        lambda net, _: attr.Occlusion(net),
        {"sliding_window_shapes": (2, 3, 3), "strides": (2, 3, 3), "perturbations_per_eval": 2},
    ),
    "ShapleyValueSampling": (
        lambda net, _: attr.ShapleyValueSampling(net),
        {"feature_mask": SQUARES, "n_samples": 2},
    ),
    "Lime": (
        lambda net, _: attr.Lime(net, Ridge(), nearness),
        {"feature_mask": SQUARES, "n_samples": 8},
    ),
    "KernelShap": (lambda net, _: attr.KernelShap(net), {"feature_mask": SQUARES, "n_samples": 8}),
    "LRP": (lambda net, _: LRP(net), {}),
    "GradCam": (GradCam, {}),
    "LayerCam": (LayerCam, {}),
    "LayerGradCam": (attr.LayerGradCam, {}),
    "LayerIntegratedGradients": (attr.LayerIntegratedGradients, {"n_steps": 4}),
    "LayerConductance": (attr.LayerConductance, {"n_steps": 4}),
    "LayerFeatureAblation": (attr.LayerFeatureAblation, {"layer_mask": torch.zeros(1, 1, 1, 1).long()}),
    "NeuronConductance": (attr.NeuronConductance, {"neuron_selector": ACTIVE, "n_steps": 4}),
}
# Those that need the network itself, not a function around it.
OF_MODULES = {
    "DeepLift": (lambda net, _: attr.DeepLift(net), {"baselines": ZEROS, "return_convergence_delta": True}),
    "DeepLiftShap": (lambda net, _: attr.DeepLiftShap(net), {"baselines": torch.cat([ZEROS, ZEROS + 1])}),
    "LayerDeepLift": (attr.LayerDeepLift, {"baselines": ZEROS}),
    "GuidedBackprop": (lambda net, _: attr.GuidedBackprop(net), {}),
    "Deconvolution": (lambda net, _: attr.Deconvolution(net), {}),
    "GuidedGradCam": (attr.GuidedGradCam, {}),
}


def leaves(found: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(found)


def attributions(name: str, target: object, *, around: bool = False) -> list[Tensor]:
    """Run a method on a trace of both images, on the network or a function around it."""
    net = network()
    make, arguments = {**METHODS, **OF_MODULES}[name]
    if name in ("DeepLift", "DeepLiftShap", "LayerDeepLift", "GuidedBackprop", "Deconvolution", "GuidedGradCam"):
        net = prepare_for_attribution(net)
    method = make((lambda x: net(x)) if around else net, net[0])
    forward = method.forward_func
    spade = Spade(method, [BATCH], model=net, **SETTINGS)
    with seeded(IMAGES.device):
        found = leaves(spade.attribute(IMAGES, target=target, **arguments))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert method.forward_func is forward
    return found


@pytest.mark.parametrize("name", [*METHODS, *OF_MODULES])
def test_a_function_equals_the_class_that_it_reads(name):
    for found, expected in zip(attributions(name, class_score(3)), attributions(name, 3), strict=True):
        torch.testing.assert_close(found, expected)
        assert bool(expected.any()) or "delta" in str(METHODS.get(name, OF_MODULES.get(name)))


@pytest.mark.parametrize("name", METHODS)
def test_methods_built_on_a_function_around_the_network(name):
    for found, expected in zip(attributions(name, class_score(3), around=True), attributions(name, 3), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["InputXGradient", "IntegratedGradients", "LRP", "DeepLift", "LayerConductance"])
def test_a_class_against_another_is_the_difference(name):
    (found, *_), (one, *_), (other, *_) = (attributions(name, target) for target in (class_against(3, 1), 3, 1))
    torch.testing.assert_close(found, one - other)


def test_neurons_and_probabilities():
    net = network()
    spade = Spade(attr.Saliency(net), [BATCH], **SETTINGS)
    for target, layer, read in (
        (neuron("0", (1, 2, 2)), net[:1], lambda output: output[:, 1, 2, 2]),
        (log_probability(2), net, lambda output: output.log_softmax(1)[:, 2]),
    ):
        found = spade.attribute(IMAGES, target=target, abs=False)
        with spade.traces[0].applied(net):
            images = IMAGES.clone().requires_grad_()
            (expected,) = torch.autograd.grad(read(layer(images)).sum(), images)
        torch.testing.assert_close(found, expected)
    around = Spade(attr.Saliency(lambda x: net(x)), [BATCH], model=net, **SETTINGS)
    torch.testing.assert_close(
        around.attribute(IMAGES, target=neuron("0", 1)), spade.attribute(IMAGES, target=neuron("0", 1))
    )


def test_the_own_methods_take_functions_outside_of_spade():
    net = network()
    for method in (LRP(net), GradCam(net, net[0]), LayerCam(net, net[0]), LRP(lambda x: net(x))):
        if isinstance(method.forward_func, nn.Module):
            expected = [method.attribute(IMAGES, target=one) for one in (3, 1)]
            torch.testing.assert_close(method.attribute(IMAGES, target=class_score(3)), expected[0])
            if isinstance(method, LRP | GradCam):  # linear in the target
                difference = method.attribute(IMAGES, target=class_against(3, 1))
                torch.testing.assert_close(difference, expected[0] - expected[1], atol=1e-5, rtol=1e-4)
        else:
            with pytest.raises(TypeError, match="LRP was built on a function"):
                method.attribute(IMAGES, target=class_score(3))
        assert not any(part._forward_hooks for part in net.modules())


def test_a_target_for_each_sample_and_what_automatic_sparsity_keeps():
    def calibration(sample: Tensor, name: str) -> Tensor:
        return sample + 0.05 * torch.rand(16, *sample.shape[1:], dtype=sample.dtype)

    net = network()
    net.config = type("Config", (), {"id2label": dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))})()
    spade = Spade(attr.Saliency(net), calibration, solver="sparsegpt")
    torch.manual_seed(3)
    found = spade.attribute(IMAGES, target=[class_against(1, 2), "cat"])
    assert [made.target for made in spade.traces] == ["class 1 against class 2", "class 2"]
    with torch.no_grad():
        logits = net(IMAGES)
    assert spade.traces[0].auto.dense == pytest.approx(float((logits[0, 1] - logits[0, 2]).sigmoid()), rel=1e-5)
    assert spade.traces[1].auto.dense == pytest.approx(float(logits[1].softmax(0)[2]), rel=1e-5)
    torch.manual_seed(3)
    assert torch.equal(found, spade.attribute(IMAGES, target=[class_against(1, 2), class_score(2)]))
    both = Spade(attr.Saliency(net), [BATCH], solver="sparsegpt")
    both.attribute(IMAGES, target=[1, 2])
    assert both.traces[0].target == "class 1, class 2"
    with pytest.raises(ValueError, match="a target function for each sample needs an augmenter"):
        both.attribute(IMAGES, target=[class_score(1), class_score(2)])
    with pytest.raises(ValueError, match="no class 'cow'"):
        both.attribute(IMAGES, target="cow")


@pytest.mark.parametrize("target", [3, class_score(3), [3, 3]])
def test_outputs_that_are_not_tensors(target):
    class Wrapped(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": x.sum(), "logits": self.net(x)}

    net = network()
    found = Spade(attr.Saliency(Wrapped(net)), [BATCH], **SETTINGS).attribute(IMAGES, target=target)
    assert torch.equal(found, Spade(attr.Saliency(net), [BATCH], **SETTINGS).attribute(IMAGES, target=3))


def test_neurons_of_a_prepared_copy_and_of_a_network_inside_another():
    net = network()
    prepared, around = prepare_for_attribution(net), nn.Sequential(net, nn.Softmax(1))
    expected = Spade(attr.InputXGradient(net), [BATCH], **SETTINGS).attribute(IMAGES, target=neuron("0", 2))
    for built in (prepared, around):
        method = attr.InputXGradient(built)
        found = Spade(method, [BATCH], model=net, **SETTINGS).attribute(IMAGES, target=neuron("0", 2))
        assert torch.equal(found, expected)
        automatic = Spade(method, [BATCH], model=net, solver="sparsegpt")
        automatic.attribute(IMAGES, target=neuron("1", 2))
        assert automatic.traces[0].target == "neuron 2 of layer '1'"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


@pytest.mark.parametrize("kind", [attr.Saliency, attr.IntegratedGradients, attr.DeepLift, LRP])
@pytest.mark.parametrize("target", [1, class_score(1)])
def test_integers_have_no_gradient(kind, target):
    ids = torch.tensor([[1, 2, 3]])
    spade = Spade(kind(Words().eval()), [ids.repeat(6, 1)], **{**SETTINGS, "layers": "head"})
    with pytest.raises((TypeError, ValueError), match="embedded tokens") as caught:
        spade.attribute(ids, target=target)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("kind", [attr.Saliency, attr.DeepLift])
def test_errors_leave_inputs_without_gradients(kind):
    spade, image = Spade(kind(network()), [BATCH], **SETTINGS), IMAGES[:1].clone()
    with pytest.raises(ValueError, match="has no gradient"):
        spade.attribute(image, target=lambda output: output[:, 0].detach())
    assert not image.requires_grad
    leaf = image.clone().requires_grad_()
    spade.attribute(leaf, target=1)
    assert leaf.requires_grad and leaf.grad is None


def test_integers_of_numpy():
    net = network()
    spade = Spade(attr.Saliency(net), [BATCH], **SETTINGS)
    expected = spade.attribute(IMAGES, target=[1, 3])
    for target in (np.array([1, 3]), list(np.array([1, 3])), torch.tensor([1, 3], dtype=torch.uint8)):
        assert torch.equal(spade.attribute(IMAGES, target=target), expected)
    assert torch.equal(spade.attribute(IMAGES, target=np.int64(1))[0], expected[0])


def test_classes_of_outputs_without_logits():
    net = network()
    spade = Spade(attr.Saliency(lambda x: {"scores": net(x)}), [BATCH], model=net, **SETTINGS)
    for target in (1, [1, 2]):
        with pytest.raises(TypeError, match="the network returns dict with the entries scores: give a func"):
            spade.attribute(IMAGES, target=target)


def test_bad_targets():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    spade = Spade(attr.Saliency(net), [BATCH], **SETTINGS)

    def refuse(error: type[Exception], message: str, target: object, method: Spade = spade) -> None:
        with pytest.raises(error, match=message):
            method.attribute(IMAGES, target=target)
        assert not any(part._forward_hooks for part in net.modules())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    refuse(ValueError, r"one number per sample, \[S\], got \[2, 5\] for 2 samples", lambda output: output)
    refuse(ValueError, r"one number per sample, \[S\], got \[5\] for 2 samples", lambda output: output[0])
    refuse(ValueError, "must be finite, got inf in row 0", lambda output: output[:, 0] / 0)
    refuse(ValueError, "has no gradient: it detaches the output", lambda output: output[:, 0].detach())
    refuse(TypeError, "must return floating-point numbers", lambda output: output.argmax(1))
    refuse(TypeError, r"must return a tensor \[S\]", lambda output: output.tolist())
    refuse(ValueError, "the model has no layer '9'", neuron("9", 0))
    for target in (7, class_score(7), [7, 1], torch.tensor([1, -6])):
        refuse(ValueError, "target must be a class from 0 to 4, got (7|-6)", target)
    refuse(ValueError, r"target must be a class from 0 to 4, got -1", [1, -1])
    refuse(ValueError, r"target \(0, 1\) does not fit the output \[2, 5\]", (0, 1))
    refuse(ValueError, "the network brings no class names", "cat")
    for target in (2.0, True, [1, 2.0], [1, None], (1.0,), {1}, b"1", np.array([0.5, 1.0])[:1], torch.tensor([True])):
        refuse(TypeError, "target must be the index or name of a class, or a function", target)
    refuse(TypeError, r"target must be integers, the indices of classes, got torch\.float32", torch.tensor([1.0, 2.0]))
    refuse(
        ValueError,
        "the network's output has no gradient with respect to the input",
        1,
        Spade(attr.Saliency(lambda x: net(x).detach()), [BATCH], model=net, **SETTINGS),
    )
    later = Spade(GradCam(net, net[2]), [BATCH], **SETTINGS)
    refuse(ValueError, "target neuron 1 of layer '0': the target's layer has no gradient", neuron("0", 1), later)
    layers = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)
    plain = nn.Sequential(*layers).double()
    for method in (attr.LRP(plain), attr.LayerLRP(plain, plain[0])):
        captums = Spade(method, [torch.rand(9, 3).double()], **SETTINGS)
        with pytest.raises(ValueError, match=r"Captum's LRP begins with one output.* spade_fast\.attribution\.LRP"):
            captums.attribute(torch.rand(2, 3).double(), target=class_against(1, 2))
    zero = Target("nothing", lambda output: output[:, 0], keep=lambda output: 0 * output[:, 0])
    refuse(
        ValueError,
        "score is 0 for target nothing, of which no share can be kept",
        zero,
        Spade(attr.Saliency(net), [BATCH], solver="sparsegpt"),
    )
