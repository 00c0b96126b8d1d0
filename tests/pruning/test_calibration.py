"""Gram matrices of intercepted calls against im2col of the inputs that each weight is really given."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spade_fast import FallbackWarning, UserError, trace
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.ops import reference
from spade_fast.pruning.calibration import calibrate
from spade_fast.pruning.layers import UnknownLayerError, find_layers


def grams_of(model: nn.Module, *batches: Tensor, **kwargs) -> dict[str, Tensor]:
    calibration = calibrate(model, list(batches), find_layers(model)[0], **kwargs)
    assert not calibration.unsupported and not calibration.unreached
    return calibration.grams


def assert_close(given: Tensor, expected: Tensor) -> None:
    assert given.shape == expected.shape
    tolerance = 1e-5 if given.dtype == torch.float32 else 1e-12
    assert torch.equal(given, given.mT)
    assert (given.double() - expected).abs().max() <= tolerance * expected.abs().max()


def linear_gram(x: Tensor) -> Tensor:
    return reference.gram_linear(x.reshape(1, -1, x.shape[-1]))


def conv_gram(x: Tensor, conv: nn.Conv2d | None = None, **geometry) -> Tensor:
    """Gram matrices [groups, K, K] of the given, already padded, images."""
    if conv is not None:
        geometry = {"stride": conv.stride, "dilation": conv.dilation, "kernel_size": conv.kernel_size, **geometry}
        geometry.setdefault("groups", conv.groups)
    return reference.gram_conv2d(x, **geometry)[0]


def columns_times_weight(layer, gram: Tensor, weight: Tensor) -> Tensor:
    matrix = layer.matrix(weight.double())
    return (matrix @ gram.double() * matrix).sum()


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    groups=st.sampled_from([1, 2, 6]),
    channels_last=st.booleans(),
    double=st.booleans(),
)
def test_ordinary_convolutions(kernel, stride, padding, dilation, groups, channels_last, double):
    dtype = torch.float64 if double else torch.float32
    conv = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups, dtype=dtype)
    batches = [torch.randn(n, 6, 13, 11, dtype=dtype) for n in (3, 2)]
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
        batches = [batch.to(memory_format=torch.channels_last) for batch in batches]
    gram = grams_of(conv, *batches)["weight"]
    assert gram.dtype == dtype
    assert_close(gram, sum(conv_gram(batch, conv, padding=padding) for batch in batches))


def test_gram_gives_the_energy_of_the_outputs():
    """Column order and grouping fit those of `Layer.matrix`, whatever the reference says."""
    conv = nn.Conv2d(4, 6, (3, 2), groups=2, bias=False)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 4 * 5, 7, bias=False))
    x = torch.randn(5, 4, 6, 6)
    grams = grams_of(model, x)
    outputs = (model[0](x).detach(), model(x).detach())
    for layer, output in zip(find_layers(model)[0], outputs, strict=True):
        energy = columns_times_weight(layer, grams[layer.name], layer.weight(model).detach())
        assert math.isclose(float(energy), float(output.double().square().sum()), rel_tol=1e-5)


class PadsItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def test_padding_in_own_forward():
    conv = PadsItself(3, 5, 3, stride=2, padding=7)
    x = torch.randn(2, 3, 9, 8)
    assert_close(grams_of(conv, x)["weight"], conv_gram(F.pad(x, (1, 2, 0, 1)), conv))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode):
    conv = nn.Conv2d(3, 4, (3, 5), padding=(1, 2), padding_mode=mode)
    x = torch.randn(2, 3, 7, 8)
    assert_close(grams_of(conv, x)["weight"], conv_gram(F.pad(x, (2, 2, 1, 1), mode=mode), conv))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 5), 1), ((2, 4), 1), ((4, 3), (3, 2))])
def test_string_padding(kernel, dilation):
    conv = nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation)
    x = torch.randn(2, 3, 8, 7)
    sides = []
    for size, step in zip(reversed(conv.kernel_size), reversed(conv.dilation), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    assert_close(grams_of(conv, x)["weight"], conv_gram(F.pad(x, sides), conv))
    valid = nn.Conv2d(3, 4, kernel, padding="valid")
    assert_close(grams_of(valid, x)["weight"], conv_gram(x, valid))


def test_unbatched_and_one_dimensional_convolutions():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(3, 6, 5)
    assert_close(grams_of(conv, x)["weight"], conv_gram(x[None], conv, padding=1))

    conv1d = nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2, groups=2)
    x = torch.randn(3, 4, 17)
    geometry = {"groups": 2, "kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 3), "dilation": (1, 2)}
    assert_close(grams_of(conv1d, x)["weight"], conv_gram(x[:, :, None], **geometry))
    assert_close(grams_of(conv1d, x[0])["weight"], conv_gram(x[:1, :, None], **geometry))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (2, 3, 4, 5), (5,), (2, 0, 5)])
def test_linear_inputs_of_any_shape(shape, bias):
    model = nn.Sequential(nn.Linear(5, 3, bias))
    x = torch.randn(shape)
    calibration = calibrate(model, [x], find_layers(model)[0])
    if x.numel() == 0:
        assert calibration.unreached == ["0"]
    else:
        assert_close(calibration.grams["0"], linear_gram(x))


@pytest.mark.parametrize("bias", [False, True])
def test_strided_inputs_and_single_outputs(bias):
    for x in (torch.randn(4, 5, 3).mT, torch.randn(5, 6, 2).permute(2, 1, 0), torch.randn(6, 10)[:, ::2]):
        model = nn.Linear(x.shape[-1], 1, bias)
        assert_close(grams_of(model, x)["weight"], linear_gram(x))


class Functional(nn.Module):
    """Uses the weights of its modules by function, one of them twice and in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point, self.line = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, padding=2).relu()
        x = self.point(x)
        x = self.point(x)
        x = F.linear(x.permute(0, 2, 3, 1), self.point.weight.flatten(1))
        x = F.conv2d(x.permute(0, 3, 1, 2), self.line.weight[:, :, None, None])
        x = torch.einsum("oi,nihw->nohw", self.line.weight, x)
        return self.line(x.mean((2, 3)))[0] @ self.line.weight.T


