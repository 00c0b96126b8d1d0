"""Versions of the packages that results depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions_of(*packages: str) -> dict[str, str]:
    """Return the version of each distribution, ``"not installed"`` for those that are missing."""
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
