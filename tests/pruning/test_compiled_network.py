"""Calibration with the compiled network against that with the network itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from spade_fast import MemoryLimitError, ops, trace, trace_batch
from spade_fast.pruning import compiled_network
from spade_fast.pruning.calibration import Calibration, calibrate
from spade_fast.pruning.compiled_network import CompiledNetwork
from spade_fast.pruning.layers import find_layers


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """The exported graphs, which run as they are: compiling takes seconds."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, **_: Any) -> fx.GraphModule:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", keep)
    yield found


def both(
    model: nn.Module, batches: Any, compiled: CompiledNetwork | None = None, precision: str = "float32", **options: Any
) -> tuple[Calibration, Calibration]:
    """Calibrate the network itself, and compiled."""
    layers, dense = find_layers(model)
    options["watched"] = {name: one.parameter for name, one in dense.items() if one.parameter is not None}
    options["precision"] = precision
    compiled = compiled or CompiledNetwork(precision)
    compiled.prepare(model, layers)
    return calibrate(model, batches, layers, **options), calibrate(model, batches, layers, compiled=compiled, **options)


def assert_equal(eager: Calibration, compiled: Calibration, bound: float = 1e-6) -> None:
    for name in ("images", "layers", "unreached", "unsupported", "used"):
        assert getattr(eager, name) == getattr(compiled, name), name
    assert eager.grams.keys() == compiled.grams.keys() and eager.grams
    for name, gram in eager.grams.items():
        assert (compiled.grams[name] - gram).norm() <= bound * gram.norm(), name


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2, padding=2, bias=False),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


class Several(nn.Module):
    """Uses of weights other than a module's own call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = parametrizations.weight_norm(nn.Linear(8, 8))
        self.recurrent = nn.LSTM(8, 4, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(4, 6))
        self.squared = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.twice(torch.tanh(self.twice(self.attention(x, x, x)[0] * scale[:, None, None])))
        x = torch.einsum("nth,hc->ntc", self.recurrent(x)[0], self.matrix)
        return self.squared(x) @ (self.squared.weight**2)


class Heads(nn.Module):
    """Views the result of attention in a way that only its own layout allows."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inputs(x).unflatten(2, (2, 4)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        return self.outputs(attended.transpose(1, 2).reshape(x.shape).view(-1, 8))


def words(*counts: int) -> list[dict[str, Tensor]]:
    """Batches of keyword arguments, in another order than that of the network."""
    return [{"scale": torch.rand(n), "tokens": torch.randint(7, (n, 5))} for n in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions(graphs, dtype):
    model = convolutions().to(dtype)
    assert_equal(*both(model, list(torch.randn(3, 2, 3, 10, 10, dtype=dtype))))
    assert len(graphs) == 1


def test_bfloat16(graphs):
    """The casts are part of the graph."""
    assert_equal(*both(convolutions(), list(torch.randn(3, 2, 3, 10, 10)), precision="bf16"), bound=1e-3)
    (graph,) = graphs
    kernels = [node for node in graph.graph.nodes if node.target is torch.ops.aten.convolution.default]
    assert all(node.meta["val"].dtype == torch.bfloat16 for node in kernels)


@pytest.mark.parametrize("form", [lambda batch: batch, lambda batch: [batch["tokens"], batch["scale"]]])
def test_other_uses_of_weights(graphs, form):
    """Attention, computed weights, recurrent layers, bare parameters; weights that are not pruned are named alike."""
    eager, compiled = both(Several(), [form(batch) for batch in words(3, 3, 3)])
    assert_equal(eager, compiled)
    assert eager.unreached == ["unused"] and list(eager.unsupported) == ["squared"] and eager.used == ["embedding"]
    assert len(eager.grams) == 6


def test_attention_by_function(graphs):
    assert_equal(*both(Heads(), list(torch.randn(2, 3, 5, 8))))


def test_batches_of_another_shape_run_uncompiled(graphs, monkeypatch):
    shapes: list[int] = []
    run = CompiledNetwork.run
    monkeypatch.setattr(
        CompiledNetwork, "run", lambda self, batch, *rest: shapes.append(len(batch["scale"])) or run(self, batch, *rest)
    )
    network, model = CompiledNetwork("float32"), Several()
    assert_equal(*both(model, words(4, 4, 3, 4, 1), network))
    assert shapes == [4, 4]
    assert_equal(*both(model, words(3, 3), network))
    assert_equal(*both(model, words(4, 4), network))
    assert shapes == [4, 4, 4, 4] and len(graphs) == 1


def test_a_change_of_the_network_is_noticed(graphs):
    """The weights are constants of the compiled code."""
    network, model = CompiledNetwork("float32"), convolutions()
    images = torch.randn(2, 2, 3, 10, 10)
    changes: list[Callable[[], object]] = [
        lambda: model[0].weight.data.mul_(2),
        lambda: model[1].running_mean.add_(1),
        lambda: setattr(model[5], "weight", nn.Parameter(model[5].weight.detach() + 1)),
    ]
    for count, change in enumerate(changes, 1):
        assert_equal(*both(model, list(images), network))
        assert len(graphs) == count
        change()
    assert_equal(*both(model, list(images), network))
    network.prepare(model, find_layers(model, "0")[0])
    assert not network.fits(images[0], compiled_network.GramCollector(model, find_layers(model, "0")[0], {}))


def test_gram_matrices_that_overflow_verify_nothing(graphs):
    network, model, batches = CompiledNetwork("float32"), Heads(), list(torch.randn(2, 3, 5, 8))
    with pytest.raises(ValueError, match="overflowing inputs during calibration"):
        layers = find_layers(model)[0]
        network.prepare(model, layers)
        calibrate(model, [batches[0] * 1e30], layers, compiled=network)
    assert not graphs
    assert_equal(*both(model, batches, network))
    assert len(graphs) == 1


@pytest.mark.parametrize("make", [convolutions, Several])
def test_the_network_is_left_as_it_was(graphs, make):
    model = make().train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    both(model, words(2, 2) if make is Several else list(torch.randn(2, 2, 3, 10, 10)))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::spade_fast.FallbackWarning")
def test_several_passes_share_a_graph(graphs):
    model, images = convolutions(), list(torch.randn(2, 2, 3, 10, 10))
    settings: dict[str, Any] = {"sparsity": 0.5, "layers": ["0", "3", "5"]}
    made = [trace(model, images, memory_limit=11000, compile=compiled, **settings) for compiled in (False, True)]
    assert made[1].header["passes"] == 2 and len(graphs) == 1
    assert all(torch.equal(made[0].mask(name), made[1].mask(name)) for name in ("0", "3", "5"))
    parameter = Several()
    with pytest.raises(MemoryLimitError, match="matrix"):
        both(parameter, words(2, 2), memory_limit=10)


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Counting(Choosing):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layer(x * self.seen)


class Random(Choosing):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.rand_like(x))


