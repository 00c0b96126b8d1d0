"""Weights that no solver prunes: found, reported, warned of, and counted in the sparsity of the whole network."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import FallbackError, FallbackWarning, Trace, trace, trace_batch, tune
from spade_fast.pruning.dense_weights import count_weights
from spade_fast.pruning.layers import find_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*quantize")

FEATURES = 4


class Net(nn.Module):
    """A part of some kind, a head that can be pruned, and parts that are not used."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.head = nn.Linear(FEATURES, 6)
        self.idle_part = nn.Bilinear(2, 2, 8)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.part(x).flatten(1)))


class Bilinear(nn.Module):
    """Has two weights that no solver prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Bilinear(FEATURES, FEATURES, FEATURES) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x, self.one(x, x))


class Bare(nn.Module):
    def __init__(self, use) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(FEATURES, FEATURES))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.matrix)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x[:, 0].long().clamp(0, 2))


BILINEAR = ["part.one", "part.other"]
# For each network, the names of the weights that stay dense and a word of the note.
NETWORKS = {
    "bilinear": (lambda: Net(Bilinear()), BILINEAR, "aten._trilinear"),
    "computed": (lambda: Net(Bare(lambda x, w: F.linear(x, w * 2))), ["part.matrix"], "aten.mul"),
    "part of it": (lambda: Net(Bare(lambda x, w: x * w[0, 1:2])), ["part.matrix"], "aten.mul"),
    "embedding": (lambda: Net(Table()), ["part.table"], "Embedding"),
    "TorchScript": (lambda: Net(torch.jit.script(nn.Linear(FEATURES, FEATURES))), ["part"], "TorchScript Linear"),
    "computed by itself": (lambda: Net(Doubled()), ["part"], "computed"),
    "integers": (lambda: Net(Stored(torch.int8)), ["part"], "int8"),
    "bytes": (lambda: Net(Stored(torch.float8_e5m2)), ["part"], "float8_e5m2"),
}


class Stored(nn.Linear):
    """A linear layer that stores its weight in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(FEATURES, FEATURES)
        self.weight = nn.Parameter((self.weight.detach() * 100).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() / 100, self.bias)


class Doubled(nn.Linear):
    """A linear layer that computes its weight in a way of its own."""

    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.stored = self._parameters.pop("weight")
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored * 2, self.bias)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(30, FEATURES, generator=torch.Generator().manual_seed(0))


def notes(made: Trace) -> dict[str, str]:
    return {report.name: report.note for report in made.reports if report.note}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_weights_are_in_the_reports_and_the_warning(name, inference, data):
    make, expected, word = NETWORKS[name]
    model = make()
    with torch.inference_mode(inference), pytest.warns(FallbackWarning) as caught:
        made = trace(model, data, sparsity=0.5)
    (message,) = [str(one.message) for one in caught if one.category is FallbackWarning]
    assert made.layers[-1] == "head" and not set(made.layers) & set(expected)
    assert list(notes(made)) == expected
    for weight, note in notes(made).items():
        assert word in note and f"{weight} ({note})" in message and note in made.summary()
    assert "idle" not in message and "norm" not in message
    with pytest.raises(FallbackError, match=expected[0]):
        trace(model, data, sparsity=0.5, strict=True)


def test_partly_quantised_networks(data):
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.LSTM(8, 3), Output(), nn.Linear(3, 2)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {"2", "4"}, torch.qint8)
    with pytest.warns(FallbackWarning, match=r"2\.weight_ih_l0 \(quantised: .* 4 \(quantised: pass the model"):
        made = trace(quantised, data[:, None], sparsity=0.5)
    assert made.layers == ("0",)
    assert {report.name: report.shape for report in made.reports if report.note} == {
        "2.weight_ih_l0": (12, 8),
        "2.weight_hh_l0": (12, 3),
        "4": (2, 3),
    }
    assert made.network_sparsity == 16 / (32 + 96 + 36 + 6)
    with pytest.raises(FallbackError, match="quantised"):
        trace(quantised, data[:, None], sparsity=0.5, strict=True)


@pytest.mark.parametrize("convert", ["convert_fx", "convert_to_reference_fx"])
def test_networks_quantised_by_fx(convert, data):
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    mapping = get_default_qconfig_mapping("x86").set_module_name("0", None)
    prepared = quantize_fx.prepare_fx(nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 2)).eval(), mapping, (data,))
    prepared(data)
    with pytest.warns(FallbackWarning, match=r"pruned: 1 \("):
        made = trace(getattr(quantize_fx, convert)(prepared), data, sparsity=0.5)
    assert made.layers == ("0",) and list(notes(made)) == ["1"]
    assert made.header["network_weights"] == 32 + 16


class Output(nn.Module):
    def forward(self, outputs: tuple[Tensor, object]) -> Tensor:
        return outputs[0]


