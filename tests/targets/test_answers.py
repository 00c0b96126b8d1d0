"""`answering` with Captum's methods on their own, and the hooks that it leaves: none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spade_fast.pruning.goals import output_score
from spade_fast.targets import answering, box, class_against, class_score, neuron, similarity, token


class Net(nn.Module):
    """Classifies vectors of six numbers; reuses one of its modules, and has one that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last, self.unused = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.act(self.first(x))))


@pytest.fixture
def model() -> nn.Module:
    return Net().double().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.rand(3, 6, dtype=torch.float64)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_returns_the_numbers_and_is_left_as_it_was(model, inputs):
    plain, layer = model(inputs), model.first(inputs)
    for target, expected in (
        (2, plain[:, 2]),
        (class_against(2, 0), plain[:, 2] - plain[:, 0]),
        (lambda output: output.sum(1), plain.sum(1)),
        (neuron("first", 3), layer[:, 3]),
        (similarity([1.0, 0.0, 0.0, 0.0]), plain[:, 0] / plain.norm(dim=1)),
    ):
        with answering(model, target) as same:
            assert same is model
            torch.testing.assert_close(model(inputs), expected)
            torch.testing.assert_close(model(inputs), expected)
        assert hooks(model) == 0
    assert torch.equal(model(inputs), plain)


def test_class_names_of_the_model(model, inputs):
    model.config = type("Config", (), {"id2label": {0: "ant", 1: "bee", 2: "cat", 3: "dog"}})()
    plain = model(inputs)
    with answering(model, "cat"):
        assert torch.equal(model(inputs), plain[:, 2])
    with pytest.raises(ValueError, match="no class 'cow'"), answering(model, "cow"):
        pass


def refuse(error: type[Exception], message: str, model: nn.Module, target: object, run: Callable[..., object]) -> None:
    with pytest.raises(error, match=message), answering(model, target):
        run()
    assert hooks(model) == 0


def test_layers_that_do_not_exist_or_do_not_run_once(model, inputs):
    refuse(ValueError, "the model has no layer 'frist': did you mean 'first'", model, neuron("frist", 0), object)
    for layer, problem in (("unused", "does not run"), ("act", "runs 2 times")):
        message = rf"neuron 0 of layer '{layer}': the layer must run once in .* forward pass, but {problem}"
        refuse(ValueError, message, model, neuron(layer, 0), lambda: model(inputs))


def test_layers_of_compiled_networks(model, inputs):
    compiled, expected = torch.compile(model, backend="eager"), model.first(inputs)[:, 3]
    compiled(inputs)
    for name in ("first", "_orig_mod.first"):
        with answering(compiled, neuron(name, 3)):
            torch.testing.assert_close(compiled(inputs), expected)


def test_samples_are_counted(model, inputs):
    for target, shape in ((lambda output: output, r"\[3, 4\]"), (lambda output: output[0], r"\[4\]")):
        message = rf"one number per sample, \[S\], got {shape} for 3 samples"
        refuse(ValueError, message, model, target, lambda: model(inputs))
    message = r"must return floating-point numbers.*the index of a class"
    refuse(TypeError, message, model, lambda output: output.argmax(1), lambda: model(inputs))


def test_missing_gradients(model, inputs):
    saliency = pytest.importorskip("captum.attr", reason="needs captum").Saliency

    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    detached, message = Detached().double(), r"target .*lambda> has no gradient: it detaches the output"
    refuse(ValueError, message, model, lambda output: output[:, 1].detach(), lambda: saliency(model).attribute(inputs))
    message = "target class 1: the network's output has no gradient with respect to the input"
    refuse(ValueError, message, detached, 1, lambda: saliency(detached).attribute(inputs))
    refuse(IndexError, "pop from empty list", model, 1, lambda: [].pop())


def test_detections():
    """Of a list of images, none of which is a batch."""

    class Detector(nn.Module):
        def forward(self, images):
            return [{"scores": torch.stack([one.mean(), one.min()])} for one in images]

    images = [torch.rand(3, 4, 5), torch.rand(3, 6, 5)]
    with answering(detector := Detector(), box(1)):
        assert torch.equal(detector(images), torch.stack([one.min() for one in images]))


def test_a_detector_of_torchvision():
    detection = pytest.importorskip("torchvision.models.detection", reason="needs torchvision")
    small = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64, "box_score_thresh": 0.0}
    detector, image = detection.fasterrcnn_mobilenet_v3_large_320_fpn(**small).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = detector(image)[0]["scores"][2]
    with answering(detector, box(2)):
        found = detector(image.requires_grad_())
    torch.testing.assert_close(found, expected[None])
    assert bool(torch.autograd.grad(found.sum(), image)[0].any())
    assert output_score(detector, image, box(2))(image) == pytest.approx(float(expected))


def test_a_language_model():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    gpt = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(32, (2, 5))
    last = gpt(ids).logits[:, -1]
    expected, shares = last[:, 7], last.softmax(1)[:, 7]
    with answering(gpt, token(-1, 7)):
        torch.testing.assert_close(gpt(input_ids=ids), expected)
    inputs = {"input_ids": ids[:1]}
    assert output_score(gpt, inputs, token(-1, 7))(inputs) == pytest.approx(float(shares[0]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Input Tensor")
@pytest.mark.filterwarnings("ignore:Setting forward")
def test_captum_alone(inputs):
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    for make in (attr.Saliency, attr.IntegratedGradients, attr.DeepLift, attr.FeatureAblation):
        with answering(model, class_score(2)):
            found = make(model).attribute(inputs)
        torch.testing.assert_close(found, make(model).attribute(inputs, target=2))