class Nested(Choosing):
    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        return self.layer(x + more[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.layer[x[:, 0].abs().long() % 3]
        return torch.bmm(chosen, x[:, :, None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Choosing, r"torch.export cannot represent the network as one graph \(.*data-dependent"),
        (Counting, "the network changes its buffer 'seen' as it runs"),
        (Random, r"the Gram matrices of layer 'layer' on the first batch differ .* more than 0.001"),
        (Experts, "the inputs of layer 'layer', whose weight aten.bmm uses, are not one tensor of the exported graph"),
        (Nested, "needs batches of tensors, numbers and strings, but entry '1' is of type list"),
    ],
)
def test_what_cannot_be_compiled_is_named(graphs, monkeypatch, make, message):
    tries, compile_once = [], CompiledNetwork._compile
    monkeypatch.setattr(CompiledNetwork, "_compile", lambda *args: tries.append(args) or compile_once(*args))
    x = torch.ones(2, 4)
    batch = [x, [x]] if make is Nested else x
    network, model = CompiledNetwork("float32"), make()
    for _ in range(2):  # it is tried once
        with pytest.raises(
            TypeError if make is Nested else ValueError, match=f"compile=True.*{message}.*compile=False"
        ):
            both(model, [batch], network)
    assert len(tries) == (0 if make is Nested else 1) and len(graphs) == (1 if make is Random else 0)


def test_calls_that_the_compiler_drops_are_noticed(monkeypatch):
    def without_calls(graph: fx.GraphModule, **_: Any) -> fx.GraphModule:
        last = [node for node in graph.graph.nodes if node.target is torch.ops.spade_fast.observe_.default][-1]
        graph.graph.erase_node(last)
        graph.recompile()
        return graph

    monkeypatch.setattr(torch, "compile", without_calls)
    with pytest.raises(ValueError, match=r"torch.compile left out or repeated calls of layers \['8'\]"):
        both(convolutions(), list(torch.randn(2, 2, 3, 10, 10)))


def test_without_a_compiler(monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    message = r"which needs a C\+\+ compiler, failed on the network \(.*/no/compiler"
    with inductor.patch({"cpp.cxx": (None, "/no/compiler")}), pytest.raises(ValueError, match=message):
        both(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 3))


def assert_near_ties(first: Calibration, second: Calibration, model: nn.Module, band: float) -> None:
    """The exact solver's orders are equal up to the first near-tie of each row, where two scores lie within `band`."""
    for name, layer in first.layers.items():
        weight = layer.matrix(layer.weight(model).detach())
        paths = []
        for calibration in (first, second):
            gram = calibration.grams[name].double()
            damp = 0.01 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(layer.columns)
            paths.append(ops.obs_path(weight, torch.linalg.inv(gram + damp).float()))
        (order, losses), (other, other_losses) = paths
        same = (order == other).cumprod(2).bool()
        decided = same | ((~same).cumsum(2) == 1)
        error = (losses - other_losses).abs()
        assert (error <= band * losses.amax(2, keepdim=True))[decided].all(), name


def test_compiled_code_has_the_same_masks_but_for_near_ties():
    """The one test of what `torch.compile` really makes of a graph."""
    model = convolutions().eval()
    samples = [list(torch.randn(3, 4, 3, 10, 10)), list(torch.randn(2, 4, 3, 10, 10))]
    for sample, network in zip(samples, [CompiledNetwork("float32")] * 2, strict=True):
        pair = both(model, sample, network)
        assert_equal(*pair, bound=1e-5)
        assert_near_ties(*pair, model, band=1e-3)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's has no effect
        made = [trace_batch(model, samples, sparsity=0.5, compile=compiled) for compiled in (False, True)]
    for eager, compiled in zip(*made, strict=True):
        for name in eager.layers:
            assert (eager.mask(name) == compiled.mask(name)).float().mean() > 0.99
