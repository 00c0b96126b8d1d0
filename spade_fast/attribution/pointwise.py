"""Which tensors of a forward pass are functions of each element of another by itself, and which are normalisers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spade_fast.attribution.function_calls import argument, function_names
from spade_fast.attribution.function_kinds import ELEMENTWISE_NAMES

_POINTWISE = ELEMENTWISE_NAMES | function_names(
    "mul multiply add sub subtract radd rsub neg negative positive to type float double half bfloat16 contiguous clone"
)
_NORMS = function_names("std norm vector_norm")
_REDUCTIONS = _NORMS | function_names("mean sum var")
_SHAPES = function_names("expand expand_as broadcast_to unsqueeze squeeze view reshape")


@dataclass(frozen=True)
class _Origin:
    root: Tensor | None  # None: the tensor itself
    version: int
    reduced: bool  # a sum, mean or variance, or a function of one
    normaliser: bool  # a norm, standard deviation or root of a mean


class Pointwise:
    """Follows, call by call, of which tensors the results are functions element by element."""

    def __init__(self) -> None:
        self._origins: Any = WeakTensorKeyDictionary()

    def common_root(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the tensor of which all are functions, element by element, or None if there are several."""
        roots = [self._root(one) for one in tensors]
        return roots[0] if all(one is roots[0] for one in roots) else None

    def is_normaliser(self, tensor: Tensor) -> bool:
        """Whether a tensor is a norm, a standard deviation, or a square root of a mean, or a function of one."""
        origin = self._origins.get(tensor)
        return origin is not None and origin.normaliser

    def note(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        given: Sequence[Tensor],
        dependent: Sequence[Tensor],
        outputs: Any,
    ) -> None:
        """Note a call: its arguments, the tensors among them, those of these that depend on the inputs, and results."""
        if not isinstance(outputs, Tensor):
            return
        if any(outputs is one for one in given):  # overwritten, or returned as it was
            self._origins.pop(outputs, None)
            return
        origins = [self._origins.get(one) for one in dependent]
        reduced = all(one is not None and one.reduced for one in origins)
        normaliser = all(one is not None and one.normaliser for one in origins)
        root = self.common_root(dependent)
        constants = [one for one in given if all(one is not other for other in dependent)]
        if name in _REDUCTIONS:
            self._origins[outputs] = _Origin(None, 0, True, normaliser or name in _NORMS)
        elif name in _SHAPES:
            self._origins[outputs] = _Origin(None, 0, reduced, normaliser)
        elif (
            name in _POINTWISE
            and root is not None
            and root.shape == outputs.shape
            and all(one.numel() == 1 for one in constants)
        ):
            rooted = name in ("sqrt", "rsqrt") or (
                name == "pow" and argument(args, kwargs, 1, "exponent") in (0.5, -0.5)
            )
            self._origins[outputs] = _Origin(root, root._version, reduced, normaliser or (reduced and rooted))

    def _root(self, tensor: Tensor) -> Tensor:
        origin = self._origins.get(tensor)
        if origin is None or origin.root is None or origin.root._version != origin.version:
            return tensor
        root: Tensor = origin.root
        return root
