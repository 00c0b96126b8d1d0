"""Parts of messages."""

from __future__ import annotations

import pytest

from spade_fast._util.text import counted, first_line, listed


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_listed(names, expected):
    assert listed(names) == expected


@pytest.mark.parametrize(("number", "expected"), [(0, "0 traces"), (1, "1 trace"), (2, "2 traces")])
def test_counted(number, expected):
    assert counted(number, "trace") == expected


@pytest.mark.parametrize(
    ("message", "expected"), [("\n  one \ntwo", "one"), ("", "RuntimeError"), (" \n", "RuntimeError")]
)
def test_first_line(message, expected):
    assert first_line(RuntimeError(message)) == expected