def test_functional_shared_and_reshaped_uses():
    model, x = Functional(), torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        first = F.conv2d(x, model.conv.weight, padding=2).relu()
        points = [first, model.point(first), model.point(model.point(first))]
        lines = [F.conv2d(points[2], model.point.weight)]
        for _ in range(2):
            lines.append(F.conv2d(lines[-1], model.line.weight[:, :, None, None]))
        lines[2] = lines[2].mean((2, 3), keepdim=True)
        lines.append(model.line(lines[2][:, :, 0, 0])[:1, :, None, None])
    grams = grams_of(model, x)
    assert_close(grams["conv"], conv_gram(x, model.conv, padding=2))
    assert_close(grams["point"], sum(conv_gram(p, model.point) for p in points))
    assert_close(grams["line"], sum(linear_gram(p.permute(0, 2, 3, 1)) for p in lines))


class Conv1D(nn.Module):
    """As in transformers: a linear layer with its weight stored [in, out]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 4), (4, 4), (1, 4), (4, 1)])
def test_transposed_linear(outputs, inputs):
    model, x = Conv1D(outputs, inputs), torch.randn(2, 3, inputs)
    (layer,), _ = find_layers(model)
    assert (layer.rows, layer.columns, layer.transposed) == (outputs, inputs, True)
    assert_close(grams_of(model, x)["weight"], linear_gram(x))
    assert torch.equal(layer.restore(layer.matrix(model.weight)), model.weight)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_projections(need_weights, training):
    attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    model = attention.train(training)
    x = torch.randn(3, 5, 8)
    batch = {"query": x, "key": x, "value": x, "need_weights": need_weights}
    layers, _ = find_layers(model)
    assert [layer.name for layer in layers] == ["in_proj_weight", "out_proj"]
    calibration = calibrate(model, [batch], layers)
    assert_close(calibration.grams["in_proj_weight"], linear_gram(x))
    with torch.no_grad():
        eye = torch.eye(8)
        model.eval()
        inside = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        inside.load_state_dict({**model.state_dict(), "out_proj.weight": eye, "out_proj.bias": torch.zeros(8)})
        assert_close(calibration.grams["out_proj"], linear_gram(inside(x, x, x)[0]))
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_with_own_projections():
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)
    query, key, value = torch.randn(2, 4, 8), torch.randn(2, 6, 5), torch.randn(2, 6, 3)
    calibration = calibrate(attention, [(query, key, value)], find_layers(attention)[0])
    for name, x in (("q", query), ("k", key), ("v", value)):
        assert_close(calibration.grams[f"{name}_proj_weight"], linear_gram(x))


def test_encoder_in_evaluation_mode_does_not_take_the_fused_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        fused = model(x)
    layers, _ = find_layers(model)
    assert len(layers) == 8
    calibration = calibrate(model, [{"src": x, "src_key_padding_mask": mask}, x], layers)
    assert sorted(calibration.grams) == sorted(layer.name for layer in layers)
    assert_close(calibration.grams["layers.0.self_attn.in_proj_weight"], 2 * linear_gram(x))
    with torch.no_grad():
        assert torch.equal(model(x), fused)


@pytest.mark.parametrize("same_values", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}])
def test_attention_of_several_sequences(same_values, options):
    """The parts of the input projection have inputs of their own; the output projection takes what remains."""
    attention = nn.MultiheadAttention(8, 2, **options).eval()
    query, key, value = (torch.randn(4, 3, 8) for _ in range(3))
    value = key if same_values else value
    layers, dense = find_layers(attention)
    assert [layer.name for layer in layers] == ["in_proj_weight", "out_proj"] and not dense
    calibration = calibrate(attention, [(query, key, value)], layers)
    expected = torch.cat([linear_gram(x) for x in (query, key, value)])
    assert_close(calibration.grams["in_proj_weight"], expected)
    with torch.no_grad():
        output = attention(query, key, value)[0]
        weight = attention.out_proj.weight
        inputs = (output - (0 if attention.out_proj.bias is None else attention.out_proj.bias)) @ weight.inverse().T
    gram = calibration.grams["out_proj"]
    assert (gram - linear_gram(inputs)).abs().max() <= 1e-3 * gram.abs().max()
    made = trace(attention, [(query, key, value)], sparsity=0.5, strict=True)
    assert made.layers == ("in_proj_weight", "out_proj")


def test_parts_of_an_attention_that_only_get_zeros_stay_dense():
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(4, 3, 8)
    with pytest.warns(FallbackWarning, match=r"in_proj_weight \(1 of 3 parts\)"):
        made = trace(attention, [(x, x + 1, x * 0)], sparsity=0.5, layers="in_proj_weight")
    pruned, dense = made.weight("in_proj_weight"), attention.in_proj_weight.detach()
    assert torch.equal(pruned[16:], dense[16:]) and int((pruned[:16] == 0).sum()) == 64


def test_other_uses_are_reported():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight
            self.mixed, self.square, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.conv, self.grouped = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2)
            self.batched = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(torch.arange(3))[:, None] + x
            y = self.mixed(y) * self.mixed.weight.norm()
            y = y @ self.square.weight  # the wrong way round
            image = y.reshape(1, 4, 3, 1).expand(1, 4, 3, 3)
            F.conv_transpose2d(image, self.conv.weight)
            F.conv2d(image, self.grouped.weight.reshape(1, 4, 2, 1)[..., :1, :])
            torch.bmm(self.batched.weight.reshape(2, 2, 4), y.mT[:2])
            return self.head(y)

    model = Odd()
    calibration = calibrate(model, [torch.randn(3, 1, 4)], find_layers(model)[0])
    reported = {"head", "mixed", "square", "conv", "grouped", "batched"}
    assert set(calibration.unsupported) == reported
    assert "norm" in calibration.unsupported["mixed"] and "embedding" in calibration.unsupported["head"]
    assert calibration.unreached == ["idle"]
    assert not calibration.grams


def test_weights_in_one_buffer_are_told_apart():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    buffer = torch.randn(2, 4, 4)
    for part, layer in zip(buffer, model, strict=True):
        layer.weight.data = part
    x = torch.randn(5, 4)
    grams = grams_of(model, x)
    assert_close(grams["0"], linear_gram(x))
    assert_close(grams["1"], linear_gram(x @ buffer[0].T))


def test_shared_modules_and_tied_parameters_are_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared, nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = shared.weight
    model[3].weight = nn.Parameter(shared.weight.data)
    layers, _ = find_layers(model)
    assert [layer.name for layer in layers] == ["0"]
    x = torch.randn(3, 4)
    inputs = [x, model[0](x), model[:2](x), model[:3](x)]
    assert_close(grams_of(model, x)["0"], sum(linear_gram(i.detach()) for i in inputs))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_inference_mode_inside_the_model():
    class Decorated(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Decorated(nn.Conv2d(3, 4, 2, padding="same"), nn.Flatten(1), nn.Linear(4 * 30, 3))
    x = torch.randn(2, 3, 6, 5)
    grams = grams_of(model, x)
    assert_close(grams["0"], conv_gram(F.pad(x, (0, 1, 0, 1)), model[0]))
    assert not grams["0"].is_inference()
    with torch.inference_mode():
        assert_close(grams_of(nn.Linear(5, 2), x)["weight"], linear_gram(x))


def test_compiled_models_run_uncompiled():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = torch.compile(inner, backend="aot_eager")
    x = torch.randn(3, 4)
    with torch.no_grad():
        model.eval()(x)
    grams = grams_of(model, x)
    assert_close(grams["2"], linear_gram(inner[:2](x).detach()))


def test_half_precision_models_have_float32_grams():
    model = nn.Linear(6, 3).to(torch.bfloat16)
    x = torch.randn(50, 6).to(torch.bfloat16)
    gram = grams_of(model, x)["weight"]
    assert gram.dtype == torch.float32
    assert_close(gram, linear_gram(x))


def test_one_weight_for_a_batch_of_products():
    """Frozen weights meet strided inputs as a batched product with the weight expanded."""

    class Batched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.weight.expand(3, 2, 4), x.mT)

    x = torch.randn(3, 5, 4)
    assert_close(grams_of(Batched(4, 2), x)["weight"], linear_gram(x))
    linear = nn.Linear(4, 2).requires_grad_(False)
    strided = torch.randn(3, 4, 5).mT
    assert_close(grams_of(linear, strided)["weight"], linear_gram(strided))


class Mixed(nn.Module):
    """A convolution, a depthwise one, a batch norm, attention and a linear layer, some of them used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=32)
        self.norm, self.attention = nn.BatchNorm2d(32), nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu()).flatten(2).mT
        return F.linear(self.attention(x, x, x, need_weights=False)[0], self.head.weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_calibration_sums_bfloat16_inputs_in_float32(frozen):
    """Frozen weights are cast again in every call, others once."""
    torch.manual_seed(0)
    model = Mixed().eval().requires_grad_(not frozen)
    x = torch.randn(19, 3, 12, 12)
    plain = grams_of(model, x)
    grams = grams_of(model, x[:8], x[8:], precision="bf16")
    rounded = reference.gram_conv2d(x.to(torch.bfloat16), 1, (3, 3), (1, 1), (1, 1))[0]
    assert_close(grams["conv"], rounded)
    assert grams.keys() == plain.keys()
    for name, gram in grams.items():
        assert gram.dtype == torch.float32
        relative = (gram - plain[name]).norm() / plain[name].norm()
        assert 0 < relative < 2e-2, name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_networks_with_their_own_autocast():
    """The casts that one block of autocast keeps are not those of another, as outside of calibration."""

    class Mixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype):
                    x = super().forward(x).to(x)
            return x

    model, x = Mixed(4, 4), torch.randn(7, 4)
    middle = F.linear(x.bfloat16(), model.weight.bfloat16(), model.bias.bfloat16()).float()
    expected = linear_gram(torch.cat([x.bfloat16().float(), middle.half().float()]).detach())
    assert_close(grams_of(model, x)["weight"], expected)
    assert trace(model, x, sparsity=0.5).layers == ("weight",)


