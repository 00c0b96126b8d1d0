"""Classes by index and name: which one is meant, the names that a network knows, and how messages call a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spade_fast._util.checks import nearest, plain
from spade_fast._util.errors import InvalidValueError
from spade_fast._util.text import listed

_MOST_LISTED = 10


def class_index(given: int | str, names: Sequence[str], allowed: str) -> int:
    """Return the index of a class.

    A name is a class's whole name or one of its parts between commas, whatever its case, blanks and punctuation; if
    several classes match, the ones with exactly this name count.

    Parameters
    ----------
    given
        An index, as a number or text, which is returned as it is; or a name.
    names
        Names of the classes; empty if they are unknown.
    allowed
        What the error for a network without class names asks for, such as ``"a class from 0 to 9"``.

    Raises
    ------
    ValueError
        No class or more than one has this name; the message lists those that may be meant.
    """
    if isinstance(given, int) or given.removeprefix("-").isdecimal():
        return int(given)
    if not names:
        raise InvalidValueError(f"the network brings no class names: give {allowed} instead of {given!r}")
    wanted = plain(given)
    found = [index for index, name in enumerate(names) if wanted and wanted in map(plain, [name, *name.split(",")])]
    exact = [index for index in found if names[index].casefold() == given.casefold()]
    found = exact if len(exact) == 1 else found
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidValueError(f"{given!r} names several classes: choose the index of {_described(found, names)}")
    near = [index for index, name in enumerate(names) if wanted and wanted in plain(name)]
    near = near or [names.index(name) for name in nearest(given, names)]
    hint = f": did you mean {_described(near, names)}?" if near else ""
    raise InvalidValueError(f"the network has no class {given!r}{hint}")


def class_names_of(model: Any) -> Sequence[str]:
    """Return the names of a network's classes in its Hugging Face configuration; an empty sequence without one."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or set(names) != set(range(len(names))):
        return ()
    return [str(names[index]) for index in range(len(names))]


def class_label(index: int, name: str) -> str:
    """Return a class as messages call it, ``“crane” (134)``; `name` is that of `LoadedModel.class_name`."""
    unnamed = f"class {index}"
    return unnamed if name == unnamed else f"“{name}” ({index})"


def _described(indices: Iterable[int], names: Sequence[str]) -> str:
    return listed([f"{names[index]!r} ({index})" for index in indices], _MOST_LISTED)
