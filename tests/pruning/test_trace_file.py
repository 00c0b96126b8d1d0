"""The file of a trace: whatever is changed in it is found, before anything of it is used."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from spade_fast import InvalidValueError
from spade_fast._util.safetensors_file import safetensors_file
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


@pytest.fixture
def made(model: nn.Sequential) -> Trace:
    return trace(model, torch.randn(40, 6), sparsity=0.5, layers=["0", "2"], sample_id="cat")


def assert_same(one: Trace, other: Trace) -> None:
    assert one.layers == other.layers and one.reports == other.reports and one.header == other.header
    assert all(torch.equal(one.weight(name), other.weight(name)) for name in one.layers)


def test_missing_and_foreign_files(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such trace file: .*gone"):
        Trace.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no such trace file"):
        Trace.load(tmp_path)
    text = tmp_path / "text"
    for contents in (b"", b"hello", b"{}" * 50, os.urandom(300)):
        text.write_bytes(contents)
        with pytest.raises(ValueError, match=r"text is not a trace file"):
            Trace.load(text)
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"weights is a safetensors file, but does not contain a trace"):
        Trace.load(tmp_path / "weights")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_files(made, tmp_path, share):
    made.save(tmp_path / "t")
    contents = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(contents[: int(share * len(contents))])
    with pytest.raises(ValueError, match=r"not a trace file, or is truncated"):
        Trace.load(tmp_path / "t")


def rewrite(made: Trace, path: Path, change, signed: bool) -> None:
    """Save a trace with changed tensors or metadata; `signed`: as a program would that knows how files are hashed."""
    made.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = json.loads(metadata.pop("trace"))
    changed = change(tensors, stored, metadata)
    metadata["trace"] = changed if isinstance(changed, str) else json.dumps(stored)
    if signed:
        del metadata["header_hash"]
        path.write_bytes(safetensors_file(tensors, metadata))
    else:
        save_file(tensors, path, metadata)


def flip_bit(tensors, stored, metadata):
    tensors["2.mask"][0] ^= 128


def flip_two_bits(tensors, stored, metadata):
    byte = int(tensors["2.mask"][1])
    high, low = (next(i for i in range(8) if (byte >> i & 1) == want) for want in (0, 1))
    tensors["2.mask"][1] = byte ^ (1 << high) ^ (1 << low)


def drop_value(tensors, stored, metadata):
    tensors["2.values"] = tensors["2.values"][:-1].clone()


def change_value(tensors, stored, metadata):
    tensors["2.values"][4] += 1


def drop_layer(tensors, stored, metadata):
    del tensors["0.mask"]


def add_tensor(tensors, stored, metadata):
    tensors["extra"] = torch.zeros(2)


def change_shape(tensors, stored, metadata):
    stored["layers"][0]["shape"] = [8, 60]


def change_dtype(tensors, stored, metadata):
    stored["layers"][0]["dtype"] = "float64"


def unknown_dtype(tensors, stored, metadata):
    stored["layers"][0]["dtype"] = "load"


def change_hash(tensors, stored, metadata):
    stored["header"]["weights"]["0.weight"] = "float32[1]:00"


def drop_key(tensors, stored, metadata):
    del stored["reports"]


def odd_report(tensors, stored, metadata):
    stored["reports"][0]["extra"] = 1


def no_header(tensors, stored, metadata):
    stored["header"] = None


def flip_two_bits_to_padding(tensors, stored, metadata):
    """A bit behind the last weight."""
    for name in ("0", "2"):
        tensors[f"{name}.mask"] = torch.cat([tensors[f"{name}.mask"], torch.zeros(1, dtype=torch.uint8)])
        stored["layers"][("0", "2").index(name)]["shape"] = [tensors[f"{name}.mask"].numel() * 8 - 7]
    mask = tensors["2.mask"]
    mask[-1] = 1
    first = int(mask[0])
    mask[0] = first & (first - 1)


def other_parameter(tensors, stored, metadata):
    stored["layers"][0]["parameter"] = "2.weight"


def other_report(tensors, stored, metadata):
    stored["reports"][0]["measured_error"] += 0.5


def other_sample(tensors, stored, metadata):
    stored["header"]["sample_id"] = "dog"


def same_layer_twice(tensors, stored, metadata):
    stored["layers"].append(stored["layers"][0])


def infinite_shape(tensors, stored, metadata):
    stored["layers"][0]["shape"] = [float("inf")]


def huge_shape(tensors, stored, metadata):
    stored["layers"][0]["shape"] = [2**40, 2**41]


def negative_shape(tensors, stored, metadata):
    stored["layers"][0]["shape"] = [-8, -6]


def shape_as_text(tensors, stored, metadata):
    stored["layers"][0]["shape"] = "86"


def report_of_wrong_types(tensors, stored, metadata):
    stored["reports"][0]["removed"] = "many"


def sample_without_name(tensors, stored, metadata):
    stored["header"]["sample_id"] = None


def weights_of_wrong_types(tensors, stored, metadata):
    stored["header"]["weights"]["0.weight"] = 7


def network_without_weights(tensors, stored, metadata):
    del stored["header"]["network_weights"]


def network_with_odd_weights(tensors, stored, metadata):
    stored["header"]["network_weights"] = "many"


def network_with_negative_weights(tensors, stored, metadata):
    stored["header"]["network_weights"] = -1


def target_without_name(tensors, stored, metadata):
    stored["header"]["target"] = 3


def list_instead(tensors, stored, metadata):
    return "[]"


def deep(tensors, stored, metadata):
    return "[" * 100_000


def deep_in_the_header(tensors, stored, metadata):
    stored["header"]["more"] = json.loads("[" * 500 + "]" * 500)


def key_twice(tensors, stored, metadata):
    text = json.dumps(stored)
    return text[:-1] + ', "reports": []}'


def long_number(tensors, stored, metadata):
    return '{"layers": ' + "9" * 10_000 + "}"


STRUCTURE = [
    flip_bit, flip_two_bits_to_padding, drop_value, drop_layer, add_tensor, change_shape, change_dtype, unknown_dtype,
    drop_key, odd_report, no_header, same_layer_twice, infinite_shape, huge_shape, negative_shape, shape_as_text,
    report_of_wrong_types, sample_without_name, weights_of_wrong_types, network_without_weights,
    network_with_odd_weights, network_with_negative_weights, target_without_name, list_instead, deep,
    deep_in_the_header, key_twice, long_number,
]  # fmt: skip
VALUES = [flip_two_bits, change_value, change_hash, other_parameter, other_report, other_sample]


@pytest.mark.parametrize("change", [*STRUCTURE, *VALUES])
def test_changed_files(made, tmp_path, change):
    rewrite(made, tmp_path / "t", change, signed=False)
    with pytest.raises(InvalidValueError, match=r"t is a damaged trace file: its (header|tensors) do(es)? not match"):
        Trace.load(tmp_path / "t")


@pytest.mark.parametrize("change", STRUCTURE)
def test_files_with_a_right_hash_that_make_no_sense(made, tmp_path, change):
    rewrite(made, tmp_path / "t", lambda *parts: None, signed=True)
    assert_same(made, Trace.load(tmp_path / "t"))
    rewrite(made, tmp_path / "t", change, signed=True)
    with pytest.raises(InvalidValueError, match=r"t is a damaged trace file"):
        Trace.load(tmp_path / "t")


@pytest.mark.parametrize("version", ["1", "3", ""])
def test_other_format_versions(made, tmp_path, version):
    rewrite(made, tmp_path / "t", lambda tensors, stored, metadata: metadata.update(format_version=version), False)
    with pytest.raises(ValueError, match=rf"format version {version}; this version reads 2"):
        Trace.load(tmp_path / "t")


def test_any_flipped_bit_is_found(made, tmp_path):
    made.save(tmp_path / "t")
    contents = (tmp_path / "t").read_bytes()
    (header_size,) = struct.unpack("<Q", contents[:8])
    for position in range(len(contents)):
        damaged = bytearray(contents)
        damaged[position] ^= 1 << position % 8
        try:
            found = Trace.from_bytes(bytes(damaged))
        except InvalidValueError:
            continue
        assert position < 8 + header_size, "only what JSON may contain without a meaning, such as another space"
        assert_same(made, found)


def test_the_parameter_of_a_layer_with_the_same_shape(made, model, tmp_path):
    """One bit makes another layer's name of it."""
    made = trace(model, torch.randn(40, 6), sparsity=0.5, layers=["2"])
    made.save(tmp_path / "t")
    contents = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(contents.replace(b'2.weight\\", \\"shape', b'4.weight\\", \\"shape'))
    assert (tmp_path / "t").read_bytes() != contents
    with pytest.raises(InvalidValueError, match="does not match its hash"):
        Trace.load(tmp_path / "t")


def test_reports_that_are_not_finite_are_kept(made, tmp_path):
    made.reports[0] = replace(made.reports[0], predicted_error=float("inf"))
    made.save(tmp_path / "t")
    assert_same(made, Trace.load(tmp_path / "t"))


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "/dev/full"])
def test_pipes_and_devices(made, tmp_path, place):
    path = tmp_path / place
    if place == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match="cannot be read: Not a regular file"):
        Trace.load(path)
    with pytest.raises(OSError, match=r"cannot write the trace: .* is a pipe, a socket or a device"):
        made.save(path)
    assert not path.is_file() and path.exists()
