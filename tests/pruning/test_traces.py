"""Applying, restoring, saving and loading traces."""

from __future__ import annotations

import os
import stat
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spade_fast import OutputError
from spade_fast._util.hashes import hash_tensors
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


@pytest.fixture
def made(model: nn.Sequential) -> Trace:
    return trace(model, torch.randn(40, 3, 5, 5), sparsity={"0": 0.5, "3": 0.75}, sample_id="cat", seed=7)


def bits(model: nn.Module) -> list[bytes]:
    return [parameter.detach().contiguous().view(torch.uint8).numpy().tobytes() for parameter in model.parameters()]


def assert_same(one: Trace, other: Trace) -> None:
    assert one.layers == other.layers and one.reports == other.reports and one.header == other.header
    for name in one.layers:
        assert one.weight(name).dtype == other.weight(name).dtype
        assert torch.equal(one.weight(name).view(torch.uint8), other.weight(name).view(torch.uint8))


def test_contents(model, made):
    assert made.layers == ("0", "3") and made.sample_id == "cat" and made.header["settings"]["seed"] == 7
    assert made.header["images"] == 40 and made.header["settings"]["solver"] == "exact"
    assert made.weight("3").shape == model[3].weight.shape
    assert torch.equal(made.mask("3"), made.weight("3") != 0)
    assert int(made.mask("3").sum()) == 45 and int(made.mask("0").sum()) == 54
    assert made.sparsity == 1 - (45 + 54) / (180 + 108)
    assert repr(made) == "Trace(sample_id='cat', 2 layers, sparsity=0.6562)"
    lines = made.summary().splitlines()
    assert len(lines) == 4 and lines[2].startswith("0") and "4x3x3x3" in lines[2] and "0.7500" in lines[3]
    with pytest.raises(KeyError, match=r"layer '1' is not pruned.*0, 3"):
        made.weight("1")
    with pytest.raises(KeyError):
        made.mask("x")


def test_equal_traces_make_equal_files(made, tmp_path):
    for name in ("one", "other"):
        made.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_swapped_and_restored_bit_for_bit(model, made, fails):
    model[0].weight.data[0, 0, 0, 0] = -0.0
    made = trace(model, torch.randn(40, 3, 5, 5), sparsity=0.5)
    before, objects, x = bits(model), [id(p) for p in model.parameters()], torch.randn(2, 3, 5, 5)
    dense = model(x)
    try:
        with made.applied(model) as given:
            assert given is model and [id(p) for p in model.parameters()] == objects
            for name in made.layers:
                assert torch.equal(model[int(name)].weight, made.weight(name))
            assert not torch.allclose(model(x), dense)
            model(x).sum().backward()
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert bits(model) == before and torch.equal(model(x), dense)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with made.applied(model):  # and again
        pass
    assert bits(model) == before


def test_channels_last_weights_keep_their_layout(model):
    model = model.to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    made = trace(model, torch.randn(20, 3, 5, 5), sparsity=0.5)
    with made.applied(model):
        assert model[0].weight.stride() == strides and torch.equal(model[0].weight, made.weight("0"))
    assert model[0].weight.stride() == strides
    with made.applied(model.to(memory_format=torch.contiguous_format)):
        assert torch.equal(model[0].weight, made.weight("0"))


def test_changes_within_the_block_are_undone(model, made):
    before = bits(model)
    with made.applied(model), torch.no_grad():
        model[3].weight.fill_(3)
    assert bits(model) == before


def test_nested_and_simultaneous_application(model, made):
    twin = small_model()
    before = bits(model)
    with made.applied(model):
        with pytest.raises(RuntimeError, match=r"already applied to this model"), made.applied(model):
            raise AssertionError
        with pytest.raises(RuntimeError, match=r"already"), made.applied(nn.Sequential(*model)):
            raise AssertionError
        assert torch.equal(model[3].weight, made.weight("3"))
        with made.applied(twin):
            assert torch.equal(twin[3].weight, made.weight("3"))
        assert torch.equal(model[3].weight, made.weight("3")) and bits(twin) == before
    assert bits(model) == before


