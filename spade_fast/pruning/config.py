"""The configuration of a pruning run: its fields, their defaults and checks, and how they are recorded in results."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from spade_fast._util.checks import check_names, integer, is_number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.pruning.layers import match_names

# A share of the weights to remove, shares by layer, or "auto".
Sparsity = float | Mapping[str, float] | Callable[[str], float] | str
AUTO = "auto"

# Each solver, and the name of the published method that uses it.
SOLVERS = {"exact": "SPADE", "sparsegpt": "FastSPADE"}
# Each precision, and another name of it.
PRECISIONS = {"float32": "fp32", "bf16": "bfloat16"}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What to prune and how: the keyword arguments that `trace`, `trace_batch`, `Spade`, `tune` and batches share.

    The defaults are theirs, and those of the commands, for every network: all layers that can be pruned, with the
    sparsities that each sample allows.

    Attributes
    ----------
    sparsity : "auto", float, mapping or function
        Share of each layer's weights to remove, between 0 and 1. ``"auto"`` finds it for each sample and layer: all
        layers get the same limit of their relative output error, the largest at which the trace keeps a share `keep` of
        the dense network's score on the sample (:class:`AutoSparsity`). A mapping assigns shares to layer names or
        patterns: a layer takes the share of the first pattern it matches, or 0 if it matches none. A function takes the
        layer's name and returns the share; it is also asked for weights that cannot be pruned, such as those of an
        `nn.Embedding`.
        Layers with a share of 0 are skipped.
    keep : float or iterable of float
        Share of the dense network's score, above 0 and at most 1, that automatic sparsity keeps. Several shares make a
        trace for each from one calibration, where that is possible: in `Spade`, ``explain`` and batches. They are
        stored in descending order, equal ones once, and need automatic sparsity.
    solver : "exact" or "sparsegpt"
        Exact OBS (SPADE) or SparseGPT (FastSPADE).
    layers : str, iterable of str or None
        Names or patterns (``*``, ``?``, ``[...]``) of the layers to prune; None for all. Other weights of two or more
        dimensions that match (all, for None), have a sparsity above 0 and are used by the model stay dense, which is a
        fallback: of `nn.Embedding`, for example. (Those that are only added to or concatenated with activations, as
        position embeddings are, count as biases.)
    block : int or None
        Number of neighbouring columns that are removed together (exact OBS, columns in the order (kh, kw, in-channel))
        or whose mask is chosen together (SparseGPT, in the order (in-channel, kh, kw)), in all layers. 1 prunes
        unstructured. None for the published choice: ``kh * kw`` for ordinary convolutions, 1 for linear, 1x1 and
        depthwise layers.
    damping : float
        Share of the Hessian's mean diagonal that is added to its diagonal. If a layer's Hessian cannot be factorised,
        the share is increased, up to 1.
    precision : "float32" or "bf16"
        ``"bf16"`` calibrates under autocast to bfloat16 and sums the products of layer inputs in float32: faster on
        processors with AVX512-BF16, but masks can differ where scores nearly tie. ``"float32"`` keeps the model's own
        precision.
    compile : bool
        Calibrate with the network compiled by `torch.compile`, once for all samples of a call or of a batch's worker.
        Compiling takes about a minute and needs a C++ compiler, so it pays only for many samples, and for some networks
        never; masks can differ where scores nearly tie. `torch.export` must be able to represent the network as one
        graph, and its results must depend only on its weights and the batch. Only batches of the shape of the first one
        run compiled. The first one also runs uncompiled, and the Gram matrices of both runs, which must agree, are held
        at the same time.
    memory_limit : int, str or None
        Largest total size of the Gram matrices held at the same time, in bytes or as a string such as ``"2GB"``. Layers
        that do not fit together are calibrated in several passes over the data. Solving a layer also needs about three
        times the size of its Gram matrices.
    seed : int or None
        Seed of the calibration data, recorded in the trace.
    strict : bool
        Raise FallbackError wherever pruning would otherwise deviate from the request with a FallbackWarning.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or is out of range.

    Examples
    --------
    >>> from spade_fast import PruneConfig
    >>> config = PruneConfig(sparsity={"features.*": 0.5, "classifier": 0.9}, solver="sparsegpt", memory_limit="2GB")
    >>> config.memory_limit
    2000000000
    """

    sparsity: Sparsity = AUTO
    keep: float | Iterable[float] = 0.9
    solver: str = "exact"
    layers: str | Iterable[str] | None = None
    block: int | None = None
    damping: float = 0.01
    precision: str = "float32"
    compile: bool = False
    memory_limit: int | str | None = None
    seed: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_names("solver", [self.solver], SOLVERS, SOLVERS)
        check_names("precision", [self.precision], PRECISIONS, PRECISIONS)
        if isinstance(self.sparsity, Mapping):
            check_shares({f"sparsity[{pattern!r}]": share for pattern, share in self.sparsity.items()})
        elif is_number(self.sparsity):
            check_shares({"sparsity": self.sparsity})
        elif not callable(self.sparsity) and not (isinstance(self.sparsity, str) and self.sparsity == AUTO):
            raise InvalidTypeError(
                f"sparsity must be a number between 0 and 1, a mapping, a function or {AUTO!r}, got {self.sparsity!r}"
            )
        if self.block is not None:
            integer("block", self.block, 1)
        if not (is_number(self.damping) and 0 <= self.damping < math.inf):
            raise InvalidValueError(f"damping must be a number of at least 0, got {self.damping!r}")
        if self.seed is not None:
            integer("seed", self.seed)
        for name, flag in {"compile": self.compile, "strict": self.strict}.items():
            if not isinstance(flag, bool):
                raise InvalidTypeError(f"{name} must be True or False, got {flag!r}")
        # One form of each value, which nobody else can change.
        if isinstance(self.sparsity, Mapping):
            object.__setattr__(self, "sparsity", dict(self.sparsity))
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        if len(self.keeps) > 1 and self.sparsity != AUTO:
            raise InvalidValueError(f"keep={self.keep} needs sparsity={AUTO!r}, which makes a trace for each share")
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", parse_bytes(self.memory_limit))
        if self.layers is not None:
            object.__setattr__(self, "layers", _patterns(self.layers))

    @property
    def keeps(self) -> tuple[float, ...]:
        """The shares to keep, in descending order: one for each trace that is made from one calibration."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    def options(self) -> dict[str, Any]:
        """Return the fields as keyword arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def record(self) -> dict[str, Any]:
        """Return the fields in a form that JSON can represent; a `sparsity` function becomes ``"function"``."""
        record = self.options()
        if isinstance(self.sparsity, Mapping):
            record["sparsity"] = {pattern: float(share) for pattern, share in self.sparsity.items()}
        elif self.sparsity != AUTO:
            record["sparsity"] = "function" if callable(self.sparsity) else float(self.sparsity)
        record["keep"] = list(self.keeps) if len(self.keeps) > 1 else self.keeps[0]
        record["layers"] = None if self.layers is None else list(self.layers)
        record["damping"] = float(self.damping)
        return record


