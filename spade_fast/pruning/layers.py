"""Finds the prunable weights of a model by name, and converts each between its own shape and the solver's matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spade_fast._util.checks import nearest
from spade_fast._util.errors import InvalidTypeError, InvalidValueError, UnknownLayerError
from spade_fast._util.module_names import uncompiled
from spade_fast.pruning.computed_weights import ComputedWeight, computed_names, computed_weight, computed_weights
from spade_fast.pruning.dense_weights import DenseWeight, is_bias, obstacle, other_weights, storage_key, weight_name
from spade_fast.pruning.module_kinds import original_module

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
    bare
        Whether only the use of the parameter tells if it is a layer, and of which G, R, C and kernel. Before that they
        are those of a matrix ``[out, in]``, or of a stack of such matrices.
    parts
        Number of equal parts of the rows that may take inputs of their own: 3 for the projections of attention.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    groups: int
    rows: int
    columns: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False
    bare: bool = False
    parts: int = 1

    @property
    def experts(self) -> bool:
        """Whether the parameter is a stack of matrices, its groups, each of which the data may reach or not."""
        return (self.bare or self.parts > 1) and self.groups > 1 and not self.kernel

    def as_matrices(self) -> list[Layer]:
        """Return as what the weight may take part in matrix products: if it is bare, in either orientation.

        A weight that has parts may be a stack of these. A bare tensor of more than two dimensions may be one matrix,
        whose rows are some leading dimensions; or, if it has three, a stack ``[experts, ...]`` of matrices.
        """
        if not self.bare:
            stack = replace(self, groups=self.parts, rows=self.rows // self.parts)
            return [self] if self.parts == 1 else [self, stack]
        splits = range(1, len(self.shape))
        sizes = [(1, math.prod(self.shape[:at]), math.prod(self.shape[at:])) for at in splits]
        if len(self.shape) == 3:
            sizes.append((self.shape[0], self.shape[1], self.shape[2]))
        return [
            replace(self, groups=groups, rows=rows, columns=columns, transposed=transposed)
            for groups, first, second in sizes
            for rows, columns, transposed in ((first, second, False), (second, first, True))
        ]

    def as_convolution(self, groups: int, transposed: bool) -> Layer:
        """Return as what the weight takes part in a convolution."""
        outputs, inputs = (
            (self.shape[1], self.shape[0] // groups) if transposed else (self.shape[0] // groups, self.shape[1])
        )
        kernel = self.shape[2:]
        columns = inputs * math.prod(kernel)
        return replace(self, groups=groups, rows=outputs, columns=columns, kernel=kernel, transposed=transposed)

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
    installed), and the input projections of `nn.MultiheadAttention`. Those inside of a parametrization are none. The
    rows of all gates of a recurrent layer belong to one matrix. All other parameters of two or more dimensions, except
    those of embeddings, are bare: a run shows whether they are layers. A module or parameter that occurs several times
    is one layer, under its first name. Submodules that are compiled have the names of the uncompiled ones.

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
        `torch.nn.utils.parametrize` or the hooks of `torch.nn.utils`, is a buffer or expanded, or has no floating-point
        dtype of 16 bits or more, and those of `nn.Embedding` and of quantised modules.

    Raises
    ------
    UnknownLayerError
        A name or pattern matches nothing.
    ValueError
        The model has an uninitialised (lazy) layer, or `patterns` is empty.
    """
    places: dict[Layer, int] = {}
    dense: dict[str, DenseWeight] = {}
    modules = [(uncompiled(prefix), module) for prefix, module in model.named_modules()]
    inside = tuple(f"{prefix}." for prefix, module in modules if isinstance(module, parametrize.ParametrizationList))
    modules = [(prefix, module) for prefix, module in modules if not prefix.startswith(inside)]
    sources = [source for _, computed in computed_weights(model) for source in computed.sources()]
    seen: set[tuple[object, ...]] = set()
    biases = [b for _, m in modules if isinstance(m, nn.MultiheadAttention) for b in (m.bias_k, m.bias_v)]
    known = {storage_key(one) for one in (*sources, *biases) if one is not None}
    for place, (prefix, module) in enumerate(modules):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                name = weight_name(prefix, parameter_name)
                raise InvalidValueError(f"layer {name!r} is not initialised: run the model once first")
        for parameter_name in _weight_names(module):
            name = weight_name(prefix, parameter_name)
            computed = computed_weight(module, parameter_name)
            weight = module._parameters.get(parameter_name) if computed is None else computed.value()
            if weight is None:
                how = "a buffer" if parameter_name in module._buffers else "computed from other parameters"
                dense[name] = DenseWeight(name, (), f"its weight is {how}")
                known.update(map(storage_key, module.parameters()))
                continue
            key = storage_key(weight) if computed is None else (id(module), parameter_name)
            known.add(key)
            if reason := obstacle(weight):
                dense[name] = DenseWeight(name, tuple(weight.shape), reason)
            elif weight.numel() > 0 and key not in seen:
                seen.add(key)
                places[_describe(name, f"{prefix}.{parameter_name}".lstrip("."), module, weight)] = place
    for place, (prefix, module) in enumerate(modules):
        for parameter_name, weight in _bare_weights(module):
            computed = computed_weight(module, parameter_name)
            key = storage_key(weight) if computed is None else (id(module), parameter_name)
            if key not in known:
                known.add(key)
                name, parameter = weight_name(prefix, parameter_name), f"{prefix}.{parameter_name}".lstrip(".")
                shape = tuple(weight.shape)
                matrices, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
                columns = math.prod(shape) // (matrices * rows)
                places[Layer(name, parameter, shape, matrices, rows, columns, bare=True)] = place
    layers = sorted(places, key=places.__getitem__)
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
            inside = any(name.startswith(f"{pattern}.") for name in names)
            close = [f"{pattern}.*"] if inside else nearest(pattern, names)
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
    elif isinstance(module, nn.Linear):
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() == 2:  # a subclass may have a stack of matrices, which is bare
            yield "weight"
    elif isinstance(module, _CONVOLUTIONS) or _is_transposed_linear(module):
        yield "weight"


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer whose weight is stored as ``[in, out]``."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def _describe(name: str, parameter: str, module: nn.Module, weight: Tensor) -> Layer:
    shape = tuple(weight.shape)
    transposed = isinstance(module, _TRANSPOSED_CONVOLUTIONS) or _is_transposed_linear(module)
    groups = module.groups if isinstance(module, _CONVOLUTIONS) else 1
    parts = 3 if isinstance(module, nn.MultiheadAttention) and name.endswith(_ATTENTION_PROJECTIONS[0]) else 1
    layer = Layer(name, parameter, shape, groups, shape[0], math.prod(shape[1:]), parts=parts)
    return layer.as_convolution(groups, transposed)


def _bare_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the weights of a module that are layers if the network multiplies by them."""
    if isinstance(module, (torch.jit.ScriptModule, nn.Embedding, nn.EmbeddingBag)):
        return
    computed = {name: ComputedWeight(module, name).value() for name in computed_names(module)}
    for name, weight in {**dict(module.named_parameters(recurse=False)), **computed}.items():
        if weight.dim() > 1 and weight.numel() > 0 and not obstacle(weight) and not is_bias(name):
            yield name, weight