def test_foreign_models_are_refused(model, made):
    def refused(other: nn.Module, message: str) -> None:
        before = bits(other)
        with pytest.raises(ValueError, match=message), made.applied(other):
            raise AssertionError
        assert bits(other) == before

    refused(small_model(1), r"sample 'cat'.*Sequential: parameter '0.weight' differs first \(its values\)")
    refused(nn.Sequential(model), "'0.weight' differs first .float32.4, 3, 3, 3. in the trace, missing in the model")
    refused(model[:1], "'3.weight'")
    refused(small_model().double(), "float32.*in the trace, float64.*in the model")
    longer = small_model().append(nn.Linear(2, 2))
    refused(longer, "'4.weight' differs first .missing in the trace")
    changed = small_model()
    with torch.no_grad():
        changed[3].bias[2] += 1
    refused(changed, "'3.bias'")
    with made.applied(model):
        pass


def test_hash_is_of_values_not_of_layout(model):
    assert hash_tensors(model.named_parameters()) == hash_tensors(
        small_model().to(memory_format=torch.channels_last).named_parameters()
    )
    assert set(hash_tensors(model.named_parameters())) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert hash_tensors(model.named_parameters())["0.weight"].startswith("float32[4, 3, 3, 3]:")
    assert hash_tensors(small_model().to(torch.bfloat16).named_parameters())["0.weight"].startswith("bfloat16")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    keep=st.floats(0, 1),
)
def test_packing(shape, dtype, keep):
    linear = nn.Linear(shape[1], shape[0]).to(dtype)
    weight = torch.where(torch.rand(shape) < keep, linear.weight.detach(), 0)
    packed = PrunedLayer.from_dense(find_layers(linear)[0][0], weight)
    assert packed.mask.numel() == (weight.numel() + 7) // 8 and packed.values.numel() == int((weight != 0).sum())
    assert torch.equal(packed.dense(), weight) and packed.dense().dtype == dtype
    assert torch.equal(packed.survivors(), weight != 0)


def test_save_and_load(made, model, tmp_path):
    path = tmp_path / "cat.safetensors"
    made.save(path)
    loaded = Trace.load(str(path))
    assert_same(made, loaded)
    assert loaded.model_hash == made.model_hash
    with loaded.applied(model):
        assert torch.equal(model[3].weight, made.weight("3"))
    assert os.listdir(tmp_path) == ["cat.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    # A trace is far smaller than the weights that it stands for.
    assert sum(report.removed for report in made.reports) == 54 + 135


def test_half_precision_round_trip(tmp_path):
    model = small_model().to(torch.bfloat16)
    made = trace(model, torch.randn(30, 3, 5, 5).to(torch.bfloat16), sparsity=0.5, solver="sparsegpt")
    made.save(tmp_path / "t")
    assert_same(made, Trace.load(tmp_path / "t"))


def test_saving_replaces_whole_files_only(made, tmp_path, monkeypatch):
    path = tmp_path / "trace"
    path.write_bytes(b"older")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write the trace: No space left.*trace'$"):
        made.save(path)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["trace"]
    monkeypatch.undo()
    made.save(path)
    assert_same(made, Trace.load(path))


def test_unwritable_places(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such/trace"):
        made.save(tmp_path / "no such" / "trace")
    with pytest.raises(OSError, match=r"cannot write the trace"):
        made.save(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write the trace: Not a directory"):
        made.save(tmp_path / "file" / "trace")


def test_files_are_loaded_without_pickle(made, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    made.save(tmp_path / "t")
    assert_same(made, Trace.load(tmp_path / "t"))


def test_reports_are_values(made):
    report = made.reports[0]
    assert replace(report, seconds=0.0) != replace(report, seconds=1.0)
    with pytest.raises(AttributeError):
        report.damping = 1.0


def test_parameters_shared_by_name(tmp_path):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    made = trace(model, torch.randn(20, 4), sparsity=0.5)
    assert made.layers == ("0",)
    x: Tensor = torch.randn(3, 4)
    with made.applied(model):
        weight = made.weight("0")
        expected = (x @ weight.T + shared.bias).relu() @ weight.T + shared.bias
        assert torch.allclose(model(x), expected, atol=1e-6)