class PruneOptions(TypedDict, total=False):
    """The fields of `PruneConfig` except `sparsity`, as keyword arguments for type checkers."""

    keep: float | Iterable[float]
    solver: str
    layers: str | Iterable[str] | None
    block: int | None
    damping: float
    precision: str
    compile: bool
    memory_limit: int | str | None
    seed: int | None
    strict: bool


def _patterns(layers: Any) -> tuple[str, ...]:
    if not isinstance(layers, Iterable) or isinstance(layers, bytes):
        raise InvalidTypeError(f"layers must be names or patterns, got {layers!r}")
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _checked_keep(keep: Any) -> float | tuple[float, ...]:
    """Return the share to keep, or several in descending order; TypeError or ValueError if one is out of range."""
    single = isinstance(keep, (str, bytes)) or not isinstance(keep, Iterable) or getattr(keep, "ndim", 1) == 0
    shares = [keep] if single else list(keep)
    if not shares:
        raise InvalidValueError("keep is empty: give at least one share")
    for share in shares:
        if not is_number(share):
            raise InvalidTypeError(f"keep must be a number above 0 and at most 1, got {share!r}")
        if not 0 < share <= 1:
            hint = f": did you mean {share / 100:g}?" if 2 <= share <= 100 else ""
            if share == 0:
                hint = ": to prune harder, give a small share such as 0.1, or a number as sparsity"
            raise InvalidValueError(f"keep must be above 0 and at most 1, got {share!r}{hint}")
    ordered = sorted({float(share) for share in shares}, reverse=True)
    return tuple(ordered) if len(ordered) > 1 else ordered[0]


def parse_bytes(size: int | str) -> int:
    """Convert a size to bytes: an integer, or a string such as ``"2GB"``, ``"1.5 GiB"`` or ``"500M"``.

    Raises
    ------
    TypeError, ValueError
        `size` is neither, or is not above 0.
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


def sparsity_by_layer(sparsity: Sparsity, names: Sequence[str], every: Sequence[str]) -> dict[str, float]:
    """Return the share of weights to remove from each of the layers `names`.

    Parameters
    ----------
    sparsity
        As in :class:`PruneConfig`, but not ``"auto"``.
    names
        Layers to prune.
    every
        All layers of the model. Every pattern must match at least one of them.

    Raises
    ------
    TypeError, ValueError
        A share is not a number between 0 and 1.
    UnknownLayerError
        A name or pattern matches no layer.
    """
    if isinstance(sparsity, Mapping):
        shares = list(sparsity.values())
        first = match_names(list(sparsity), every)
        given = {name: shares[first[name]] if name in first else 0.0 for name in names}
    elif callable(sparsity):
        given = {name: sparsity(name) for name in names}
        check_shares({f"sparsity({name!r})": share for name, share in given.items()})
    else:
        given = dict.fromkeys(names, float(sparsity))
    return {name: float(share) for name, share in given.items()}


def check_shares(shares: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, naming the key, for a share that is not a number between 0 and 1."""
    for what, share in shares.items():
        if not is_number(share):
            raise InvalidTypeError(f"{what} must be a number between 0 and 1, got {share!r}")
        if not 0 <= share <= 1:
            percent = f": did you mean {share / 100:g}?" if 2 <= share <= 100 else ""
            raise InvalidValueError(f"{what} must lie between 0 and 1, got {share!r}{percent}")
