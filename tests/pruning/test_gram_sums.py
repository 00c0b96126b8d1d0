"""Layers with the same inputs share a Gram matrix, which is, bit for bit, that of each of them alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spade_fast import ops, trace
from spade_fast.pruning.calibration import Calibration, calibrate
from spade_fast.pruning.gram_sums import Call, GramSums
from spade_fast.pruning.layers import find_layers


class Attention(nn.Module):
    """Separate projections of one input, and what happens to it before each of them."""

    def __init__(self, change: Callable[[Tensor, int], Tensor] = lambda x, place: x) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        outputs = []
        for place, projection in enumerate((self.query, self.key, self.value)):
            x = self.change(x, place)
            outputs.append(projection(x))
        return torch.stack(outputs)


def calibrated(model: nn.Module, batches: Sequence[Tensor], names: str | None = None, **options) -> Calibration:
    return calibrate(model, list(batches), find_layers(model, names)[0], **options)


def assert_as_alone(model: nn.Module, batches: Sequence[Tensor], **options) -> dict[str, Tensor]:
    """Compare the Gram matrices of all layers with those of each layer that is calibrated by itself; return them."""
    grams = calibrated(model, batches, **options).grams
    for name, gram in grams.items():
        assert torch.equal(gram, calibrated(model, batches, name, **options).grams[name]), name
    return grams


def count_products(monkeypatch, name: str) -> list[int]:
    """Return a list to which the number of rows or images of each product is added."""
    products, right = list[int](), getattr(ops, name)

    def counted(gram: Tensor, x: Tensor, *args) -> Tensor:
        products.append(x.shape[-2] if name == "gram_linear_" else len(x))
        return right(gram, x, *args)

    monkeypatch.setattr(ops, name, counted)
    return products


@pytest.mark.parametrize("precision", ["float32", "bf16"])  # bf16 casts the input again for each projection
def test_projections_of_one_input_share_products(monkeypatch, precision):
    model, batches = Attention(), [torch.randn(2, n, 6) for n in (5, 4, 3)]
    grams = assert_as_alone(model, batches, precision=precision)
    assert len({gram.data_ptr() for gram in grams.values()}) == 1
    products = count_products(monkeypatch, "gram_linear_")
    calibrated(model, batches, precision=precision)
    assert products == [10, 10, 10, 8, 6]  # that they share is known after their first call


def take_new_memory(x: Tensor, place: int) -> Tensor:
    """Return new memory, at the address of the old if the allocator has it, with other values."""
    shape = x.shape
    del x
    return torch.full(shape, float(place)).cumsum(-1)


def write_slice(x: Tensor, place: int) -> Tensor:
    x[0, 0, place] += 1
    return x


def write_in_numpy(x: Tensor, place: int) -> Tensor:
    x.numpy()[..., place] += 1
    return x


def write_data(x: Tensor, place: int) -> Tensor:
    x.data.mul_(place + 1)
    return x


def write_for_last(x: Tensor, place: int) -> Tensor:
    return x.mul_(2) if place == 2 else x


def write_without_versions(x: Tensor, place: int) -> Tensor:
    with torch.inference_mode():
        return x.clone().mul_(place + 1)


CHANGES = [take_new_memory, write_slice, write_in_numpy, write_data, write_for_last, write_without_versions]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("from_batch", [0, 1, 2])
def test_inputs_that_change_between_calls(change, from_batch):
    """The values count, not the memory that they are in, however and from whenever they are written to."""
    batches = [torch.randn(2, 5, 6) + 10 * number for number in range(4)]
    starts = [float(batch[0, 0, 0]) for batch in batches]

    def changed(x: Tensor, place: int) -> Tensor:
        return change(x, place) if changing else x

    changing = False
    model = Attention(changed)

    def switch(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal changing
        changing = starts.index(float(inputs[0][0, 0, 0])) >= from_batch

    model.register_forward_pre_hook(switch)
    grams = assert_as_alone(model, batches)
    changing = False
    plain = calibrated(Attention(), batches).grams
    assert not torch.equal(grams["value"], plain["value"]) and grams["value"].data_ptr() != grams["query"].data_ptr()


def test_layers_that_are_not_called_or_called_twice():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d = self.layers
            outputs = [a(x), b(x), c(x), d(x)]
            if len(x) == 3:
                outputs.append(a(x))
            if len(x) == 2:
                outputs = [c(x), a(x + 1), b(x + 1), c(x + 1)]
            return torch.stack(outputs)

    grams = assert_as_alone(Branches(), [torch.randn(n, 6) for n in (4, 3, 2, 4, 2, 2, 3)])
    assert len({gram.data_ptr() for gram in grams.values()}) == 4


class Inception(nn.Module):
    """Branches that differ in their kernels, strides and order, on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.before_three, self.strided = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1, stride=2)
        self.three, self.wide, self.other_wide = (nn.Conv2d(size, 3, 3, padding=1) for size in (3, 4, 4))
        self.pooled = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.one(x).relu_(), self.three(self.before_three(x).relu_()), self.wide(x), self.other_wide(x)]
        outputs += [self.strided(x).repeat(1, 1, 2, 2), self.pooled(nn.functional.max_pool2d(x, 3, 1, 1))]
        return torch.stack(outputs)


