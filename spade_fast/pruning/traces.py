"""`Trace`, the pruned weights of one sample: applying them to the model, summaries, and the file format."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spade_fast._util.errors import InvalidValueError, MissingFileError, UnknownLayerError
from spade_fast._util.files import is_file, read_bytes, write_whole
from spade_fast._util.hashes import hash_tensors
from spade_fast._util.modes import evaluation_mode
from spade_fast.pruning.auto_sparsity import AutoSparsity
from spade_fast.pruning.decision import Decision, predict
from spade_fast.pruning.exchange import WeightsApplied
from spade_fast.pruning.module_kinds import named_parameters
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.solve import LayerReport
from spade_fast.pruning.trace_file import read_trace, trace_file


class Trace:
    """The pruned network of one sample, stored as the weights in which it differs from the dense network.

    Made by :func:`spade_fast.trace` and :func:`spade_fast.trace_batch`.

    Attributes
    ----------
    reports : list of LayerReport
        One per requested layer, and per other requested weight that stays dense, with a note that says why.
    header : dict
        ``sample_id``, ``settings`` (the fields of :class:`PruneConfig`), ``images``, ``passes``, ``seconds`` (by
        stage; all traces that come from one calibration have its seconds), ``library_version``, ``weights`` (the hash
        of each parameter of the dense model) and ``network_weights`` (the number of weights of the whole network: the
        elements of all parameters of two or more dimensions). Also ``decision``, once it is recorded, and ``auto`` and
        ``target``, what automatic sparsity found and kept.

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
        if len(self._pruned) != len(pruned):
            raise InvalidValueError("two layers of the trace have the same name")
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

    @property
    def decision(self) -> Decision | None:
        """What the dense network and the trace predict for the sample, or None if that was not recorded.

        `spade_fast.trace` records it if it is given the sample as `inputs`; `Spade`, the commands and
        :meth:`record_decision` do too.
        """
        entries = self.header.get("decision")
        return None if entries is None else Decision.from_entries(entries)

    @decision.setter
    def decision(self, decision: Decision) -> None:
        self.header["decision"] = asdict(decision)

    @property
    def auto(self) -> AutoSparsity | None:
        """How automatic sparsity found the sparsities of the layers, or None if they were given."""
        entries = self.header.get("auto")
        return None if entries is None else AutoSparsity.from_entries(entries)

    @property
    def target(self) -> str | None:
        """Name of what automatic sparsity kept, such as ``"class 3"``; None if the sparsities were given."""
        name = self.header.get("target")
        return None if name is None else str(name)

    def record_decision(self, model: nn.Module, *inputs: Any, **named_inputs: Any) -> Decision:
        """Run a model on the trace's sample, dense and with the trace applied, and record what both predict.

        Parameters
        ----------
        model : nn.Module
            The model of the trace. It runs in evaluation mode without gradients, each time with the same random
            numbers.
        *inputs, **named_inputs
            Its inputs for the sample, such as an image ``[1, C, H, W]``.

        Returns
        -------
        Decision

        Raises
        ------
        ValueError
            The model does not return finite logits ``[1, classes]`` of two or more classes.
        UserError
            As in :meth:`applied`.

        Examples
        --------
        >>> import torch
        >>> from spade_fast import trace
        >>> model, sample = torch.nn.Linear(8, 4), torch.randn(1, 8)
        >>> sample_trace = trace(model, sample + 0.1 * torch.randn(64, 8), sparsity=0.25)
        >>> decision = sample_trace.record_decision(model, sample)
        >>> decision == sample_trace.decision
        True
        """
        with torch.no_grad(), evaluation_mode(model):
            dense = predict(model, *inputs, **named_inputs)
            with self.applied(model):
                self.decision = decision = Decision.between(dense, predict(model, *inputs, **named_inputs))
        return decision

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

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Apply the trace's weights to the model during a ``with`` block.

        Weights are swapped in place (the parameters stay the same objects) and restored bit for bit at the end, also
        after an exception. Weights that modules compute from other parameters (`weight_norm` and the like) are held at
        the trace's values instead, and get no gradients; the parameters stay as they are. Signals such as Ctrl-C that
        arrive during the exchange wait for its end. Traces can be applied to several models at the same time.

        Raises
        ------
        ValueError
            The trace was made from a model with different weights; or the model lacks one of its parameters, or has it
            in another shape or dtype, or two of its layers stand for the same weights.
        TraceAppliedError
            A trace is already applied to the model, or the model is being pruned (also a RuntimeError).
        """
        return WeightsApplied(model, self._pruned.values(), self._check_model)

    def summary(self) -> str:
        """Return a text table with one line per layer, below the sparsities, the decision and what was found."""
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
        decision = [] if self.decision is None else [f"decision: {self.decision}"]
        shares = f"{self.sparsity:.2%} of the pruned layers, {self.network_sparsity:.2%} of the whole network"
        kept = "" if self.target is None else f" ({self.target})"
        auto = [] if self.auto is None else [f"automatic sparsity: {self.auto}{kept}"]
        return "\n".join([f"{self!r}: {shares}", *decision, *auto, *lines])

    def __repr__(self) -> str:
        found = "" if self.auto is None else f", keep={self.auto.keep:g}, error={self.auto.error:.3f}"
        lost = "" if self.decision is None or self.decision.kept else ", decision lost"
        facts = f"{len(self._pruned)} layers, sparsity={self.sparsity:.4f}{found}{lost}"
        return f"Trace(sample_id={self.sample_id!r}, {facts})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: a bit mask and the surviving values of each pruned layer, and the header.

        The file appears only when it is complete; until then an existing file of that name is kept.

        Raises
        ------
        OSError
            The file cannot be written (FileNotFoundError: its folder does not exist).
        """
        contents = trace_file(list(self._pruned.values()), self.reports, self.header)
        write_whole(Path(path), contents, "the trace")

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
        return cls(*read_trace(contents, path))

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
