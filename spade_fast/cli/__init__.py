"""The command line interface ``spade-fast``."""

from __future__ import annotations

from spade_fast._util.errors import MissingExtraError


def main() -> None:
    """Run the command line; this is the entry point of ``spade-fast``."""
    try:
        from spade_fast.cli.app import run_command_line
    except MissingExtraError as error:
        raise SystemExit(f"error: {error}") from error
    run_command_line()
