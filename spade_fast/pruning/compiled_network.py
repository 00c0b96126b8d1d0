"""A network's forward pass compiled by `torch.compile`, which hands the inputs of layers to a Gram collector.

The network is exported as one graph of aten ops. A call of an op of our own, which the compiler does not look into, is
inserted before each convolution or matrix product with the whole weight of a layer. The graph is then compiled with its
weights as constants, so that they are packed and batch norms and activations are fused. What comes after the last layer
is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from spade_fast._util.errors import InvalidTypeError, InvalidValueError, UserError
from spade_fast._util.hashes import hash_tensors
from spade_fast._util.modes import without_autocast
from spade_fast._util.out_of_memory import is_out_of_memory
from spade_fast.pruning.gram_collector import PRODUCTS, GramCollector
from spade_fast.pruning.layers import Layer

# Largest relative difference, in the Frobenius norm, between a layer's Gram matrices of compiled and uncompiled runs.
# In bfloat16 compiled code rounds less often: between ops that it fuses.
_BOUNDS = {"float32": 1e-3, "bf16": 0.05}


@dataclass(frozen=True)
class _Use:
    """A product with the whole weight of a layer: the arguments of `GramCollector.collect` but for one factor."""

    layer: Layer
    tracked: Any
    weight: Tensor
    function: Any
    args: tuple[Any, ...]
    place: int  # of the other factor among `args`


@dataclass(frozen=True)
class _Run:
    """Where the inputs of a forward pass go."""

    uses: Sequence[_Use]
    names: frozenset[str]
    collector: GramCollector


_run: ContextVar[_Run] = ContextVar("_run")


# Any layout will do: by default the compiler would convert each input to that of the uncompiled network.
@torch.library.custom_op("spade_fast::observe_", mutates_args=("calls",), tags=(torch.Tag.flexible_layout,))
def _observe(calls: Tensor, x: Tensor, use: int) -> None:
    """Count a call in `calls`, which keeps it in the graph, and add the input of a layer to its Gram matrix."""
    calls[use] += 1
    run = _run.get()
    one = run.uses[use]
    if one.layer.name in run.names:
        with run.collector.at_work():
            run.collector.collect(one.layer, one.tracked, one.weight, one.function, _put(one.args, one.place, x))
        run.collector.layers[one.layer.name] = one.layer


@_observe.register_fake
def _(calls: Tensor, x: Tensor, use: int) -> None:
    return None


class CompiledNetwork:
    """Compiles the forward pass of a network for the batches of one shape, and keeps it while the network is the same.

    The first batch is also run uncompiled, and the Gram matrices of both runs must agree. Which weights the network
    uses, and how, is taken from the uncompiled run.

    Parameters
    ----------
    precision : "float32" or "bf16"
        With ``"bf16"`` the network is exported under autocast, so that the casts are part of the graph.
    """

    _model: nn.Module | None
    _layers: list[Layer]
    _weights: tuple[list[torch.device], dict[str, str]] | None
    _compiled: Callable[..., object] | None
    _signature: list[Any] | None
    _failure: str | None
    _uses: list[_Use]
    _verified: set[str]
    _unsupported: dict[str, str]
    _used: dict[str, None]

    def __init__(self, precision: str) -> None:
        self._bound = _BOUNDS[precision]
        self._forget()

    def prepare(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Forget what was compiled unless it is this network, with the same weights and the same layers.

        Parameters
        ----------
        layers
            All layers that will be calibrated, also in several passes.
        """
        tensors = [*model.named_parameters(), *model.named_buffers()]
        weights = [tensor.device for _, tensor in tensors], hash_tensors(tensors)
        if self._model is not model or self._layers != list(layers) or self._weights != weights:
            self._forget()
            self._model, self._layers, self._weights = model, list(layers), weights

    def fits(self, batch: Any, collector: GramCollector) -> bool:
        """Whether a verified compiled pass for a collector's layers and batches like this one exists."""
        return collector.names <= self._verified and self._signature == _signature(batch)

    def run(self, batch: Any, collector: GramCollector) -> None:
        """Run the compiled network over a batch."""
        self._forward(batch, collector)
        for name in collector.names & self._unsupported.keys():
            collector.unsupported[name] = self._unsupported[name]
        collector.used.update(self._used)

    def verify(self, model: nn.Module, batch: Any, eager: GramCollector, compiled: GramCollector) -> None:
        """Compile the network, if nothing is compiled yet, and compare both runs over a batch.

        Parameters
        ----------
        batch
            The first batch of a calibration.
        eager
            What the network has already run under on this batch.
        compiled
            An unused collector for the same layers.

        Raises
        ------
        ValueError, TypeError
            The network cannot be exported or compiled; a layer's use cannot be observed in the graph; the runs differ.
        """
        signature = _signature(batch)
        if self._failure is not None:
            raise InvalidValueError(self._failure)
        if self._compiled is not None and self._signature != signature:
            return
        if not all(bool(gram.diagonal(dim1=1, dim2=2).isfinite().all()) for gram in eager.grams.values()):
            return  # there is nothing to compare with, and the calibration fails
        self._unsupported.update(eager.unsupported)
        try:
            if self._compiled is None:
                self._compile(model, batch)
                self._signature = signature
            self._forward(batch, compiled)
        except InvalidValueError as error:
            self._failure = str(error)
            raise
        self._compare(eager, compiled)
        self._verified |= eager.names
        self._used.update(eager.used)

    def _forget(self) -> None:
        self._model = self._weights = self._compiled = self._signature = self._failure = None
        self._layers, self._uses, self._verified, self._unsupported, self._used = [], [], set(), {}, {}

    def _compile(self, model: nn.Module, batch: Any) -> None:
        graph = _exported(model, batch)
        with without_autocast(_device(batch)):
            self._uses = _observed(graph, _Recorder(model, self._layers, {}), list(_arguments(batch).values()))
            self._compiled = torch.compile(graph, fullgraph=True, dynamic=False, options={"freezing": True})

    def _forward(self, batch: Any, collector: GramCollector) -> None:
        assert self._compiled is not None
        calls = torch.zeros(len(self._uses), dtype=torch.int64)
        token = _run.set(_Run(self._uses, collector.names - self._unsupported.keys(), collector))
        try:
            with torch.compiler.set_stance("default"), without_autocast(_device(batch)):
                self._compiled(*_arguments(batch).values(), calls)
        except UserError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or collector.collecting or self._verified:
                raise
            raise _refused(
                f"torch.compile, which needs a C++ compiler, failed on the network ({_first_line(error)})"
            ) from error
        finally:
            _run.reset(token)
        if not bool((calls == 1).all()):
            names = {use.layer.name for use, count in zip(self._uses, calls.tolist(), strict=True) if count != 1}
            raise _refused(f"torch.compile left out or repeated calls of layers {sorted(names)}")

    def _compare(self, eager: GramCollector, compiled: GramCollector) -> None:
        """Raise ValueError that names a layer whose use or Gram matrix differs between the runs."""
        for name, gram in eager.grams.items():
            if compiled.layers.get(name) != eager.layers[name]:
                raise _refused(
                    f"in the exported network the weight of layer {name!r} is not a factor of a "
                    "convolution or matrix product as a whole"
                )
            difference = (compiled.grams[name].triu() - gram.triu()).norm()
            norm = gram.triu().norm()
            if not difference <= self._bound * norm:
                raise _refused(
                    f"the Gram matrices of layer {name!r} on the first batch differ between the compiled "
                    f"and the uncompiled network by {float(difference / norm):.2g} in relative terms, more than "
                    f"{self._bound:g}"
                )
        more = sorted(compiled.grams.keys() - eager.grams.keys())
        if more:
            raise _refused(f"only the compiled network uses layer {more[0]!r}")


