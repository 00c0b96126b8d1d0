"""The command line, ``spade-fast``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point ``spade-fast``."""
    from spade_fast._util.errors import MissingExtraError

    try:
        from spade_fast.cli.app import run
    except MissingExtraError as error:
        raise SystemExit(f"error: {error}") from error
    run()