def test_a_weight_that_is_cast_and_used_otherwise_is_reported():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.scaled = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x.double(), self.whole.weight.double())
            return F.linear(x, self.scaled.weight.double() * 2)

    model = Scaled()
    x = torch.randn(9, 6)
    calibration = calibrate(model, [x], find_layers(model)[0])
    assert_close(calibration.grams["whole"], linear_gram(x))
    assert list(calibration.unsupported) == ["scaled"] and "mul" in calibration.unsupported["scaled"]


def test_batches_may_be_tensors_sequences_mappings_and_streams():
    class Two(nn.Linear):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return super().forward(a if b is None else a + b)

    model, a, b = Two(4, 2), torch.randn(3, 4), torch.randn(3, 4)
    layers, _ = find_layers(model)
    seen: list[int] = []
    batches = (batch for batch in [a, (a, b), [a], {"b": b, "a": a}, {"a": a, "b": None}])
    calibration = calibrate(model, batches, layers, progress=seen.append)
    assert_close(calibration.grams["weight"], 3 * linear_gram(a) + 2 * linear_gram(a + b))
    assert calibration.images == 15 and seen == [3, 6, 9, 12, 15]
    assert set(calibration.seconds) == {"augment", "forward", "gram"}


def test_a_tensor_of_images_is_run_in_parts():
    conv, sizes = nn.Conv2d(1, 2, 1), []
    conv.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    x = torch.randn(150, 1, 2, 2)
    calibration = calibrate(conv, x, find_layers(conv)[0])
    assert sizes == [8] * 18 + [6] and calibration.images == 150
    assert_close(calibration.grams["weight"], conv_gram(x, conv))


