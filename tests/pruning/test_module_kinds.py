"""Compiled networks are pruned as the ones they were made from; other kinds are refused in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from spade_fast import trace, tune

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*quantize")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.fixture
def data() -> Tensor:
    return torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


class Counting:
    """A compiler that counts the functions it is given."""

    def __init__(self) -> None:
        self.functions = 0

    def __call__(self, graph, example_inputs):
        self.functions += 1
        return graph.forward


def compiled_whole(model: Net, backend) -> nn.Module:
    return torch.compile(model, backend=backend)


def compiled_part(model: Net, backend) -> nn.Module:
    model = copy.copy(model)
    model._modules = {**model._modules, "body": torch.compile(model.body, backend=backend)}
    return model


def compiled_in_place(model: Net, backend) -> nn.Module:
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("compile_model", [compiled_whole, compiled_part, compiled_in_place])
def test_compiled_networks(compile_model, warm, data):
    torch._dynamo.reset()
    plain = Net()
    reference = trace(plain, data, sparsity=0.5)
    backend = Counting()
    model = compile_model(plain, backend)
    if warm:
        with torch.no_grad():
            model.eval()(data)
    count = backend.functions
    made = trace(model, data, sparsity=0.5, strict=True)
    assert backend.functions == count  # neither the network nor the collector was compiled
    assert made.layers == reference.layers == ("body.0", "head")
    for name in made.layers:
        assert torch.equal(made.weight(name), reference.weight(name))
    with reference.applied(plain), torch.no_grad():
        expected = plain(data)
    for one in (made, reference):
        with one.applied(model), torch.no_grad():
            assert torch.equal(plain.head.weight, made.weight("head"))
            assert torch.allclose(model(data), expected)
    with made.applied(plain):
        assert torch.equal(plain.head.weight, made.weight("head"))
    assert trace(model, data, sparsity=0.5, layers="body.*").layers == ("body.0",)


def test_torchscript_and_exported_programs_are_refused(data):
    for model in (torch.jit.script(Net()), torch.jit.trace(Net(), data)):
        with pytest.raises(TypeError, match=r"TorchScript .*pass the torch\.nn\.Module that was scripted or traced"):
            trace(model, data, sparsity=0.5)
    exported = torch.export.export(Net(), (data,))
    for model in (exported, exported.module()):
        with pytest.raises(TypeError, match=r"exported program .*pass the torch\.nn\.Module that was exported"):
            trace(model, data, sparsity=0.5)


@pytest.mark.parametrize("base", [object, nn.Module])
@pytest.mark.parametrize("package", ["keras.src.models.sequential", "tf_keras.models"])
def test_networks_of_other_frameworks_are_refused(base, package, data):
    sequential = type("Sequential", (base,), {"__module__": package, "name": "digits"})
    own = type("Digits", (sequential,), {"__module__": "__main__"})
    for kind in (sequential, own):
        with pytest.raises(TypeError, match=r"a Keras model \(.*\): pass the same network as a torch\.nn\.Module"):
            trace(kind(), data, sparsity=0.5)


def test_functions_are_refused(data):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        trace(lambda x: x, data, sparsity=0.5)


def test_parameters_made_in_inference_mode_are_refused(data):
    with torch.inference_mode():
        model = Net()
    with pytest.raises(ValueError, match=r"'body\.0\.weight' was made under torch\.inference_mode\(\).*deepcopy"):
        trace(model, data, sparsity=0.5)
    copied = copy.deepcopy(model)
    with trace(copied, data, sparsity=0.5).applied(copied):
        assert int((copied.head.weight == 0).sum()) == 12


@pytest.mark.parametrize("convert", [lambda w: TwoTensor(w, w), Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_converted_parameters_are_refused(convert, data):
    model = Net()
    model.head.weight = nn.Parameter(convert(model.head.weight.detach()))
    with pytest.raises(ValueError, match=r"'head\.weight' is stored as .*before its weights were converted"):
        trace(model, data, sparsity=0.5)


def test_compiled_networks_are_tuned(data):
    torch._dynamo.reset()
    model = Net().eval()
    compiled = torch.compile(model, backend=Counting())

    def score(given: nn.Module, sample: int) -> float:
        with torch.no_grad():
            return -float((given(data) ** 2).mean())

    expected = tune(model, [data], score, candidates=[0.5], stages="layers")
    found = tune(compiled, [data], score, candidates=[0.5], stages="layers")
    assert found.sparsity == expected.sparsity and found.before == pytest.approx(expected.before)