class _Recorder(GramCollector):
    """Notes the products with weights of layers, instead of adding up Gram matrices."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[tuple[Layer, Any, Tensor, Any, tuple[Any, ...]]] = []

    def collect(self, layer: Layer, tracked: Any, tensor: Tensor, function: Any, args: Sequence[Any]) -> bool:
        found = super().collect(layer, tracked, tensor, function, args)
        if found:
            self.calls.append((layer, tracked, tensor, function, tuple(args)))
        return found

    def _add_product(self, *_: Any) -> None:
        pass


class _Observer(fx.Interpreter):
    """Runs a graph under a recorder, and finds the node and arguments of each call that it notes."""

    def __init__(self, graph: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(graph)
        self._recorder = recorder
        self.found: list[tuple[fx.Node, tuple[Any, ...]]] = []

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        self.found += [(n, args)] * (len(self._recorder.calls) - len(self.found))
        return result


def _exported(model: nn.Module, batch: Any) -> fx.GraphModule:
    """Export a network as a graph of aten ops whose arguments are those of the batch, and which returns nothing."""
    args, kwargs = ((), _arguments(batch)) if isinstance(batch, Mapping) else (tuple(_arguments(batch).values()), {})
    decompositions = torch.export.default_decompositions()
    # Attention stays one op: its decomposition returns another layout, of which views in the network may not exist.
    decompositions.pop(torch.ops.aten.scaled_dot_product_attention.default)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about recurrent layers, which make lists of their weights
            exported = torch.export.export(model, args, kwargs).run_decompositions(decompositions)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _refused(f"torch.export cannot represent the network as one graph ({_first_line(error)})") from error
    changed = list(exported.graph_signature.buffers_to_mutate.values())
    if changed:
        raise _refused(f"the network changes its buffer {changed[0]!r} as it runs")
    module = exported.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    for node in reversed(graph.nodes):
        if node.op == "output":
            node.args = ((),)
        elif node.op == "call_module":  # checks of the arguments
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())  # takes the arguments one by one
    return fx.GraphModule(module, graph)


def _observed(graph: fx.GraphModule, recorder: _Recorder, arguments: Sequence[Any]) -> list[_Use]:
    """Insert a call of `_observe` before each use of a layer's weight; return the uses."""
    observer = _Observer(graph, recorder)
    with recorder:
        observer.run(*arguments)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with graph.graph.inserting_after(inputs[-1]):
        calls = graph.graph.placeholder("calls")
    uses: list[_Use] = []
    for (node, args), (layer, tracked, weight, function, given) in zip(observer.found, recorder.calls, strict=True):
        place = _factor(weight, function, given)
        if place is None or tracked.chosen is not None or len(args) <= place or args[place] is not given[place]:
            raise _refused(
                f"the inputs of layer {layer.name!r}, whose weight {function} uses, are not one tensor of the exported "
                "graph"
            )
        with graph.graph.inserting_before(node):
            factor = node.args[place]
            graph.graph.call_function(torch.ops.spade_fast.observe_.default, (calls, factor, len(uses)))
        uses.append(_Use(layer, tracked, weight, function, _put(given, place, None), place))
    graph.recompile()
    return uses


def _refused(reason: str) -> InvalidValueError:
    return InvalidValueError(f"compile=True: {reason}; use compile=False")


def _factor(weight: Tensor, function: Any, args: Sequence[Any]) -> int | None:
    """Return the position of the factor of a weight in a convolution or matrix product; None for other functions."""
    if function is torch.ops.aten.convolution:
        return 0
    left, right = PRODUCTS.get(function, (None, None))
    return left if right is None or args[right] is weight else right


def _put(args: Sequence[Any], place: int, value: Any) -> tuple[Any, ...]:
    return (*args[:place], value, *args[place + 1 :])


def _arguments(batch: Any) -> dict[str, Any]:
    """Return the values of a batch by name or position."""
    if isinstance(batch, Tensor):
        return {"0": batch}
    values = dict(batch) if isinstance(batch, Mapping) else {str(i): value for i, value in enumerate(batch)}
    for name, value in values.items():
        if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            raise InvalidTypeError(
                f"compile=True needs batches of tensors, numbers and strings, but entry {name!r} is of type "
                f"{type(value).__name__}; use compile=False"
            )
    return values


def _signature(batch: Any) -> list[Any]:
    """Return what of a batch the compiled code depends on."""

    def of(value: Any) -> Any:
        return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value

    return [type(batch), *((name, of(value)) for name, value in _arguments(batch).items())]


def _device(batch: Any) -> torch.device:
    return next(value.device for value in _arguments(batch).values() if isinstance(value, Tensor))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