def state_of(model: nn.Module) -> tuple:
    tensors = {key: value.clone() for key, value in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return tensors, modes, hooks, [id(p) for p in model.parameters()], [id(b) for b in model.buffers()]


def assert_same_state(before: tuple, after: tuple) -> None:
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


class Counting(nn.Module):
    """Changes its buffers on every call, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x.mean()
        self.register_buffer("late", x)
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails):
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fails and bool((x > 1e5).any()):
                raise KeyboardInterrupt
            return x

    first, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
    model = nn.Sequential(first, nn.BatchNorm2d(4), nn.Dropout(), Counting(), Failing(), last)
    model.train()
    model[1].eval()
    before = state_of(model)
    batches = [torch.randn(2, 3, 5, 5), torch.full((1, 3, 5, 5), 1e9)]
    if fails:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, batches, find_layers(model)[0])
    else:
        calibrate(model, batches, find_layers(model)[0])
    assert_same_state(before, state_of(model))
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
    assert model(batches[0]).requires_grad


def test_bad_data_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers, _ = find_layers(model)
    good = torch.randn(2, 4)
    bad = good.clone()
    bad[1, 2] = math.nan
    cases = [
        (ValueError, "empty", []),
        (ValueError, "empty", torch.zeros(0, 4)),
        (ValueError, "batch 1 has NaN", [good, bad]),
        (ValueError, "batch 0 has NaN", [(bad / 0,)]),
        (ValueError, r"batch 1 .*\[2, 3\]", [good, good[:, :3]]),
        (TypeError, "float32 parameters.* batch 0 .*float64", [good.double()]),
        (TypeError, "batch 1 .*str", [good, "x"]),
        (TypeError, "batch 0 contains no tensor", [[3]]),
        (TypeError, "batch 0 .*ndarray", [good.numpy()]),
        (TypeError, "got dict", {"input": good}),
        (TypeError, "got int", 3),
        (ValueError, "number", torch.tensor(3.0)),
        (ValueError, "without dimensions", [torch.tensor(3.0)]),
    ]
    for error, message, batches in cases:
        with pytest.raises(error, match=message):
            calibrate(model, batches, layers)


class Layout(nn.Module):
    """A network that does something with the output of a convolution ``[N, 4, 6, 6]``."""

    def __init__(self, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.does = nn.Conv2d(3, 4, 3), nn.Linear(144, 2), does
        self.contiguous: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.contiguous.append(x.is_contiguous())
        return self.second(self.does(self.first(x)).reshape(len(x), -1))


_library = torch.library.Library("test_calibration", "DEF")
_library.define("double_memory(Tensor x) -> Tensor")
# Reads memory as if it were contiguous, as native code may.
_library.impl("double_memory", lambda x: x.as_strided((x.numel(),), (1,)).clone().view(x.shape) * 2, "CPU")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("does", "layout_free"),
    [
        (torch.relu, True),
        (lambda y: y.view(len(y), -1), False),
        (lambda y: y.as_strided((len(y), 144), (144, 1)), False),
        (torch.ops.test_calibration.double_memory, False),
    ],
    ids=["relu", "view", "as_strided", "of another library"],
)
def test_images_are_in_channels_last_memory_in_bfloat16_where_networks_run_that_way(does, layout_free, precision):
    model = Layout(does).eval()
    batches = [torch.randn(n, 3, 8, 8) for n in (5, 3)]
    found = calibrate(model, batches, find_layers(model)[0], precision=precision)
    in_bfloat16 = [False, False] if layout_free else [False, True, True]
    assert model.contiguous == ([True, True] if precision == "float32" else in_bfloat16)
    assert all(batch.is_contiguous() for batch in batches)
    with torch.no_grad():
        inputs = torch.cat([does(model.first(batch)).reshape(len(batch), -1) for batch in batches])
    expected = linear_gram(inputs)
    tolerance = 1e-5 if precision == "float32" else 0.02
    assert (found.grams["second"] - expected).abs().max() <= tolerance * expected.abs().max()


class OwnAutocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_casts_that_others_made_are_not_taken_for_the_weights(precision):
    """Torch keeps casts for all threads, as long as one of them is in an autocast block."""
    model = (OwnAutocast if precision == "float32" else nn.Sequential)(nn.Linear(4, 8), nn.Linear(8, 2))
    layers, batch = find_layers(model)[0], torch.randn(6, 4)
    alone = calibrate(model, [batch, batch], layers, precision=precision)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)  # whose casts are kept until the end of the outer block
        return batch

    with torch.autocast("cpu", torch.bfloat16):
        run()
        found = calibrate(model, (run() for _ in range(2)), layers, precision=precision)
        with ThreadPoolExecutor(1) as other:
            in_thread = other.submit(calibrate, model, [batch, batch], layers, precision=precision).result()
        assert torch.is_autocast_cache_enabled()
    for name, gram in alone.grams.items():
        assert torch.equal(found.grams[name], gram) and torch.equal(in_thread.grams[name], gram)


@pytest.mark.parametrize("tracked", [False, True])
def test_weights_are_not_copied_for_each_row_in_bfloat16(tracked):
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x, x, need_weights=False)[0]

    model = Attention(8, 2, batch_first=True).eval()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        calibrate(model, torch.randn(3, 5, 8), find_layers(model)[0] if tracked else [], precision="bf16")
    called = {event.key for event in profile.key_averages()}
    assert called & {"aten::mm", "aten::addmm"} and "aten::bmm" not in called


def test_tensors_may_be_nested():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, images: list[Tensor], more: dict[str, list[Tensor]] | None = None) -> list[Tensor]:
            assert type(images) is list
            return [self.linear(image) for image in [*images, *(more or {"images": []})["images"]]]

    images = [torch.randn(n, 3) for n in (4, 5)]
    model, layers = Detector(), find_layers(Detector())[0]
    for batch in ([images], {"images": images}):
        found = calibrate(model, [batch, batch], layers)
        assert found.images == 4
        assert_close(found.grams["linear"], 2 * linear_gram(torch.cat(images)))
    found = calibrate(model, [(images[:1], {"images": images[1:]})], layers)
    assert_close(found.grams["linear"], linear_gram(torch.cat(images)))
    bad = torch.full((2, 3), math.nan)
    with pytest.raises(ValueError, match="batch 0 has NaN"):
        calibrate(model, [[[bad]]], layers)
    with pytest.raises(ValueError, match=r"cannot run batch 0 \(torch.float32 \[2, 4\]\)"):
        calibrate(model, [[[torch.zeros(2, 4)]]], layers)


def test_packed_sequences():
    model = nn.LSTM(3, 4)
    whole = [torch.randn(n, 3) for n in (5, 2)]
    packed = nn.utils.rnn.pack_sequence(whole)
    for batch in ([packed], packed, (packed, None)):
        found = calibrate(model, [batch], find_layers(model)[0])
        assert found.images == 2
        assert_close(found.grams["weight_ih_l0"], linear_gram(torch.cat(whole)))


def test_further_arguments_may_be_numbers_and_infinite_masks():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
            return self.linear((x + mask).softmax(1) * scale)

    model, x = Masked(), torch.rand(5, 3)
    mask, scale = torch.tensor([[0.0, -math.inf, 0.0]]), torch.tensor(2.0)
    found = calibrate(model, [(x, mask, scale)], find_layers(model)[0])
    assert_close(found.grams["linear"], linear_gram(2 * (x + mask).softmax(1)))
    with pytest.raises(ValueError, match="layer 'linear' got NaN, infinite or overflowing inputs"):
        calibrate(model, [(x, mask * 0, scale)], find_layers(model)[0])


def test_layers_with_infinite_inputs_are_named():
    class Explodes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    model = nn.Sequential(nn.Conv2d(1, 1, 1), Explodes(), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"layer '2' got NaN"):
        calibrate(model, torch.ones(2, 1, 3, 3), find_layers(model)[0])


def test_layers_by_pattern():
    body = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model = nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3), "body": body})

    def names(patterns):
        return [layer.name for layer in find_layers(model, patterns)[0]]

    assert names(None) == names("*") == ["stem", "body.0", "body.2"]
    assert names(["body.2", "st?m"]) == ["stem", "body.2"] and names("body.[01]") == ["body.0"]
    for error in (KeyError, ValueError, UnknownLayerError):
        with pytest.raises(error, match=r"^layer name 'body.3' matches no layer of the model; did you mean 'body.2'"):
            names(["stem", "body.3"])
    with pytest.raises(UnknownLayerError, match=r"^layer pattern 'head\*' matches no layer"):
        names("head*")
    with pytest.raises(UnknownLayerError, match=r"^layer name 'body' .* did you mean 'body\.\*'"):
        names("body")
    with pytest.raises(TypeError, match=r"3"):
        names([3])
    with pytest.raises(ValueError, match=r"empty"):
        names([])


def test_unsupported_weights():
    with pytest.raises(ValueError, match=r"'0' is not initialised"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"'0' is not initialised"):
        find_layers(nn.Sequential(nn.LazyConv3d(3, 1)))
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    layers, dense = find_layers(model)
    assert [layer.name for layer in layers] == ["0"]
    assert list(dense) == ["1"] and "complex64" in dense["1"].reason
    assert find_layers(model, ["0"])[1] == {}


@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    channels=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_matrix_and_restore(groups, rows, channels, kernel):
    conv = nn.Conv2d(groups * channels, groups * rows, kernel, groups=groups)
    (layer,), _ = find_layers(conv)
    weight = torch.randn(layer.shape)
    matrix = layer.matrix(weight)
    assert matrix.shape == (groups, rows, layer.columns)
    assert torch.equal(layer.restore(matrix), weight)
    natural = weight.reshape(groups, rows, layer.columns)
    assert torch.equal(matrix[..., layer.natural_order()], natural)
    y, x, c = kernel[0] - 1, kernel[1] // 2, channels - 1
    assert torch.equal(matrix[..., (y * kernel[1] + x) * channels + c].flatten(), weight[:, c, y, x])


def test_nothing_is_printed_or_logged(caplog, capsys):
    with caplog.at_level(logging.DEBUG, logger="spade_fast"):
        grams_of(nn.Linear(3, 2), torch.randn(4, 3))
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_out_of_memory_keeps_its_type():
    """The batch is not at fault: a caller may try again with less at a time."""

    class Greedy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.empty(2**50)

    model = Greedy(3, 2)
    with pytest.raises((RuntimeError, MemoryError)) as caught:  # as the allocator says it
        trace(model, torch.randn(5, 3), sparsity=0.5)
    assert not isinstance(caught.value, UserError) and is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))
