"""`Trace`, the pruned weights of one sample: applying them to the model, summaries, and the file format."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError, MissingFileError, TraceAppliedError, UnknownLayerError
from spade_fast._util.files import is_file, read_bytes, write_whole
from spade_fast._util.hashes import hash_tensors
from spade_fast._util.ranges import stage
from spade_fast._util.safetensors_file import safetensors_file, safetensors_metadata
from spade_fast.pruning.layers import Layer
from spade_fast.pruning.module_kinds import named_parameters
from spade_fast.pruning.solve import LayerReport

_FORMAT = "spade_fast.trace"
_FORMAT_VERSION = 1

# Ids of the parameters whose weights are currently swapped.
_swapped: set[int] = set()
_swapped_lock = threading.Lock()


@dataclass(frozen=True)
class PrunedLayer:
    """The surviving weights of one layer.

    Attributes
    ----------
    name, parameter
        Names of the layer and of its parameter in the model.
    shape, dtype
        Shape and dtype of the parameter.
    mask : Tensor ``[ceil(numel / 8)]``, uint8
        One bit per weight, 1 where it survives; the first weight is in the highest bit.
    values : Tensor ``[survivors]``
        Surviving weights in row-major order.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mask: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, layer: Layer, weight: Tensor) -> PrunedLayer:
        """Pack a weight of the parameter's shape; its zeros are the removed weights."""
        weight = weight.detach().flatten()
        survives = weight != 0
        bits = F.pad(survives, (0, -survives.numel() % 8)).unflatten(0, (-1, 8))
        mask = (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=weight.device)).sum(1, dtype=torch.uint8)
        return cls(layer.name, layer.parameter, layer.shape, weight.dtype, mask.cpu(), weight[survives].cpu())

    @classmethod
    def from_solution(cls, layer: Layer, solution: Tensor, dtype: torch.dtype) -> PrunedLayer:
        """Pack a weight ``[G, R, C]`` in solver order."""
        return cls.from_dense(layer, layer.restore(solution).to(dtype))

    @property
    def numel(self) -> int:
        """Number of weights, including removed ones."""
        return int(np.prod(self.shape))

    def survivors(self) -> Tensor:
        """Return a boolean tensor of the parameter's shape, True where the weight survives."""
        bits = np.unpackbits(self.mask.numpy(), count=self.numel)
        return torch.from_numpy(bits).bool().reshape(self.shape)

    def dense(self) -> Tensor:
        """Return the pruned weight in the parameter's shape."""
        weight = torch.zeros(self.shape, dtype=self.dtype)
        weight[self.survivors()] = self.values
        return weight


