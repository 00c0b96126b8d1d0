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
from spade_fast.pruning.computed_weights import ComputedWeight, computed_weight
from spade_fast.pruning.dense_weights import DenseWeight, other_weights, storage_key, weight_name
from spade_fast.pruning.module_kinds import original_module, uncompiled

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_CONVOLUTIONS)
_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layer:
    """One prunable weight of a model.

    The solvers treat a weight as G matrices of R rows (outputs) and C columns (inputs), ``[G, R, C]``. Columns of a
    convolution are in *solver order*, such as (kh, kw, in-channel), so that the channels of one tap are neighbours.

    Attributes
    ----------
    name
        Name of the module; for attention, that of the projection weight, such as ``module.in_proj_weight``.
    parameter
        Name of the parameter in the model, or of the weight if it is computed from other parameters.
    shape
        Shape of the parameter.
    groups, rows, columns
        G, R and C: groups of a grouped convolution (otherwise 1), outputs per group, inputs per output.
    kernel
        Size of a convolution's kernel, such as ``(kh, kw)``; empty for linear layers.
    transposed
        Whether the parameter is stored as ``[in, out / G, *kernel]``, as in transformers' `Conv1D` and in transposed
        convolutions, instead of ``[out, in / G, *kernel]``.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    groups: int
    rows: int
    columns: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def taps(self) -> int:
        """Number of kernel positions, such as ``kh * kw``."""
        return math.prod(self.kernel)

    def computed(self, model: nn.Module) -> ComputedWeight | None:
        """Return the layer's weight of `model` if it is computed from other parameters."""
        path, _, name = self.parameter.rpartition(".")
        return computed_weight(original_module(model.get_submodule(path)), name)

    def weight(self, model: nn.Module) -> Tensor:
        """Return the layer's parameter of `model`, or the value of its weight if it is computed from others."""
        computed = self.computed(model)
        return model.get_parameter(self.parameter) if computed is None else computed.value()

    def matrix(self, weight: Tensor) -> Tensor:
        """Reshape a weight of the parameter's shape to ``[G, R, C]`` in solver order."""
        outputs_inputs = (self.rows, self.columns // self.taps)
        weight = weight.reshape(self.groups, *outputs_inputs[:: -1 if self.transposed else 1], *self.kernel)
        if self.transposed:
            weight = weight.transpose(1, 2)
        return weight.movedim(2, -1).reshape(self.groups, self.rows, self.columns)

    def restore(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`matrix`: return a contiguous weight of the parameter's shape."""
        weight = matrix.reshape(self.groups, self.rows, *self.kernel, self.columns // self.taps).movedim(-1, 2)
        if self.transposed:
            weight = weight.transpose(1, 2)
        return weight.reshape(self.shape).contiguous()

    def natural_order(self, device: torch.device | None = None) -> Tensor:
        """Return the index in solver order of each column in (in-channel, *kernel) order: Tensor ``[C]``, int64."""
        return torch.arange(self.columns, device=device).reshape(self.taps, -1).T.flatten()


def find_layers(
    model: nn.Module, patterns: str | Iterable[str] | None = None
) -> tuple[list[Layer], dict[str, DenseWeight]]:
    """Find the weights of a model that can be pruned, and those that cannot, in the order of its modules.

    Layers are linear modules, convolutions of one to three dimensions and transposed ones, recurrent modules and cells,
    and their subclasses, transformers' `Conv1D` (recognised by its class name, so that transformers need not be
    installed), and the input projections of `nn.MultiheadAttention`. The rows of all gates of a recurrent layer belong
    to one matrix. A module or parameter that occurs several times is one layer, under its
    first name. Submodules that are compiled have the names of the uncompiled ones.

    Parameters
    ----------
    model
        Any module.
    patterns
        Names or patterns (``*``, ``?`` and ``[...]``, as in file names); None for all.

    Returns
    -------
    layers : list of Layer
        The layers that match.
    dense : dict of DenseWeight
        By name, the matching weights that cannot be pruned: layers whose weight is computed in another way than by
        `torch.nn.utils.parametrize` or the hooks of `torch.nn.utils`, or has no floating-point dtype of 16 bits or
        more, and all other weights of two or more dimensions, such as those of `nn.Embedding`, bare
        parameters and quantised modules.

    Raises
    ------
    UnknownLayerError
        A name or pattern matches nothing.
    ValueError
        The model has an uninitialised (lazy) layer, or `patterns` is empty.
    """
    layers: list[Layer] = []
    dense: dict[str, DenseWeight] = {}
    seen: set[tuple[object, ...]] = set()
    known: set[tuple[object, ...]] = set()
    for prefix, module in model.named_modules():
        prefix = uncompiled(prefix)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                name = weight_name(prefix, parameter_name)
                raise InvalidValueError(f"layer {name!r} is not initialised: run the model once first")
        for parameter_name in _weight_names(module):
            name = weight_name(prefix, parameter_name)
            weight: Tensor | None = module._parameters.get(parameter_name)
            if (computed := computed_weight(module, parameter_name)) is not None:
                weight = computed.value()
                known.update(map(storage_key, computed.sources()))
            if weight is None:
                dense[name] = DenseWeight(name, (), "its weight is computed from other parameters")
                known.update(map(storage_key, module.parameters()))
                continue
            known.add(storage_key(weight))
            if weight.dtype not in _DTYPES:
                dense[name] = DenseWeight(name, tuple(weight.shape), f"its weight is of type {weight.dtype}")
            elif weight.numel() > 0 and storage_key(weight) not in seen:
                seen.add(storage_key(weight))
                layers.append(_describe(name, f"{prefix}.{parameter_name}".lstrip("."), module, weight))
    dense.update((weight.name, weight) for weight in other_weights(model, known))
    if patterns is None:
        return layers, dense
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InvalidValueError("layers is empty; give names or patterns, or None for all layers")
    chosen = match_names(patterns, [*(layer.name for layer in layers), *dense])
    return (
        [layer for layer in layers if layer.name in chosen],
        {name: weight for name, weight in dense.items() if name in chosen},
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
            known = f"it has {', '.join(names[:5])}, ..." if names else "it has none"
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else known
            what = "layer pattern" if any(c in pattern for c in "*?[") else "layer name"
            raise UnknownLayerError(f"{what} {pattern!r} matches no layer of the model; {hint}")
        for name in matched:
            first.setdefault(name, index)
    return first


def _weight_names(module: nn.Module) -> Iterator[str]:
    if isinstance(module, torch.jit.ScriptModule):
        return
    if isinstance(module, nn.MultiheadAttention):
        yield from (name for name in _ATTENTION_PROJECTIONS if getattr(module, name, None) is not None)
    elif isinstance(module, nn.RNNBase):
        yield from (name for name in module._flat_weights_names if name.startswith("weight"))
    elif isinstance(module, nn.RNNCellBase):
        yield from ("weight_ih", "weight_hh")
    elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or _is_transposed_linear(module):
        yield "weight"


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer whose weight is stored as ``[in, out]``."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def _describe(name: str, parameter: str, module: nn.Module, weight: Tensor) -> Layer:
    shape = tuple(weight.shape)
    transposed = isinstance(module, _TRANSPOSED_CONVOLUTIONS) or _is_transposed_linear(module)
    groups = module.groups if isinstance(module, _CONVOLUTIONS) else 1
    outputs, inputs = (shape[1], shape[0] // groups) if transposed else (shape[0] // groups, shape[1])
    kernel = shape[2:]
    return Layer(name, parameter, shape, groups, outputs, inputs * math.prod(kernel), kernel, transposed)
