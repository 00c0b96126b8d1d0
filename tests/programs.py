"""Runs Python programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys


def run(program: str) -> None:
    """Run a program that prints "ok" if all is well."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr
