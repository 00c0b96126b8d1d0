"""The file format of traces: a safetensors file with the mask and values of each layer, and the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from io import BytesIO
from typing import IO, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from spade_fast._util.checks import is_number
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.safetensors_file import (
    intact_metadata,
    intact_tensors,
    safetensors_file,
    safetensors_header,
)
from spade_fast._util.strict_json import parse_json
from spade_fast.pruning.auto_sparsity import AutoSparsity
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.solve import LayerReport

_FORMAT = "spade_fast.trace"
_FORMAT_VERSION = "2"


class TraceContents(NamedTuple):
    """What a trace consists of: the arguments of `spade_fast.pruning.traces.Trace`."""

    pruned: list[PrunedLayer]
    reports: list[LayerReport]
    header: dict[str, Any]


def trace_file(pruned: Sequence[PrunedLayer], reports: Sequence[LayerReport], header: Mapping[str, Any]) -> bytes:
    """Return the bytes of a trace's file."""
    layers = [
        {"name": p.name, "parameter": p.parameter, "shape": p.shape, "dtype": str(p.dtype).removeprefix("torch.")}
        for p in pruned
    ]
    stored = {"layers": layers, "reports": [asdict(report) for report in reports], "header": dict(header)}
    metadata = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "trace": json.dumps(stored)}
    tensors = {}
    for layer in pruned:
        tensors[f"{layer.name}.mask"], tensors[f"{layer.name}.values"] = layer.mask, layer.values
    return safetensors_file(tensors, metadata)


def read_trace(contents: bytes, path: str) -> TraceContents:
    """Return what is in a trace's file; raise ValueError, which names it as `path`, unless it is as it was written."""
    metadata = _metadata(BytesIO(contents), len(contents), path)
    try:
        stored = _stored(metadata)
        tensors = intact_tensors(contents, metadata)
        pruned = [_layer(entry, tensors) for entry in stored["layers"]]
        if len(tensors) != 2 * len(pruned):
            raise InvalidValueError("it contains tensors other than those of its layers")
        return TraceContents(pruned, [_report(entry) for entry in stored["reports"]], stored["header"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InvalidValueError(f"{path} is a damaged trace file: {error}") from error


def read_stored(file: IO[bytes], size: int) -> dict[str, Any]:
    """Return entries ``layers``, ``reports`` and ``header`` of a trace's file without its tensors; ValueError as above.

    The tensors are not compared with their hash, but the size of the file is checked.
    """
    metadata = _metadata(file, size, "this")
    try:
        return _stored(metadata)
    except (KeyError, TypeError) as error:
        raise InvalidValueError(f"it is damaged: {error}") from error


def _metadata(file: IO[bytes], size: int, path: str) -> dict[str, str]:
    try:
        header = safetensors_header(file, size)
    except ValueError as error:
        raise InvalidValueError(f"{path} is not a trace file, or is truncated: {error}") from error
    metadata = header["__metadata__"]
    if metadata.get("format") != _FORMAT:
        raise InvalidValueError(f"{path} is a safetensors file, but does not contain a trace")
    version = metadata.get("format_version")
    if version != _FORMAT_VERSION:
        raise InvalidValueError(f"{path} is a trace of format version {version}; this version reads {_FORMAT_VERSION}")
    try:
        return intact_metadata(header)
    except ValueError as error:
        raise InvalidValueError(f"{path} is a damaged trace file: {error}") from error


def _stored(metadata: Mapping[str, str]) -> dict[str, Any]:
    stored: dict[str, Any] = parse_json(metadata["trace"], finite=False)
    header = stored["header"]
    if not isinstance(header["sample_id"], str) or not isinstance(header["settings"], dict):
        raise InvalidValueError("its sample or its settings are missing")
    if not all(isinstance(text, str) for text in header["weights"].values()):
        raise InvalidValueError("its hashes of weights are not text")
    if not _is(int, header["network_weights"]) or header["network_weights"] < 0:
        raise InvalidValueError(f"its network has {header['network_weights']!r} weights")
    if header.get("decision") is not None:
        Decision.from_entries(header["decision"])
    if header.get("auto") is not None:
        AutoSparsity.from_entries(header["auto"])
    if not isinstance(header.get("target"), str | None):
        raise InvalidValueError(f"its target is {header['target']!r}, not a name")
    if not isinstance(stored["layers"], list) or not isinstance(stored["reports"], list):
        raise InvalidValueError("its layers or reports are missing")
    return stored


def _layer(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrunedLayer:
    name, parameter, shape = entry["name"], entry["parameter"], entry["shape"]
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(name, str) or not isinstance(parameter, str) or not isinstance(dtype, torch.dtype):
        raise InvalidValueError(f"layer {name!r} has no parameter or no dtype")
    if not _is(tuple[int, ...], shape):
        raise InvalidValueError(f"layer {name!r} has shape {shape}")
    return PrunedLayer(name, parameter, tuple(shape), dtype, tensors[f"{name}.mask"], tensors[f"{name}.values"])


def _report(entry: Mapping[str, Any]) -> LayerReport:
    hints = get_type_hints(LayerReport)
    for field in fields(LayerReport):
        if not _is(hints[field.name], entry[field.name]):
            raise InvalidValueError(f"a report has {field.name} {entry[field.name]!r}")
    return LayerReport(**{**entry, "shape": tuple(entry["shape"])})


def _is(hint: Any, value: Any) -> bool:
    """Whether a value from a file has the type of a report's field."""
    if hint == tuple[int, ...]:
        return isinstance(value, list) and all(_is(int, size) for size in value)
    if hint is float:
        return is_number(value)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
