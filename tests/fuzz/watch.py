"""Runs a program in child processes and notices what a child cannot report: that it crashed, or that it hangs."""

from __future__ import annotations

import os
import selectors
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Findings:
    """How many calls ended in which way, and what went wrong, by the number of the call."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)


def watch(command: Callable[[int], list[str]], first: int, last: int, patience: float) -> Findings:
    """Run calls `first` to `last` - 1; after a crash, or a call that takes `patience` seconds, resume behind it.

    Parameters
    ----------
    command
        Makes the command of a child that runs the calls from a number on. It prints ``call NUMBER`` before each, and
        after it ``ok OUTCOME``, or ``fail`` and what is wrong.
    """
    findings = Findings()
    while first < last:
        first = _watch_child(command(first), first, last, patience, findings)
    return findings


def _watch_child(command: list[str], first: int, last: int, patience: float, findings: Findings) -> int:
    """Follow one child; return the number of the first call that is left."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    current, pending = first, b""
    with child, selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(patience):
                child.kill()
                findings.failures[current] = f"hangs: no end within {patience:g} s"
                return current + 1
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                word, _, rest = line.decode().partition(" ")
                if word == "call":
                    current = int(rest)
                elif word == "ok":
                    findings.outcomes[rest] += 1
                elif word == "fail":
                    findings.failures[current] = rest
        errors = child.stderr.read().decode(errors="replace")
    if child.returncode == 0:
        return last
    findings.failures[current] = f"crashes: exit code {child.returncode}: {errors[-2000:]}"
    return current + 1
