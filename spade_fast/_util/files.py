"""Where commands compute, and where they write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def check_device(name: str) -> None:
    """Raise ValueError if tensors cannot be on the device of this name."""
    try:
        torch.zeros(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out`, whose files are moved into `out` at the end, and only if nothing failed."""
    made = [path for path in [out, *out.parents] if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out))
    except OSError as error:
        raise OSError(f"cannot write into the output folder {out}: {error.strerror or error}") from error
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            os.replace(path, out / path.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    shutil.rmtree(temporary)
