"""Weights computed from others are pruned as what they are in the forward pass, and left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from spade_fast import Trace, TraceAppliedError, trace, trace_batch
from spade_fast.pruning import computed_weights
from spade_fast.pruning.calibration import calibrate
from spade_fast.pruning.dense_weights import count_weights
from spade_fast.pruning.layers import find_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:.*spectral_norm.*is deprecated")


class Scaled(nn.Module):
    """Stores a weight as a smaller tensor."""

    def forward(self, small: Tensor) -> Tensor:
        return small.repeat(1, 2) * 3

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight[:, : weight.shape[1] // 2]


def scaled(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Scaled(), unsafe=True)


def pruned_twice(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", 0.2)
    return prune.random_unstructured(module, "weight", 0.2)


def two_of_them(module: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(parametrizations.weight_norm(module))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of all": lambda module: parametrizations.weight_norm(module, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two of them": two_of_them,
    "one's own": scaled,
    "weight_norm, by hook": weight_norm,
    "spectral_norm, by hook": spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.25),
    "pruned twice": pruned_twice,
}
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (40, 6)),
    "convolution": (lambda: nn.Conv2d(2, 9, 3, padding=1), (5, 2, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 9, 3, stride=2), (9, 2, 8)),
}
CASES = [("linear", way) for way in WAYS] + [
    (kind, way) for kind in MODULES if kind != "linear" for way in ("weight_norm", "spectral_norm, by hook")
]


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    assert not computed_weights._held


@pytest.fixture(params=CASES, ids=", ".join)
def case(request) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A network with a computed weight, the same network with that weight as a parameter, and data."""
    torch.manual_seed(0)
    kind, way = request.param
    make, shape = MODULES[kind]
    plain, x = make(), torch.randn(shape)
    module = WAYS[way](copy.deepcopy(plain))
    module.eval()(x)  # hooks compute
    plain.weight.data = module.weight.detach().clone()
    plain.bias.data = module.bias.detach().clone()
    return nn.Sequential(module), nn.Sequential(plain).eval(), x


def state(model: nn.Module) -> tuple[object, ...]:
    return (
        [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()],
        [(list(module._forward_pre_hooks.items()), module.training, type(module)) for module in model.modules()],
        [{key: id(value) for key, value in vars(module).items() if key != "training"} for module in model.modules()],
    )


def values(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def test_pruned_as_the_weight_that_is_computed(case, tmp_path):
    model, plain, x = case
    (layer,), dense = find_layers(model)
    (expected_layer,), _ = find_layers(plain)
    assert layer == expected_layer and not dense and count_weights(model) == count_weights(plain) == layer.numel
    gram = calibrate(plain, [x], [expected_layer]).grams["0"]
    assert torch.equal(calibrate(model, [x], [layer]).grams["0"], gram)
    before, contents = state(model), values(model)
    made, expected = trace(model, x, sparsity=0.5), trace(plain, x, sparsity=0.5)
    assert state(model) == before
    made.save(tmp_path / "trace")
    with torch.no_grad():
        output = model(x)
        for one in (made, Trace.load(tmp_path / "trace")):
            assert torch.equal(one.weight("0"), expected.weight("0")) and one.network_sparsity == one.sparsity
            with one.applied(model), expected.applied(plain):
                assert torch.equal(model[0].weight, expected.weight("0")) and torch.equal(model(x), plain(x))
                assert torch.equal(model(x), plain(x)) and not torch.equal(model(x), output)
            assert torch.equal(model(x), output)
    with made.applied(model):
        pass
    assert all(torch.equal(*both) for both in zip(values(model), contents, strict=True))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_left_as_it_was(case):
    """Also in training mode, in which spectral_norm changes its buffers in each forward pass."""
    model, _, x = case
    made = trace(model, x, sparsity=0.5)
    model.train()
    before, contents = state(model), values(model)
    with made.applied(model):
        pass
    trace(model, x, sparsity=0.5)
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), made.applied(model):
            raise error
    assert state(model) == before
    assert all(torch.equal(*both) for both in zip(values(model), contents, strict=True))
    twice = pytest.raises(TraceAppliedError)
    with made.applied(model), twice, made.applied(model):
        raise AssertionError


