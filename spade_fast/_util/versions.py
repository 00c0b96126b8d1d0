"""Versions of installed packages, which results record because they can depend on them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions_of(*packages: str) -> dict[str, str]:
    """Return the version of each distribution, or ``"not installed"``."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def library_version() -> str:
    """Return the version of this package."""
    return versions_of("spade_fast")["spade_fast"]
