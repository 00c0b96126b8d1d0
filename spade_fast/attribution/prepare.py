"""`prepare_for_attribution`, which makes a network safe for attribution methods that hook its activation modules."""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections import Counter
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from spade_fast._util.errors import InvalidTypeError
from spade_fast._util.modes import evaluation_mode

_FUNCTIONAL = {F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU}


class ReLU6(nn.ReLU):
    """`nn.ReLU6` as a subclass of `nn.ReLU`, so that hook-based methods include it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input)


_FUNCTIONAL[F.relu6] = ReLU6


class PerCall(nn.Module):
    """Replaces an activation module that is used several times in one forward pass: each use runs a separate module."""

    def __init__(self, activation: nn.Module, uses: int) -> None:
        super().__init__()
        self.activations = nn.ModuleList([activation, *(copy.deepcopy(activation) for _ in range(uses - 1))])
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        activation = self.activations[self.calls % len(self.activations)]
        self.calls += 1
        return activation(*args, **kwargs)


def prepare_for_attribution(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | None = None) -> nn.Module:
    """Copy a network such that methods which hook activations (GuidedBackprop, GuidedGradCam, DeepLift) are correct.

    In the copy, activations are not in place, an activation module that is used several times in one forward pass is
    replaced by that many modules, calls such as `torch.relu` become modules, and ReLU6 counts as a ReLU. The class, the
    submodules and their names, and the outputs (bit for bit) are the same. The copy **shares all parameters and
    buffers** with `model`, which is not modified; build the attribution method on the copy, and trace the copy.

    Parameters
    ----------
    model : nn.Module
        The network, in evaluation mode.
    example_inputs : Tensor or tuple, optional
        The input or inputs of one forward pass. They are needed for a network that `torch.fx` cannot trace
        symbolically: the uses of its activations are then counted in a real forward pass. They also serve to check
        function calls that became modules: if the copy's outputs differ from the model's, the calls stay functions.

    Returns
    -------
    nn.Module
        The prepared copy.

    Warns
    -----
    UserWarning
        A part of the network could not be prepared; the message names it and the consequences.

    Raises
    ------
    TypeError
        `model` is not a module.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import prepare_for_attribution
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(inplace=True)).eval()
    >>> prepare_for_attribution(model)
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): ReLU()
    )
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _teach_deep_lift()
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    prepared = copy.deepcopy(model, shared)

    for module in prepared.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    _replace_activations(prepared)
    graph, reason = _trace(prepared)
    if graph is not None and _replace_functions(prepared, graph, example_inputs):
        graph, reason = _trace(prepared)

    if graph is not None:
        names = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        uses = Counter[nn.Module]()
        for name, times in names.items():
            uses[prepared.get_submodule(name)] += times
    elif example_inputs is not None:
        uses = _count_uses(prepared, example_inputs)
    else:
        uses = Counter()
        warnings.warn(
            f"the forward pass of {type(model).__name__} cannot be traced ({reason}): activation modules used several "
            "times are not separated, as GuidedBackprop and DeepLift require; give example_inputs to count their uses",
            stacklevel=2,
        )
    _split_by_use(prepared, uses)
    return prepared


def _teach_deep_lift() -> None:
    """Register our ReLU6 with Captum's DeepLift, which finds rules by exact type; it is an elementwise function."""
    try:
        from captum.attr._core import deep_lift
    except ImportError:
        return
    deep_lift.SUPPORTED_NON_LINEAR.setdefault(ReLU6, deep_lift.nonlinear)


def _is_activation(module: nn.Module) -> bool:
    """Whether `module` is an activation or pooling module without parameters; DeepLift also hooks pooling."""
    own = type(module).__module__ in ("torch.nn.modules.activation", "torch.nn.modules.pooling", __name__)
    return own and not isinstance(module, PerCall) and not any(True for _ in module.parameters())


def _slots(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (parent, name, activation) for every place where an activation is registered."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and _is_activation(child)
    ]