def test_copies_made_meanwhile_stay_pruned(case):
    model, _, x = case
    made = trace(model, x, sparsity=0.5)
    with torch.no_grad():
        with made.applied(model):
            twin, expected = copy.deepcopy(model), model(x)
        assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
        fresh = copy.deepcopy(model)
        with made.applied(fresh):
            assert torch.equal(fresh(x), expected) and not torch.equal(model(x), expected)


def test_inputs_have_gradients_and_hooks_run(case):
    model, plain, x = case
    made, calls = trace(model, x, sparsity=0.5), []
    model[0].register_forward_pre_hook(lambda module, inputs: calls.append(module.weight.detach().clone()))
    x.requires_grad_()
    with made.applied(model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        assert torch.equal(calls.pop(), made.weight("0"))
    with trace(plain, x.detach(), sparsity=0.5).applied(plain):
        assert torch.equal(gradient, torch.autograd.grad(plain(x).square().sum(), x)[0])
    model(x)
    assert torch.equal(calls.pop(), plain[0].weight)


def test_cached_parametrizations():
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 10))), torch.randn(40, 6)
    made = trace(model, x, sparsity=0.5)
    with parametrize.cached():
        dense = model(x)
        with made.applied(model):
            assert torch.equal(model[0].weight, made.weight("0"))
        assert torch.equal(model(x), dense)


@pytest.mark.parametrize("way", ["weight_norm", "weight_norm, by hook"])
def test_compiled_networks(way):
    model, x = nn.Sequential(WAYS[way](nn.Linear(6, 10))).eval(), torch.randn(40, 6)
    made, compiled = trace(model, x, sparsity=0.5), torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = compiled(x)
        with made.applied(model):
            assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), dense)
        assert torch.equal(compiled(x), dense)


def test_calibrations_that_overlap():
    """Data that are made while the network is pruned may prune it, too."""
    model, x = nn.Sequential(weight_norm(nn.Linear(6, 10)), nn.Linear(10, 2)), torch.randn(40, 6)
    inner: list[Trace] = []

    def batches() -> Iterator[Tensor]:
        inner.append(trace(model, x, sparsity=0.5))
        yield x

    first, second = trace_batch(model, [batches(), x], sparsity=0.5)
    for name in first.layers:
        assert all(torch.equal(first.weight(name), one.weight(name)) for one in (inner[0], second))


def test_projections_of_attention():
    attention = parametrizations.weight_norm(nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight")
    x = torch.randn(3, 5, 8)
    made = trace(attention, [{"query": x, "key": x, "value": x}], sparsity=0.5, strict=True)
    assert set(made.layers) == {"in_proj_weight", "out_proj"}
    with made.applied(attention):
        assert torch.equal(attention.in_proj_weight, made.weight("in_proj_weight"))


def test_layers_of_a_parametrization_are_none_of_the_network():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, weight: Tensor) -> Tensor:
            return self.inner(weight) @ self.w

    model, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(20, 4)
    parametrize.register_parametrization(model[0], "weight", Network())
    assert trace(model, x, sparsity=0.5, strict=True).layers == ("0",)


def test_what_cannot_be_pruned_says_so():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 10)))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[3] = 0
    with pytest.raises(ValueError, match="layer '0', computed from other parameters, has NaN"):
        trace(model, torch.randn(9, 6), sparsity=0.5)


def test_equal_layers_are_all_found():
    model = nn.Sequential(*[weight_norm(nn.Linear(4, 4)) for _ in range(6)])
    assert [layer.name for layer in find_layers(model)[0]] == [str(index) for index in range(6)]
