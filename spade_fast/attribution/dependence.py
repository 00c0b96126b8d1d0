"""Which tensors of a forward pass depend on its inputs, told by autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from spade_fast._util.errors import InvalidValueError


class Dependence:
    """Tells, during a forward pass, whether a tensor was computed, with a gradient, from the inputs.

    Parameters
    ----------
    inputs : iterable of Tensor
        Of the pass. They are not leaves of the graph.
    needs_rule : callable
        Whether a function, by the name that its node has in the graph, in small letters and without underscores, must
        not be called out of sight.
    """

    def __init__(self, inputs: Iterable[Tensor], needs_rule: Callable[[str], bool]) -> None:
        self._known: dict[Any, bool] = {one.grad_fn: True for one in inputs if one.grad_fn is not None}
        self._needs_rule = needs_rule

    def __call__(self, tensor: Tensor, seen: bool = False) -> bool:
        """Return whether a tensor depends on the inputs.

        ValueError is raised if there was a function on the way that needs a rule and was out of sight, unless it was
        part of a call that was `seen`.
        """
        first = tensor.grad_fn
        open_nodes = [] if first is None else [first]
        while open_nodes:
            node = open_nodes[-1]
            before = [one for one, _ in node.next_functions if one is not None]
            unknown = [] if node in self._known else [one for one in before if one not in self._known]
            open_nodes.extend(unknown)
            if unknown:
                continue
            open_nodes.pop()
            if node not in self._known:
                # Leaves other than parameters: outputs of layers from which a method makes the graph begin.
                leaf = getattr(node, "variable", None)
                begins = leaf is not None and not isinstance(leaf, nn.Parameter)
                self._known[node] = begins or any(self._known[one] for one in before)
                if self._known[node] and not seen:
                    self._check_unseen(node)
        return first is not None and self._known[first]

    def _check_unseen(self, node: Any) -> None:
        """Refuse a function of the graph that was called out of sight, in `torch.vmap` or in a scripted function."""
        if isinstance(node, BackwardCFunction):
            name = f"custom autograd function {type(node).__name__.removesuffix('Backward')}"
        else:
            name = node.name().rpartition("::")[2].partition("Backward")[0]
            if not self._needs_rule(name.lower()):
                return
            name = f"function {name}, scripted or in torch.vmap,"
        raise InvalidValueError(f"the {name} cannot be given another gradient")
