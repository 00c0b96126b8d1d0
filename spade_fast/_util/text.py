"""Parts of messages: numbers of things, lists of names that are cut short, and the reason that another error gives."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return up to `most` names, separated by commas, and the number of those left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, what: str) -> str:
    """Return a number and what it counts, such as ``"1 trace"`` or ``"2 traces"``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, or the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