class Trace:
    """The pruned network of one sample, stored as the weights in which it differs from the dense network.

    Made by :func:`spade_fast.trace` and :func:`spade_fast.trace_batch`.

    Attributes
    ----------
    reports : list of LayerReport
        One per requested layer, and per other requested weight that stays dense, with a note that says why.
    header : dict
        ``sample_id``, ``settings`` (the fields of :class:`PruneConfig`), ``images``, ``passes``, ``seconds`` (by
        stage), ``library_version``, ``weights`` (the hash of each parameter of the dense model) and ``network_weights``
        (the number of weights of the whole network: the elements of all parameters of two or more dimensions).

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace
    >>> model = torch.nn.Linear(8, 4)
    >>> sample_trace = trace(model, torch.randn(64, 8), sparsity=0.5)
    >>> sample_trace
    Trace(sample_id='0', 1 layers, sparsity=0.5000)
    >>> with sample_trace.applied(model):
    ...     int((model.weight == 0).sum())
    16
    """

    def __init__(
        self, pruned: Sequence[PrunedLayer], reports: Sequence[LayerReport], header: Mapping[str, Any]
    ) -> None:
        self._pruned = {layer.name: layer for layer in pruned}
        self.reports = list(reports)
        self.header = dict(header)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the pruned layers."""
        return tuple(self._pruned)

    @property
    def sample_id(self) -> str:
        """Name of the sample."""
        return str(self.header["sample_id"])

    @property
    def model_hash(self) -> str:
        """Hash of the names, shapes, dtypes and values of all parameters of the dense model."""
        return hashlib.sha256(json.dumps(self.header["weights"], sort_keys=True).encode()).hexdigest()

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the pruned layers; 0 if there are none."""
        total = sum(layer.numel for layer in self._pruned.values())
        return 1 - sum(layer.values.numel() for layer in self._pruned.values()) / total if total else 0.0

    @property
    def network_sparsity(self) -> float:
        """Share of the whole network's weights that are zeros in the pruned layers.

        The network's weights are the elements of all its parameters of two or more dimensions, whether they can be
        pruned or not; biases and the scales of batch norms do not count.
        """
        zeros = sum(layer.numel - layer.values.numel() for layer in self._pruned.values())
        return zeros / self.header["network_weights"] if zeros else 0.0

    def mask(self, name: str) -> Tensor:
        """Return where a layer's weights survive, as a boolean tensor of the parameter's shape.

        Raises
        ------
        UnknownLayerError
            The trace does not prune a layer of this name (also a KeyError).
        """
        return self._layer(name).survivors()

    def weight(self, name: str) -> Tensor:
        """Return a layer's pruned weight as a dense tensor of the parameter's shape on the CPU.

        Raises
        ------
        UnknownLayerError
            The trace does not prune a layer of this name (also a KeyError).
        """
        return self._layer(name).dense()

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Apply the trace's weights to the model during a ``with`` block.

        Weights are swapped in place (the parameters stay the same objects) and restored bit for bit at the end, also
        after an exception. Traces can be applied to several models at the same time.

        Raises
        ------
        ValueError
            The trace was made from a model with different weights.
        TraceAppliedError
            A trace is already applied to the model (also a RuntimeError).
        """
        with weights_applied(model, self._pruned.values(), self._check_model):
            yield model

    def summary(self) -> str:
        """Return a text table with one line per layer, below the sparsity of the pruned layers and of the network."""
        titles = (
            "layer",
            "shape",
            "reached",
            "requested",
            "damping",
            "dead",
            "error",
            "predicted error",
            "seconds",
            "note",
        )
        rows = [titles] + [
            (
                report.name,
                "x".join(map(str, report.shape)),
                f"{report.reached:.4f}",
                f"{report.sparsity:.4f}",
                f"{report.damping:g}" + (f" ({report.retries} retries)" if report.retries else ""),
                str(report.dead_columns),
                f"{report.measured_error:.4f}",
                f"{report.predicted_error:.4f}",
                f"{report.seconds:.3f}",
                report.note,
            )
            for report in self.reports
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        shares = f"{self.sparsity:.2%} of the pruned layers, {self.network_sparsity:.2%} of the whole network"
        return "\n".join([f"{self!r}: {shares}", *lines])

    def __repr__(self) -> str:
        return f"Trace(sample_id={self.sample_id!r}, {len(self._pruned)} layers, sparsity={self.sparsity:.4f})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: a bit mask and the surviving values of each pruned layer, and the header.

        The file appears only when it is complete; until then an existing file of that name is kept.

        Raises
        ------
        OSError
            The file cannot be written (FileNotFoundError: its folder does not exist).
        """
        path = Path(path)
        tensors = _to_tensors(self._pruned.values())
        layers = [
            {"name": p.name, "parameter": p.parameter, "shape": p.shape, "dtype": str(p.dtype).removeprefix("torch.")}
            for p in self._pruned.values()
        ]
        header = {
            "layers": layers,
            "reports": [asdict(report) for report in self.reports],
            "header": self.header,
            "model_hash": self.model_hash,
            "content_hash": _content_hash(tensors),
        }
        metadata = {"format": _FORMAT, "format_version": str(_FORMAT_VERSION), "trace": json.dumps(header)}
        write_whole(path, safetensors_file(tensors, metadata), "the trace")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a file that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        ValueError
            The file is not a trace, is truncated or modified, or has another format version.
        """
        path = Path(path)
        if not is_file(path):
            raise MissingFileError(f"no such trace file: {path}")
        return cls.from_bytes(read_bytes(path), str(path))

    @classmethod
    def from_bytes(cls, contents: bytes, path: str = "this") -> Trace:
        """Read the contents of a file that :meth:`save` wrote.

        Errors are those of :meth:`load`; their messages call the file `path`.
        """
        try:
            tensors = from_safetensors(contents)
            metadata = safetensors_metadata(BytesIO(contents), len(contents))
        except (SafetensorError, ValueError) as error:
            raise InvalidValueError(f"{path} is not a trace file, or is truncated: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise InvalidValueError(f"{path} is a safetensors file, but does not contain a trace")
        version = metadata.get("format_version")
        if version != str(_FORMAT_VERSION):
            raise InvalidValueError(
                f"{path} is a trace of format version {version}; this version reads {_FORMAT_VERSION}"
            )
        try:
            stored = json.loads(metadata["trace"])
            reports = [LayerReport(**{**report, "shape": tuple(report["shape"])}) for report in stored["reports"]]
            pruned = [_from_tensors(entry, tensors) for entry in stored["layers"]]
            trace = cls(pruned, reports, stored["header"])
            if len(tensors) != 2 * len(pruned):
                raise InvalidValueError("it contains tensors other than those of its layers")
            if stored["content_hash"] != _content_hash(tensors) or stored["model_hash"] != trace.model_hash:
                raise InvalidValueError("its contents do not match their hash")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidValueError(f"{path} is a damaged trace file: {error}") from error
        return trace

    def _layer(self, name: str) -> PrunedLayer:
        if name not in self._pruned:
            raise UnknownLayerError(
                f"layer {name!r} is not pruned in this trace; the pruned layers are: {', '.join(self._pruned)}"
            )
        return self._pruned[name]

    def _check_model(self, model: nn.Module) -> None:
        expected, given = self.header["weights"], hash_tensors(named_parameters(model))
        for name in [*expected, *given]:
            if expected.get(name) != given.get(name):
                states = [weights.get(name, "missing").split(":")[0] for weights in (expected, given)]
                difference = (
                    f"{states[0]} in the trace, {states[1]} in the model" if states[0] != states[1] else "its values"
                )
                raise InvalidValueError(
                    f"this trace (sample {self.sample_id!r}) was not made from the given "
                    f"{type(model).__name__}: parameter {name!r} differs first ({difference})"
                )


@contextmanager
def weights_applied(
    model: nn.Module, pruned: Iterable[PrunedLayer], check: Callable[[nn.Module], None] = lambda model: None
) -> Iterator[None]:
    """Swap weights in place during a ``with`` block, after a `check`; see :meth:`Trace.applied`."""
    parameters = dict(named_parameters(model, remove_duplicate=False))
    targets = [(layer, parameters[layer.parameter]) for layer in pruned if layer.parameter in parameters]
    with _reserved([parameter for _, parameter in targets]):
        with stage("apply"):
            check(model)
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            with stage("apply"), torch.no_grad():
                for layer, parameter in targets:
                    originals.append((parameter, parameter.detach().clone()))
                    parameter.copy_(layer.dense())
            yield
        finally:
            with stage("apply"), torch.no_grad():
                for parameter, original in originals:
                    parameter.copy_(original)


@contextmanager
def _reserved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Mark parameters as swapped during a ``with`` block, or raise TraceAppliedError if one already is."""
    keys = {id(parameter) for parameter in parameters}
    with _swapped_lock:
        if keys & _swapped:
            raise TraceAppliedError("a trace is already applied to this model; leave its `with` block first")
        _swapped.update(keys)
    try:
        yield
    finally:
        with _swapped_lock:
            _swapped.difference_update(keys)


def _to_tensors(pruned: Iterable[PrunedLayer]) -> dict[str, Tensor]:
    tensors = {}
    for layer in pruned:
        tensors[f"{layer.name}.mask"], tensors[f"{layer.name}.values"] = layer.mask, layer.values
    return tensors


def _from_tensors(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrunedLayer:
    name, shape, dtype = str(entry["name"]), tuple(map(int, entry["shape"])), getattr(torch, entry["dtype"])
    mask, values = tensors[f"{name}.mask"], tensors[f"{name}.values"]
    layer = PrunedLayer(name, str(entry["parameter"]), shape, dtype, mask, values)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != ((layer.numel + 7) // 8,):
        raise InvalidValueError(f"the mask of layer {name!r} does not match its shape {list(shape)}")
    if values.dtype != dtype or values.dim() != 1 or int(np.unpackbits(mask.numpy()).sum()) != values.numel():
        raise InvalidValueError(f"the values of layer {name!r} do not match its mask")
    return layer


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
