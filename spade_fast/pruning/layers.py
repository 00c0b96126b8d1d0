"""Finds the prunable weights of a model by name, and converts each between its own shape and the solver's matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from spade_fast._util.checks import nearest
from spade_fast._util.errors import InvalidTypeError, InvalidValueError, UnknownLayerError

_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layer:
    """One prunable weight of a model.

    The solvers treat a weight as G matrices of R rows (outputs) and C columns (inputs), ``[G, R, C]``. Columns of a
    convolution are in *solver order*, (kh, kw, in-channel), so that the channels of one tap are neighbours.

    Attributes
    ----------
    name
        Name of the module; for attention, that of the projection weight, such as ``module.in_proj_weight``.
    parameter
        Name of the parameter in the model.
    shape
        Shape of the parameter.
    groups, rows, columns
        G, R and C: groups of a grouped convolution (otherwise 1), outputs per group, inputs per output.
    kernel
        ``(kh, kw)``; ``(1, 1)`` for linear layers, ``(1, k)`` for one-dimensional convolutions.
    transposed
        Whether the parameter is stored as ``[in, out]``, as in transformers' `Conv1D`.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    groups: int
    rows: int
    columns: int
    kernel: tuple[int, int] = (1, 1)
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def taps(self) -> int:
        """Number of kernel positions, ``kh * kw``."""
        return self.kernel[0] * self.kernel[1]

    @property
    def conv_shape(self) -> tuple[int, int, int, int]:
        """Shape that the weight has, or would have, as the weight of a two-dimensional convolution."""
        return (self.groups * self.rows, self.columns // self.taps, *self.kernel)

    def weight(self, model: nn.Module) -> nn.Parameter:
        """Return the layer's parameter of `model`."""
        return model.get_parameter(self.parameter)

    def matrix(self, weight: Tensor) -> Tensor:
        """Reshape a weight of the parameter's shape to ``[G, R, C]`` in solver order."""
        if self.transposed:
            weight = weight.mT
        weight = weight.reshape(self.groups, self.rows, self.columns // self.taps, *self.kernel)
        return weight.permute(0, 1, 3, 4, 2).reshape(self.groups, self.rows, self.columns)

    def restore(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`matrix`: return a contiguous weight of the parameter's shape."""
        weight = matrix.reshape(self.groups, self.rows, *self.kernel, self.columns // self.taps)
        weight = weight.permute(0, 1, 4, 2, 3)
        if self.transposed:
            return weight.reshape(self.rows, self.columns).mT.contiguous()
        return weight.reshape(self.shape).contiguous()

    def natural_order(self, device: torch.device | None = None) -> Tensor:
        """Return the index in solver order of each column in (in-channel, kh, kw) order: Tensor ``[C]``, int64."""
        return torch.arange(self.columns, device=device).reshape(self.taps, -1).T.flatten()


def find_layers(model: nn.Module, patterns: str | Iterable[str] | None = None) -> tuple[list[Layer], dict[str, str]]:
    """Find the prunable weights of a model, in the order of its modules.

    Layers are `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` modules and their subclasses, transformers' `Conv1D` (recognised
    by its class name, so that transformers need not be installed), and the input projections of
    `nn.MultiheadAttention`. A module or parameter that occurs several times is one layer, under its first name.

    Parameters
    ----------
    model
        Any module.
    patterns
        Layer names or patterns (``*``, ``?`` and ``[...]``, as in file names); None for all layers.

    Returns
    -------
    layers : list of Layer
        The layers that match.
    unsupported : dict
        Matching layers that cannot be pruned, with the reason: their weight is computed from other parameters
        (`torch.nn.utils.parametrizations`), or its dtype is not floating-point.

    Raises
    ------
    UnknownLayerError
        A name or pattern matches no layer.
    ValueError
        The model has no prunable layer or has an uninitialised (lazy) one, or `patterns` is empty.
    """
    layers: list[Layer] = []
    unsupported: dict[str, str] = {}
    seen: set[tuple[object, ...]] = set()
    for prefix, module in model.named_modules():
        for weight_name in _weight_names(module):
            name = _layer_name(prefix, weight_name)
            weight = module._parameters.get(weight_name)
            if weight is None:
                unsupported[name] = "its weight is computed from other parameters"
            elif isinstance(weight, nn.parameter.UninitializedParameter):
                raise InvalidValueError(f"layer {name!r} is not initialised: run the model once first")
            elif not weight.is_floating_point():
                unsupported[name] = f"its weight is of type {weight.dtype}"
            elif weight.numel() > 0:
                key = (weight.device, weight.data_ptr(), weight.shape, weight.stride())
                if weight.is_meta or key not in seen:
                    seen.add(key)
                    layers.append(_describe(name, f"{prefix}.{weight_name}".lstrip("."), module, weight))
    if not layers and not unsupported:
        raise InvalidValueError(f"{type(model).__name__} has no linear or convolutional layer that can be pruned")
    if patterns is None:
        return layers, unsupported
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InvalidValueError("layers is empty; give names or patterns, or None for all layers")
    chosen = set(match_names(patterns, [layer.name for layer in layers] + list(unsupported)))
    return (
        [layer for layer in layers if layer.name in chosen],
        {name: reason for name, reason in unsupported.items() if name in chosen},
    )


def match_names(patterns: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Return, for each of `names` that matches a pattern, the index of the first pattern it matches.

    Raises
    ------
    UnknownLayerError
        A pattern matches none of `names`.
    """
    first: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        if not isinstance(pattern, str):
            raise InvalidTypeError(f"a layer name must be a string, got {pattern!r}")
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            close = nearest(pattern, names)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {', '.join(names[:5])}, ..."
            what = "layer pattern" if any(c in pattern for c in "*?[") else "layer name"
            raise UnknownLayerError(f"{what} {pattern!r} matches no layer of the model; {hint}")
        for name in matched:
            first.setdefault(name, index)
    return first


def _weight_names(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.MultiheadAttention):
        yield from (name for name in _ATTENTION_PROJECTIONS if getattr(module, name, None) is not None)
    elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or _is_transposed_linear(module):
        yield "weight"


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer whose weight is stored as ``[in, out]``."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def _layer_name(prefix: str, weight_name: str) -> str:
    if weight_name == "weight":
        return prefix or "weight"
    return f"{prefix}.{weight_name}".lstrip(".")


def _describe(name: str, parameter: str, module: nn.Module, weight: Tensor) -> Layer:
    shape = tuple(weight.shape)
    if _is_transposed_linear(module):
        return Layer(name, parameter, shape, 1, shape[1], shape[0], transposed=True)
    groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1
    kernel = (shape[2], shape[3]) if len(shape) == 4 else (1, shape[2]) if len(shape) == 3 else (1, 1)
    return Layer(name, parameter, shape, groups, shape[0] // groups, math.prod(shape[1:]), kernel)
