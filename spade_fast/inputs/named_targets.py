"""Targets as commands and batches are given them: classes of a network by index or name, and ``module:callable``."""

from __future__ import annotations

import importlib
import re

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.inputs.networks import LoadedModel
from spade_fast.targets.class_names import class_index
from spade_fast.targets.target import Target, class_number, function_target

_FUNCTION = re.compile(r"[\w.]+:\w+")


def named_class(option: str, given: int | str, model: LoadedModel, classes: int) -> int:
    """Return the index of a class of a network with so many; otherwise raise TypeError or ValueError."""
    allowed = f"a class from 0 to {classes - 1}"
    if not isinstance(given, str):
        try:
            given = class_number(given)
        except InvalidTypeError as error:
            raise InvalidTypeError(
                f"{option} must be {allowed} or a name, in batches also that of a function, 'module:callable', got "
                f"{given!r}"
            ) from error
    if names_function(given):
        raise InvalidValueError(
            f"{option} must be {allowed} or a name; a function, {given!r}, is what batches take, and Spade in Python"
        )
    index = class_index(given, model.class_names, allowed)
    if not 0 <= index < classes:
        raise InvalidValueError(f"{option} must be {allowed}, got {index}")
    return index


def names_function(given: int | str | None) -> bool:
    """Whether a target is the name of a function, ``module:callable``."""
    return isinstance(given, str) and _FUNCTION.fullmatch(given) is not None


def named_function(name: str) -> Target:
    """Return the target ``module:callable``, a function of a network's output.

    Raises
    ------
    TypeError, ValueError
        It does not exist, or is not a function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InvalidValueError(f"target {name!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise InvalidTypeError(f"target {name!r} must be a function of the network's output, got {found!r}")
    return function_target(found)
