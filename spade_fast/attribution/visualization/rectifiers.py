"""Gradients through rectifiers that block them (straight-through): what would excite a feature that is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spade_fast._util.errors import DeadFeatureError
from spade_fast.attribution.function_calls import function_names, name_of

# Functions that return their input, or a limit in its place.
_RECTIFIERS = function_names("relu relu6 hardtanh threshold clamp clip clamp_min clamp_max")
_PATIENCE = 16  # steps without any gradient, even through rectifiers, after which a feature is given up


class SilentPictures:
    """Finds, among pictures that are optimised, those that do not excite their feature, and what would excite it.

    Parameters
    ----------
    activations
        Function of the pictures ``[N, C, H, W]``: activations of the feature.
    places
        Modules that return them.

    Attributes
    ----------
    excited, moved : Tensor ``[N]``
        Whether each picture had a gradient in some step; for `moved` one through rectifiers is enough.
    """

    def __init__(self, activations: Callable[[Tensor], Tensor], places: Iterable[nn.Module]) -> None:
        self._activations, self._places = activations, set(places)
        self.excited = self.moved = torch.zeros((), dtype=torch.bool)

    def check(self, done: int, steps: int, name: str) -> None:
        """Raise DeadFeatureError, which names the feature, if a picture has had no gradient until now.

        In the first steps one through rectifiers is enough; after all, it must have excited the feature itself.
        """
        alive = self.excited if done == steps else self.moved
        if done in (_PATIENCE, steps) and not bool(alive.all()):
            raise DeadFeatureError(
                f"{name} never fires: no view of the picture changes it. Either it does not depend on the image, or "
                "more steps, another seed or a photo to start with may excite it"
            )

    def roused(self, pictures: Tensor, gradient: Tensor, own: Tensor) -> Tensor:
        """Return the gradient to follow ``[N, C, H, W]``: that of silent pictures passes rectifiers.

        Parameters
        ----------
        pictures
            Those of this step.
        gradient
            Of what is optimised.
        own
            Of the feature alone, without what is subtracted from it.
        """
        exciting = own.flatten(1).any(1)
        if not bool(exciting.all()):
            with opened(self._places):
                (hint,) = torch.autograd.grad(self._activations(pictures).sum(), pictures)
            gradient = torch.where(exciting.view(-1, 1, 1, 1), gradient, hint)
        self.excited = exciting | self.excited.to(exciting.device)
        self.moved = gradient.flatten(1).any(1) | self.moved.to(exciting.device)
        return gradient


@contextmanager
def opened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let gradients pass rectifiers inside some modules as if they returned their input; their values stay."""
    mode = _Opening()
    hooks = []
    for module in modules:
        hooks += [module.register_forward_pre_hook(mode.enter), module.register_forward_hook(mode.leave)]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Opening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def enter(self, *_: object) -> None:
        self._depth += 1

    def leave(self, *_: object) -> None:
        self._depth -= 1

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = args[0] if args else kwargs.get("input")
        if self._depth == 0 or name_of(function) not in _RECTIFIERS or not isinstance(given, Tensor):
            return function(*args, **kwargs)
        before = given.clone()  # which the function may change in place
        result = function(*args, **kwargs)
        return result + (before - before.detach()).where(result != before, 0)
