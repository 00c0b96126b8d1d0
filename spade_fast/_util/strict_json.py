"""JSON as files of this package contain it: each key once, little nesting, finite numbers; all else is one error."""

from __future__ import annotations

import json
import math
from typing import Any

_DEPTH = 40


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse JSON; raise ValueError if it is invalid, nested deeply, has a key twice or (`finite`) NaN or inf."""
    try:
        contents = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check(contents, finite, _DEPTH)
    return contents


def canonical_json(contents: Any) -> bytes:
    """Return the same bytes for equal contents, whatever the order of their keys."""
    return json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _check(value: Any, finite: bool, depth: int) -> None:
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise ValueError("it has a number that is not finite")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(inner, finite, depth - 1)