def test_sparsity_of_the_whole_network(data, tmp_path):
    model = Net(Bilinear())
    weights = 24 + 2 * 64 + 32  # head, bilinear layers, an unused one; biases and the batch norm do not count
    assert count_weights(model) == weights
    with pytest.warns(FallbackWarning):
        made = trace(model, data, sparsity=0.5)
    made.save(tmp_path / "trace")
    for one in (made, Trace.load(tmp_path / "trace")):
        assert one.header["network_weights"] == weights
        assert one.sparsity == 0.5 and one.network_sparsity == 12 / weights
        assert f"50.00% of the pruned layers, {12 / weights:.2%} of the whole network" in one.summary()
    assert trace(model, data, sparsity=0).network_sparsity == 0
    assert trace(nn.Linear(FEATURES, 2), data, sparsity=0.5).network_sparsity == 0.5


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 5), nn.Embedding(5, 4))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(model[0].weight.detach())
    model[3].weight = nn.Parameter(model[0].weight.detach())
    assert count_weights(model) == 20
    layers, dense = find_layers(model)
    assert [layer.name for layer in layers] == ["1"] and dense == {}


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "layers": "head"},
        {"sparsity": 0.5, "layers": ["h*", "norm*"][:1]},
        {"sparsity": {"head": 0.5}},
        {"sparsity": {"part*": 0, "idle*": 0, "*": 0.5}},
        {"sparsity": lambda name: 0.5 if name == "head" else 0},
        {"sparsity": 0},
    ],
)
def test_what_the_user_left_out_is_no_fallback(options, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = trace(Net(Bilinear()), data, strict=True, **options)
    assert notes(made) == {}


@pytest.mark.parametrize("options", [{"layers": "*"}, {"layers": ["part.o*"]}, {"layers": None}])
def test_patterns_and_mappings_can_name_dense_weights(options, data):
    with pytest.warns(FallbackWarning, match=r"part\.one"):
        made = trace(Net(Bilinear()), data, sparsity=0.5, **options)
    assert list(notes(made)) == BILINEAR and made.header["images"] == 30
    with pytest.warns(FallbackWarning, match=r"part\.other") as caught:
        trace(Net(Bilinear()), data, sparsity={"part.other": 0.25})
    assert "part.one" not in str(caught[0].message)


def test_use_is_that_of_the_sample(data):
    class Chooses(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() > 0 else self.head(x)

    model = Chooses(Bilinear())
    with pytest.warns(FallbackWarning):
        used, unused = trace_batch(model, [data.abs(), -data.abs()], sparsity=0.5)
    assert list(notes(used)) == BILINEAR and notes(unused) == {}


class Tokens(nn.Module):
    """A class token and position embeddings, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 9, 4))
        self.scale = nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x[:, None]], 1)
        return (x + self.positions[:, :2])[:, 0] * self.scale[0]


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_only_added_or_concatenated_is_a_bias(inference, data):
    model = Net(Tokens())
    with torch.inference_mode(inference), pytest.warns(FallbackWarning, match=r"pruned: part\.scale \([^,]*\)$"):
        made = trace(model, data, sparsity=0.5)
    assert list(notes(made)) == ["part.scale"] and made.header["network_weights"] == 24 + 32 + 4 + 36 + 8


def test_memory_limit_and_zeros_of_dense_weights(data):
    for part, name in ((Table(), "table"), (Bare(lambda x, w: F.linear(x, w * 2)), "matrix")):
        model = Net(part)
        with torch.no_grad():
            model.get_parameter(f"part.{name}.weight" if name == "table" else "part.matrix")[0] = 0
        with pytest.warns(FallbackWarning, match=rf"part\.{name}") as caught:
            made = trace(model, [data, data], sparsity=0.5, memory_limit=64)
        (report,) = (one for one in made.reports if one.note)
        assert len(caught) == 1 and report.shape[1] == 4 and report.reached == pytest.approx(1 / report.shape[0])


def test_tune_warns_too(data):
    with pytest.warns(FallbackWarning, match=r"part\.one"):
        tuning = tune(Net(Bilinear()), [data], lambda model, i: 0.0, candidates=[0.5], stages="blocks")
    assert list(tuning.sparsity) == ["head"]


def test_networks_without_a_layer_to_prune_name_what_they_have(data):
    with pytest.raises(ValueError, match=r"^Embedding has no layer that can be pruned; .* belong to: Embedding$"):
        trace(nn.Embedding(FEATURES, 2), data, sparsity=0.5)
    both = nn.Sequential(nn.Embedding(3, 2), nn.EmbeddingBag(1, 2))
    with pytest.raises(ValueError, match=r"belong to: Embedding, EmbeddingBag$"):
        trace(both, data, sparsity={"*": 0.5})
    with pytest.raises(ValueError, match=r"^ReLU has no .*; it has no weights$"):
        trace(nn.ReLU(), data, sparsity=0.5)
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(FEATURES, 2)))
    with pytest.raises(ValueError, match=r"belong to: quantised Linear\. Pass the model as it was before quantisation"):
        trace(quantised, data, sparsity=0.5)


def test_nothing_is_asked_of_networks_at_sparsity_zero(data):
    for model in (nn.ReLU(), nn.LSTM(FEATURES, 2)):
        made = trace(model, data, sparsity=0, strict=True)
        assert made.layers == () and made.network_sparsity == 0
        with made.applied(model):
            model(data)
