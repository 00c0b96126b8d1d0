"""Recurrent layers against inputs collected by running them one step, and one layer, at a time in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from spade_fast import trace
from spade_fast.ops import reference
from spade_fast.pruning.calibration import Calibration, calibrate
from spade_fast.pruning.layers import find_layers

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

aten = torch.ops.aten
KINDS = {
    "LSTM": (nn.LSTM, {}),
    "LSTM with projections": (nn.LSTM, {"proj_size": 2}),
    "GRU": (nn.GRU, {}),
    "RNN": (nn.RNN, {}),
    "RNN with ReLU": (nn.RNN, {"nonlinearity": "relu"}),
}


def step(
    module: nn.RNNBase, x: Tensor, h: Tensor, c: Tensor, ending: str, seen: dict[str, list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """One time step [C] of one layer and direction, written out; returns the hidden and the cell state."""

    def product_of(name: str, inputs: Tensor) -> Tensor:
        seen.setdefault(f"weight_{name}_{ending}", []).append(inputs)
        bias = getattr(module, f"bias_{name}_{ending}") if module.bias and name != "hr" else None
        return F.linear(inputs, getattr(module, f"weight_{name}_{ending}"), bias)

    of_input, of_hidden = product_of("ih", x), product_of("hh", h)
    if module.mode == "GRU":
        (r, z, n), (hr, hz, hn) = of_input.chunk(3), of_hidden.chunk(3)
        z = torch.sigmoid(z + hz)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h, c
    if module.mode != "LSTM":
        total = of_input + of_hidden
        return (total.relu() if module.mode == "RNN_RELU" else total.tanh()), c
    i, f, g, o = (of_input + of_hidden).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (product_of("hr", h) if module.proj_size else h), c


def inputs_of(module: nn.RNNBase, sequences: list[Tensor], states: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Inputs [N, C] of each weight, in float64, for sequences [T, C] with initial states [layers, C]."""
    module = copy.deepcopy(module).double()
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for sequence, (hidden, cell) in zip(sequences, states, strict=True):
            x = sequence.double()
            for layer in range(module.num_layers):
                outputs = []
                for direction in range(1 + module.bidirectional):
                    at = layer * (1 + module.bidirectional) + direction
                    h, c, of_steps = hidden[at].double(), cell[at].double(), []
                    for one in x.flip(0) if direction else x:
                        h, c = step(module, one, h, c, f"l{layer}{'_reverse' * direction}", seen)
                        of_steps.append(h)
                    outputs.append(torch.stack(of_steps[::-1] if direction else of_steps))
                x = torch.cat(outputs, 1)
    return {name: torch.stack(inputs) for name, inputs in seen.items()}


def check(calibration: Calibration, expected: dict[str, Tensor]) -> None:
    assert not calibration.unsupported and not calibration.unreached
    assert calibration.grams.keys() == expected.keys()
    for name, inputs in expected.items():
        gram, oracle = calibration.grams[name], reference.gram_linear(inputs[None])
        tolerance = 1e-5 if gram.dtype == torch.float32 else 1e-12
        assert (gram.double() - oracle).abs().max() <= tolerance * oracle.abs().max(), name


class Arguments(nn.Module):
    """Takes a batch apart into what a recurrent module is called with."""

    def __init__(self, module: nn.RNNBase, given: str) -> None:
        super().__init__()
        self.module, self.given = module, given

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor, lengths: Tensor) -> object:
        state = (hidden, cell) if isinstance(self.module, nn.LSTM) else hidden
        sequence: Tensor | PackedSequence = x
        if self.given == "packed":
            sequence = pack_padded_sequence(x, lengths, self.module.batch_first, enforce_sorted=False)
        return self.module(sequence, state) if self.given != "no state" else self.module(sequence)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["no state", "state", "packed", "unbatched"])
