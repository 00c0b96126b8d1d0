"""Function signatures as `help` and documentation tools show them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_fields_of(config: type, but: str = "") -> Callable[[_Function], _Function]:
    """Show the fields of a dataclass, except the one called `but`, in a signature instead of ``**options``."""

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        names = {one.name for one in own}
        shown = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=field.type,
            )
            for field in fields(config)
            if field.name not in names and field.name != but
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate
