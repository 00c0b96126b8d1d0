"""Reading files, and writing files and folders that appear only when they are complete; errors name the path."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from spade_fast._util.errors import InputError, MissingFileError, OutputError, UserError


def check_file(path: Path, what: str) -> None:
    """Raise OutputError if a file cannot be written there later."""
    with writing(path):
        if not path.parent.is_dir() or (path.exists() and not path.is_file()):
            why = f"folder {path.parent} does not exist"
            if path.exists():
                why = f"{path} is a folder" if path.is_dir() else f"{path} is not a regular file"
            raise OutputError(f"cannot write {what}: {why}")
    with _named_errors(path, what), tempfile.TemporaryFile(dir=path.parent):
        pass


def is_file(path: Path) -> bool:
    """Whether a file exists; errors as in :func:`reading`."""
    with reading(path):
        return path.is_file()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the ``with`` block into InputError or MissingFileError, which name the file or folder."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else InputError
        raise kind(error.errno, f"cannot be read: {error.strerror or error}", str(path)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the ``with`` block into OutputError, which names the file or folder."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror or str(error), str(path)) from error


def read_bytes(path: Path) -> bytes:
    """Read a file; raise the errors of :func:`reading`."""
    with reading(path):
        return path.read_bytes()


def write_whole(path: Path, contents: bytes, what: str) -> None:
    """Write a file that appears only when it is complete and on disk; errors name `what` it contains."""
    with whole_file(path, what) as file, _named_errors(path, what):
        file.write(contents)


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[IO[bytes]]:
    """Open a file that appears only when the ``with`` block has ended and it is on disk.

    Errors of the file itself are OutputErrors that name `what` it holds, or MissingFileErrors where its folder is
    missing; those of the block are passed on.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _named_errors(path, what):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            with _named_errors(path, what):
                file.flush()
                os.fsync(file.fileno())
        with _named_errors(path, what):
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def _named_errors(path: Path, what: str) -> Iterator[None]:
    """The system's message would name the temporary file, which the user does not know."""
    try:
        yield
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else OutputError
        raise kind(error.errno, f"cannot write {what}: {error.strerror}", str(path)) from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder in `out`; its files are moved into `out` when the block ends without an exception."""
    with writing(out):
        made = [path for path in [out, *out.parents] if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out))
    except OSError as error:
        raise OutputError(f"cannot write into the output folder {out}: {error.strerror or error}") from error
    try:
        yield temporary
        with writing(out):
            for path in sorted(temporary.iterdir()):
                os.replace(path, out / path.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    shutil.rmtree(temporary)
