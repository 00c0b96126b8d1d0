"""Orderly termination on SIGTERM, the signal with which batch systems end a job."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM


@contextmanager
def exit_on_sigterm(grace: float = 8.0) -> Iterator[None]:
    """Raise SystemExit on SIGTERM during the ``with`` block; end the process if the block lasts `grace` seconds longer.

    The exception is raised only once native code returns, which can take long for a large layer. Use it in the main
    thread only.
    """
    left = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and not left.wait(grace):
                os._exit(EXIT_STATUS)
        os.close(reader)

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_STATUS)

    before = signal.signal(signal.SIGTERM, stop)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)
