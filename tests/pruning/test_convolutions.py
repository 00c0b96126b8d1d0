"""Convolutions of all kinds against their columns, unfolded by kernels that copy one input each."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spade_fast import trace
from spade_fast.ops import reference
from spade_fast.pruning.calibration import calibrate
from spade_fast.pruning.layers import Layer, find_layers

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = KINDS[3:]


def layer_of(module: nn.Module) -> Layer:
    (layer,), dense = find_layers(module)
    assert not dense
    return layer


def columns(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs [G, C, N] of each output, in solver order and float64.

    The module's weight is replaced by one of C outputs per group, each of which copies one column.
    """
    layer = layer_of(module)
    side = layer.groups * layer.columns
    shape = (layer.shape[0], layer.columns) if layer.transposed else (side, layer.shape[1])
    identity = replace(layer, rows=layer.columns, shape=(*shape, *layer.kernel))
    unfolds = copy.deepcopy(module).double()
    unfolds.bias, unfolds.out_channels = None, side
    matrices = torch.eye(layer.columns, dtype=torch.float64).repeat(layer.groups, 1, 1)
    unfolds.weight = nn.Parameter(identity.restore(matrices))
    with torch.no_grad():
        output = unfolds(x.double())
    output = output if output.dim() == len(layer.kernel) + 2 else output[None]
    return output.transpose(0, 1).reshape(layer.groups, layer.columns, -1)


def check(module: nn.Module, *batches: Tensor) -> None:
    calibration = calibrate(module, list(batches), [layer_of(module)])
    assert not calibration.unsupported and not calibration.unreached
    gram = calibration.grams["weight"]
    expected = sum(reference.gram_linear(columns(module, x).mT) for x in batches)
    tolerance = 1e-5 if gram.dtype == torch.float32 else 1e-12
    assert gram.shape == expected.shape and torch.equal(gram, gram.mT)
    assert (gram.double() - expected).abs().max() <= tolerance * expected.abs().max()


@st.composite
def convolutions(draw) -> tuple[nn.Module, tuple[Tensor, ...]]:
    kind = draw(st.sampled_from(KINDS))
    dimensions = 1 + KINDS.index(kind) % 3

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dimensions, max_size=dimensions)))

    groups, per_group, rows = draw(st.sampled_from([(1, 1, 1), (1, 3, 2), (2, 1, 2), (3, 2, 1)]))
    kernel, stride, dilation = each(1, 4), each(1, 4), each(1, 3)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    options = {"stride": stride, "dilation": dilation, "groups": groups, "dtype": dtype}
    if kind in TRANSPOSED:
        sizes = each(1, 4)
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        most = [
            ((n - 1) * s + r + e) // 2 for n, s, r, e in zip(sizes, stride, reach, extra, strict=True)
        ]  # with at least one output
        options["padding"] = tuple(draw(st.integers(0, min(m, 5))) for m in most)
        options["output_padding"] = tuple(extra)
    else:
        options["padding"] = each(0, 3)
        sizes = tuple(r + 1 + more for r, more in zip(reach, each(0, 3), strict=True))
    module = kind(groups * per_group, groups * rows, kernel, **options)
    torch.manual_seed(draw(st.integers(0, 99)))
    batched = draw(st.booleans())
    shapes = [(n, groups * per_group, *sizes) for n in (3, 1)] if batched else [(groups * per_group, *sizes)]
    return module, tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_any_geometry(drawn):
    module, batches = drawn
    check(module, *batches)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_in_three_dimensions(mode):
    check(nn.Conv3d(2, 3, (3, 2, 3), padding=(1, 1, 2), padding_mode=mode), torch.randn(2, 2, 4, 3, 5))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_string_padding_in_three_dimensions():
    check(nn.Conv3d(2, 3, (2, 3, 4), padding="same", dilation=2), torch.randn(2, 2, 4, 3, 5))


def test_output_size_and_inference_mode():
    class Sized(nn.ConvTranspose2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, output_size=[2 * x.shape[-2], 2 * x.shape[-1]])

    module = Sized(3, 4, 3, stride=2, padding=1)
    check(module, torch.randn(2, 3, 4, 5))
    with torch.inference_mode():
        check(module, torch.randn(2, 3, 4, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_and_bfloat16(kind):
    module = kind(2, 3, 2)
    dimensions = len(module.kernel_size)
    calibration = calibrate(
        module, [torch.zeros(0, 2, *[4] * dimensions)] * 2 + [torch.zeros(1, 2, *[4] * dimensions)], [layer_of(module)]
    )
    assert not calibration.grams["weight"].any()
    x = torch.randn(2, 2, *[4] * dimensions).bfloat16()
    gram = calibrate(module.bfloat16(), [x], [layer_of(module)]).grams["weight"]
    expected = reference.gram_linear(columns(module.float(), x.float()).mT)
    assert gram.dtype == torch.float32 and torch.allclose(gram.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_solver_order(kind, groups):
    """Taps in the order of the parameter, then channels: written out for one entry of each group."""
    module = kind(4, 6, (3, 2, 4)[: 1 + KINDS.index(kind) % 3], groups=groups)
    layer, weight = layer_of(module), module.weight.detach()
    matrix = layer.matrix(weight)
    inputs = 4 // groups
    assert matrix.shape == (groups, 6 // groups, inputs * layer.taps) and torch.equal(layer.restore(matrix), weight)
    tap = tuple(size - 1 for size in layer.kernel)
    for group in range(groups):
        stored = weight[group * inputs + 1, 2] if kind in TRANSPOSED else weight[group * (6 // groups) + 2, 1]
        assert matrix[group, 2, (layer.taps - 1) * inputs + 1] == stored[tap]
    natural = matrix[..., layer.natural_order()].reshape(groups, 6 // groups, inputs, *layer.kernel)
    assert torch.equal(natural[0, 2, 1], weight[1, 2] if kind in TRANSPOSED else weight[2, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_traces(kind, solver):
    torch.manual_seed(0)
    module = kind(2, 9, 2, stride=2)
    x = torch.randn(12, 2, *[5] * len(module.kernel_size))
    made = trace(module, x, sparsity=0.5, solver=solver)
    (report,) = made.reports
    before = module.weight.detach().clone()
    with torch.no_grad():
        dense = module(x)
        with made.applied(module):
            pruned = module(x)
    assert torch.equal(module.weight, before) and made.sparsity == 0.5 and report.block == layer_of(module).taps
    bias = module.bias.detach().reshape(-1, *[1] * len(module.kernel_size))
    error = (pruned - dense).norm() / (dense - bias).norm()
    assert abs(float(error) - report.measured_error) < 1e-4