def _replace_activations(model: nn.Module) -> None:
    seen: set[nn.Module] = set()
    for parent, name, child in _slots(model):
        if type(child) is nn.ReLU6:
            parent._modules[name] = ReLU6().train(child.training)
        elif child in seen:
            parent._modules[name] = copy.deepcopy(child)
        seen.add(child)


class _Tracer(fx.Tracer):
    """Treats torch's modules and modules with direct parameters (such as self-padding convolutions) as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, PerCall | ReLU6) or super().is_leaf_module(m, module_qualified_name):
            return True
        return any(True for _ in m.parameters(recurse=False))


class _ShallowTracer(fx.Tracer):
    """Traces only the forward of one module, not those of its submodules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    parameters = inspect.signature(model.forward).parameters.values()
    # Optional arguments keep their defaults: a proxy would not pass the model's tests for None.
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    try:
        return _Tracer().trace(model, defaults), ""
    except Exception as error:  # symbolic tracing runs the model's own code, which may fail in any way
        lines = str(error).splitlines() or [type(error).__name__]
        return None, lines[0]


def _replace_functions(model: nn.Module, graph: fx.Graph, example_inputs: Tensor | tuple[Any, ...] | None) -> bool:
    """Rewrite the forward of modules that call ReLU as a function; return True if any was rewritten."""
    owners: dict[str, nn.Module] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in _FUNCTIONAL:
            stack = node.meta.get("nn_module_stack") or {"": ("", None)}
            path = next(reversed(stack.values()))[0]
            owners[path] = model.get_submodule(path)
    checked = None if example_inputs is None or not owners else _run(model, example_inputs)
    failed = {path for path, owner in owners.items() if not _functions_to_modules(owner)}
    if example_inputs is not None and owners and not _equal(checked, _run(model, example_inputs)):
        failed = set(owners)
        for owner in owners.values():
            owner.__dict__.pop("forward", None)
    if failed:
        names = ", ".join(path or "the model itself" for path in sorted(failed))
        warnings.warn(
            f"ReLU is called as a function in {names}, whose forward cannot be rewritten: GuidedBackprop and DeepLift "
            "will not see these calls",
            stacklevel=3,
        )
    return len(failed) < len(owners)


def _functions_to_modules(owner: nn.Module) -> bool:
    parameters = inspect.signature(owner.forward).parameters.values()
    if any(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters):
        return False  # such a forward can branch on its arguments, which are unknown before the call
    try:
        graph = _ShallowTracer().trace(owner)
    except Exception:  # the model's own code may fail in any way, as in _trace; this module is then not rewritten
        return False
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method") and node.target in _FUNCTIONAL]
    for index, node in enumerate(nodes):
        name = f"functional_relu_{index}"
        owner.add_module(name, _FUNCTIONAL[node.target]().train(owner.training))
        argument = node.args[0] if node.args else node.kwargs["input"]
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (argument,)))
        graph.erase_node(node)
    rewritten = type(fx.GraphModule(owner, graph)).forward
    # Set on the instance, so that class and submodules stay the same.
    owner.__dict__["forward"] = types.MethodType(rewritten, owner)
    return True


def _run(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> Any:
    """Run one forward pass in evaluation mode without gradients."""
    with evaluation_mode(model), torch.no_grad():
        return model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


def _equal(first: Any, second: Any) -> bool:
    leaves, others = (tree_flatten(value)[0] for value in (first, second))
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


def _count_uses(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> Counter[nn.Module]:
    uses = Counter[nn.Module]()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: uses.update([module]))
        for module in model.modules()
        if _is_activation(module)
    ]
    try:
        _run(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def _split_by_use(model: nn.Module, uses: Counter[nn.Module]) -> None:
    wrapped: dict[nn.Module, PerCall] = {}
    for parent, name, child in _slots(model):
        if uses[child] > 1:
            if child not in wrapped:
                wrapped[child] = PerCall(child, uses[child])
            parent._modules[name] = wrapped[child]
    if wrapped:
        model.register_forward_pre_hook(_restart_calls)


def _restart_calls(model: nn.Module, _: object) -> None:
    for module in model.modules():
        if isinstance(module, PerCall):
            module.calls = 0
