"""Signals that wait until critical code is done.

Python runs signal handlers between any two instructions, also in the first one of ``__exit__``; a handler that raises,
as that of Ctrl-C does, would end critical code halfway. While `watch` is on, such handlers run at once outside the
functions marked `critical`, and inside them only when they call `deliver`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import CodeType, FrameType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Handler = Callable[[int, FrameType | None], Any]

_NUMBERS = tuple(signal.valid_signals())
_critical: set[CodeType] = set()
_handlers: dict[int, _Handler] = {}  # those that `_handle` stands in for
_watching = 0
pending: list[int] = []


def critical(function: _Function) -> _Function:
    """Mark a function: a signal that arrives in it, or in what it calls, waits for `deliver`."""
    _critical.add(function.__code__)
    return function


def watch() -> bool:
    """Let signals wait in critical code until `unwatch`; return False in threads that receive no signals."""
    global _watching
    if threading.current_thread() is not threading.main_thread():
        return False
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _handle:
            _handlers[number] = handler
            signal.signal(number, _handle)
    _watching += 1
    return True


def unwatch() -> None:
    """End what `watch` began; handlers that were installed meanwhile stay."""
    global _watching
    _watching -= 1
    if _watching == 0 and threading.current_thread() is threading.main_thread():
        for number, handler in _handlers.items():
            if signal.getsignal(number) is _handle:
                signal.signal(number, handler)


def deliver() -> None:
    """Run the handlers of the signals that are waiting; all of them, also if one raises."""
    with ExitStack() as stack:
        while pending:
            number = pending.pop()
            stack.callback(_handlers[number], number, sys._getframe())


def _handle(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code in _critical:
            if number not in pending:
                pending.append(number)
            return
        caller = caller.f_back
    _handlers[number](number, frame)