@pytest.mark.parametrize("both", [False, True])
def test_all_forms(kind, given, both):
    """Layers, biases, memory orders, precisions and modes alternate."""
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    batch_first, bias = given in ("packed", "state"), not both
    dtype = torch.float64 if given == "state" else torch.float32
    module = cls(3, 5, 2 + both, bias=bias, batch_first=batch_first, bidirectional=both, dropout=0.5, **options)
    module = module.to(dtype)
    sizes, steps = (3, 4)
    layers, states = (2 + both) * (1 + both), module.proj_size or 5
    x = torch.randn(steps, sizes, 3, dtype=dtype)
    hidden, cell = (torch.randn(layers, sizes, size, dtype=dtype) for size in (states, 5))
    if given == "no state":
        hidden, cell = hidden * 0, cell * 0
    lengths = torch.tensor([2, 4, 3]) if given == "packed" else torch.full((sizes,), steps)
    sequences = [x[: lengths[n], n] for n in range(sizes)]
    expected = inputs_of(module, sequences, [(hidden[:, n], cell[:, n]) for n in range(sizes)])
    model = Arguments(module, given)
    found, dense = find_layers(model)
    assert not dense and [layer.name for layer in found] == [
        f"module.{name}" for name, _ in module.named_parameters() if name.startswith("weight")
    ]
    batches = [(x.transpose(0, 1) if batch_first else x, hidden, cell, lengths)]
    if given == "unbatched":
        batches = [(x[:, n], hidden[:, n], cell[:, n], lengths) for n in range(sizes)]
    expected = {f"module.{name}": inputs for name, inputs in expected.items()}
    check(calibrate(model, batches, found), expected)
    if given in ("no state", "packed"):
        with torch.inference_mode():
            check(calibrate(model, batches, found), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("tied", ["weight_hh_l0", "weight_ih_l1", "weight_ih_l0_reverse"])
def test_tied_weights_of_one_module(kind, tied):
    module, x = kind(4, 4, num_layers=2, bidirectional="reverse" in tied), torch.randn(5, 3, 4)
    setattr(module, tied, module.weight_ih_l0)
    state = [torch.zeros(4, 4), torch.zeros(4, 4)]
    expected = inputs_of(module, [x[:, n] for n in range(3)], [(state[0], state[1])] * 3)
    expected["weight_ih_l0"] = torch.cat([expected["weight_ih_l0"], expected.pop(tied)])
    found = find_layers(module)[0]
    with torch.inference_mode():
        check(calibrate(module, x, found), expected)
    check(calibrate(module, x, found), expected)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell):
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for one in x:
                state = self.cell(one, state)
            return state[0] if isinstance(state, tuple) else state

    model, x = Steps(), torch.randn(4, 7, 3)
    whole = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}[cell](3, 5)
    whole.load_state_dict({f"{name}_l0": value for name, value in model.cell.state_dict().items()})
    none = torch.zeros(1, 5)
    expected = inputs_of(whole, list(x.unbind(1)), [(none, none)] * 7)
    check(
        calibrate(model, [x], find_layers(model)[0]),
        {f"cell.{name.removesuffix('_l0')}": inputs for name, inputs in expected.items()},
    )


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize(("packed", "projected"), [(False, False), (True, False), (False, True)])
def test_calls_of_cudnn(mode, packed, projected):
    """What a GPU would run as one op is taken apart; the op itself is not called."""
    cls, options = [KINDS["RNN with ReLU"], KINDS["RNN"], KINDS["LSTM"], KINDS["GRU"]][mode]
    if projected and cls is not nn.LSTM:
        return
    module = cls(
        3, 5, 2, bidirectional=True, bias=not packed, **options, **({"proj_size": 2} if projected else {})
    ).eval()

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            sequence = pack_padded_sequence(x, torch.tensor([4, 2]))
            weights = [w for w in module._flat_weights if w is not None]
            hidden = x.new_zeros(4, 2, module.proj_size or 5)
            cell = x.new_zeros(4, 2, 5) if cls is nn.LSTM else None
            data, sizes = (sequence.data, sequence.batch_sizes.tolist()) if packed else (x, [])
            stride = len(weights) // 4
            return aten._cudnn_rnn(
                data,
                weights,
                stride,
                None,
                hidden,
                cell,
                mode,
                5,
                module.proj_size,
                2,
                False,
                0.0,
                False,
                True,
                sizes,
                None,
            )[0]

    x, none = torch.randn(4, 2, 3), torch.zeros(4, 2, 5)
    states = [(none[:, n, : module.proj_size or 5], none[:, n]) for n in range(2)]
    expected = inputs_of(module, [x[: 2 if n and packed else 4, n] for n in range(2)], states)
    model = Fused()
    calibration = calibrate(model, [x], find_layers(model)[0])
    check(calibration, {f"module.{name}": inputs for name, inputs in expected.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_traces(kind):
    """The report's error is that of the products, whose Gram matrix does not depend on the layer's own weights."""
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    module = cls(3, 6, batch_first=True, **options)
    x = torch.randn(20, 5, 3)
    made = trace(module, x, sparsity=0.5, strict=True)
    assert made.layers == tuple(name for name, _ in module.named_parameters() if name.startswith("weight"))
    none = torch.zeros(1, 20, 6)
    states = [(none[:, n, : module.proj_size or 6], none[:, n]) for n in range(20)]
    inputs, dense = inputs_of(module, list(x), states), module(x)[0]
    for report in made.reports:
        name = report.name
        weight = getattr(module, name).detach().double()
        products, change = inputs[name] @ weight.mT, inputs[name] @ (weight - made.weight(name)).mT
        assert abs(float(change.norm() / products.norm()) - report.measured_error) < 1e-4
    with made.applied(module):
        assert not torch.equal(module(x)[0], dense)
    assert torch.equal(module(x)[0], dense)


def test_sequences_that_are_parameters_are_inputs():
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sequence, self.cell = nn.Parameter(torch.randn(4, 2, 3)), nn.LSTM(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.sequence)[0] + x

    model = Learned()
    none = torch.zeros(1, 5)
    expected = inputs_of(model.cell, list(model.sequence.detach().unbind(1)), [(none, none)] * 2)
    layers = [layer for layer in find_layers(model)[0] if layer.name != "sequence"]
    check(calibrate(model, [torch.zeros(2, 1)], layers), {f"cell.{name}": inputs for name, inputs in expected.items()})
