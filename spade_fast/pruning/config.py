"""The one configuration of a pruning run: what is asked for, checked once, and kept in every result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from spade_fast._util.checks import check_names, integer, is_number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.pruning.layers import match_names

Sparsity = float | Mapping[str, float] | Callable[[str], float]

# The names of the solvers, and those of the methods that use them.
SOLVERS = {"exact": "SPADE", "sparsegpt": "FastSPADE"}
PRECISIONS = ("float32", "bf16")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What to prune and how: the keyword arguments that `trace`, `trace_batch`, `Spade`, `tune` and batches share.

    Attributes
    ----------
    sparsity : float, mapping or function
        Share of each layer's weights to remove, 0 to 1. A mapping goes from layer names or patterns to shares: a layer
        gets that of the first pattern it matches, and 0 if it matches none. A function is given the layer's name. A
        layer with 0 is skipped. None stands for the default of a network
        (:func:`spade_fast.inputs.defaults.fill_defaults`).
    solver : "exact" or "sparsegpt"
        Exact OBS (SPADE) or SparseGPT (FastSPADE).
    layers
        Names or patterns (``*``, ``?``, ``[...]``) of the layers to prune; None for all linear and convolutional ones.
    block
        Neighbouring columns that are removed together (exact OBS, in the order (kh, kw, in-channel)) or whose mask is
        chosen together (SparseGPT, in the order (in-channel, kh, kw)), in all layers. None for the published choice:
        ``kh * kw`` for ordinary convolutions, 1 for linear, 1x1 and depthwise layers. 1 is unstructured.
    damping
        Share of the Hessian's mean diagonal that is added to its diagonal. A layer whose Hessian cannot be factorised
        gets more, up to 1.
    precision : "float32" or "bf16"
        ``"bf16"`` calibrates under autocast to bfloat16, with products of layer inputs summed in float32: faster on
        processors with AVX512-BF16, and masks differ in some near-ties. ``"float32"`` keeps the model's own precision.
    memory_limit
        Largest size of all Gram matrices held at the same time: bytes, or a string such as ``"2GB"``. Layers that do
        not fit together are calibrated in several passes over the data. Solving also needs about three times the Gram
        matrices of the layer at hand.
    seed
        Seed of the calibration data, kept in the trace to tell where it came from.
    strict
        Raise FallbackError instead of doing something else than was asked for.

    Raises
    ------
    TypeError, ValueError
        A field of the wrong type or outside its range.
    """

    sparsity: Sparsity | None
    solver: str = "exact"
    layers: str | Iterable[str] | None = None
    block: int | None = None
    damping: float = 0.01
    precision: str = "float32"
    memory_limit: int | str | None = None
    seed: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_names("solver", [self.solver], SOLVERS)
        check_names("precision", [self.precision], PRECISIONS)
        if isinstance(self.sparsity, Mapping):
            check_shares({f"sparsity[{pattern!r}]": share for pattern, share in self.sparsity.items()})
        elif self.sparsity is not None and not callable(self.sparsity):
            check_shares({"sparsity": self.sparsity})
        if self.block is not None:
            integer("block", self.block, 1)
        if not (is_number(self.damping) and 0 <= self.damping < math.inf):
            raise InvalidValueError(f"damping must be a number of at least 0, got {self.damping!r}")
        if self.seed is not None:
            integer("seed", self.seed)
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)
        if self.layers is not None:
            patterns = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
            object.__setattr__(self, "layers", patterns)

    @property
    def memory_bytes(self) -> int | None:
        """`memory_limit` in bytes; None for no limit."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    def options(self) -> dict[str, Any]:
        """Return the fields as keyword arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them; a function as `sparsity` becomes ``"function"``."""
        record = self.options()
        if isinstance(self.sparsity, Mapping):
            record["sparsity"] = {pattern: float(share) for pattern, share in self.sparsity.items()}
        elif self.sparsity is not None:
            record["sparsity"] = "function" if callable(self.sparsity) else float(self.sparsity)
        record["layers"] = None if self.layers is None else list(self.layers)
        record["damping"] = float(self.damping)
        return record


class PruneOptions(TypedDict, total=False):
    """The fields of `PruneConfig` but for `sparsity`, as keyword arguments for type checkers."""

    solver: str
    layers: str | Iterable[str] | None
    block: int | None
    damping: float
    precision: str
    memory_limit: int | str | None
    seed: int | None
    strict: bool


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes given as such or as a string such as ``"2GB"``, ``"1.5 GiB"`` or ``"500M"``.

    Raises
    ------
    TypeError, ValueError
        Something else, or not above 0.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", size.lower())
        if match is None:
            raise InvalidValueError(f"memory_limit must be a number of bytes or a string such as '2GB', got {size!r}")
        size = int(float(match[1]) * _UNITS[match[2] or ""])
    elif isinstance(size, bool) or not isinstance(size, int):
        raise InvalidTypeError(f"memory_limit must be a number of bytes or a string such as '2GB', got {size!r}")
    if size <= 0:
        raise InvalidValueError(f"memory_limit must be above 0 bytes, got {size}")
    return size


def sparsity_by_layer(sparsity: Sparsity | None, names: Sequence[str], every: Sequence[str]) -> dict[str, float]:
    """Return the share of weights to remove from each of the layers `names`.

    Parameters
    ----------
    sparsity
        As in :class:`PruneConfig`, but not None.
    names
        Layers to be pruned.
    every
        All layers of the model. A pattern must match one of them.

    Raises
    ------
    TypeError, ValueError
        A share that is not a number between 0 and 1.
    UnknownLayerError
        A name or pattern that matches no layer.
    """
    if sparsity is None:
        raise InvalidTypeError("sparsity must be a number, a mapping or a function, got None")
    if isinstance(sparsity, Mapping):
        shares = list(sparsity.values())
        first = match_names(list(sparsity), every)
        given = {name: shares[first[name]] if name in first else 0.0 for name in names}
    elif callable(sparsity):
        given = {name: sparsity(name) for name in names}
        check_shares({f"sparsity({name!r})": share for name, share in given.items()})
    else:
        given = dict.fromkeys(names, sparsity)
    return {name: float(share) for name, share in given.items()}


def check_shares(shares: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for a share that is not a number between 0 and 1; the key says what it is."""
    for what, share in shares.items():
        if not is_number(share):
            raise InvalidTypeError(f"{what} must be a number between 0 and 1, got {share!r}")
        if not 0 <= share <= 1:
            raise InvalidValueError(f"{what} must lie between 0 and 1, got {share!r}")