def test_branches_of_convolutions(monkeypatch):
    batches = torch.randn(6, 4, 8, 8).split(2)
    grams = assert_as_alone(Inception(), batches)
    groups = {frozenset(name for name in grams if grams[name] is gram) for gram in grams.values()}
    shared = {frozenset({"one", "before_three"}), frozenset({"wide", "other_wide"})}
    assert groups == shared | {frozenset({name}) for name in ("three", "strided", "pooled")}
    products = count_products(monkeypatch, "gram_conv2d_")
    calibrated(Inception(), batches)
    assert len(products) == 7 + 2 * 5


def test_inputs_in_other_memory_layouts_have_products_of_their_own(monkeypatch):
    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x.contiguous(memory_format=torch.channels_last))

    batches = torch.randn(6, 4, 8, 8).split(2)
    assert_as_alone(Layouts(), batches)
    products = count_products(monkeypatch, "gram_conv2d_")
    calibrated(Layouts(), batches)
    assert len(products) == 6


def test_bidirectional_recurrent_layers_share_their_inputs():
    grams = assert_as_alone(nn.LSTM(6, 5, bidirectional=True), [torch.randn(4, 3, 6) for _ in range(3)])
    assert grams["weight_ih_l0"] is grams["weight_ih_l0_reverse"]
    assert grams["weight_hh_l0"] is not grams["weight_hh_l0_reverse"]


def test_a_weight_used_otherwise_leaves_the_others():
    class Tied(Attention):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            return outputs * self.query.weight.sum() if len(x) == 2 else outputs

    batches = [torch.randn(n, 5, 6) for n in (3, 2, 3)]
    found, plain = calibrated(Tied(), batches), calibrated(Attention(), batches).grams
    assert list(found.grams) == ["key", "value"] and list(found.unsupported) == ["query"]
    assert torch.equal(found.grams["key"], plain["key"]) and found.grams["value"] is found.grams["key"]


@pytest.mark.filterwarnings("ignore:damped more than requested", "ignore:calibrated in parts")
@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("positions", [20, 1])  # a single one can only be solved with more damping
@pytest.mark.parametrize("limit", [None, 2 * 4 * 6**2])  # in bytes, two Gram matrices
def test_traces_of_layers_that_share_are_those_of_each_alone(solver, positions, limit):
    """Solvers use Gram matrices as scratch space."""
    model, batches = Attention(), [torch.randn(positions, 6)] * 2
    options = {"solver": solver, "sparsity": 0.5, "damping": 0.0}
    together = trace(model, batches, memory_limit=limit, **options)
    assert together.header["passes"] == (1 if limit is None else 2)
    for report in together.reports:
        alone = trace(model, batches, layers=report.name, **options)
        assert torch.equal(together.weight(report.name), alone.weight(report.name))
        assert (report.retries > 0) == (positions == 1)


# The number of a layer, that of its input, a factor of the product, and whether it may be compared with others.
CALL = st.tuples(
    st.integers(0, 2), st.integers(0, 1), st.sampled_from([1, 1, 1, 2]), st.sampled_from([True, True, True, False])
)


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(CALL, min_size=5, max_size=40))
@example(calls=[(0, 0, 1, True), (1, 0, 1, True), (0, 0, 1, True), (0, 1, 1, True), (1, 0, 1, True)])
@example(calls=[(0, 0, 1, True), (1, 0, 1, True), (0, 0, 1, True), (1, 0, 2, True)])
def test_any_order_of_calls(calls):
    """Layers that are called with inputs from a small pool have the sums of their own calls."""
    pool = [torch.randn(1, 3, 2) for _ in range(2)]
    sums, expected = GramSums(), dict[str, Tensor]()
    for layer, number, scale, comparable in calls:
        x, name = pool[number].clone(), str(layer)

        def product(gram: Tensor, x: Tensor = x, scale: int = scale) -> None:
            ops.gram_linear_(gram, x * scale)

        sums.add(name, Call(x, scale) if comparable else None, lambda: torch.zeros(1, 2, 2), product)
        product(expected.setdefault(name, torch.zeros(1, 2, 2)))
        x.fill_(torch.nan)  # what happens to it later does not matter
        assert all(torch.equal(sums.grams[name].triu(), gram.triu()) for name, gram in expected.items())
    if calls:
        sums.drop(str(calls[0][0]))
        assert sums.grams.keys() == expected.keys() - {str(calls[0][0])}


def test_no_input_is_kept_once_all_layers_had_it(monkeypatch):
    copies, right = list[weakref.ref[Tensor]](), Call.copy

    def copied(call: Call) -> Call:
        copy = right(call)
        copies.append(weakref.ref(copy.x))
        return copy

    monkeypatch.setattr(Call, "copy", copied)
    model, alive = Attention(), list[int]()
    hook = model.register_forward_hook(lambda *_: alive.append(sum(copy() is not None for copy in copies)))
    calibrated(model, [torch.randn(2, 5, 6) for _ in range(4)])
    hook.remove()
    assert len(copies) == 3 and alive == [0] * 4
