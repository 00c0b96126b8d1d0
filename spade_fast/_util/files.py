"""Reading files, and writing files and folders that appear only when they are complete; errors name the path."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from spade_fast._util.errors import InputError, MissingFileError, OutputError, UserError
from spade_fast._util.strict_json import parse_json
from spade_fast._util.text import listed

# The file of a result folder that names all its files, and so tells a later run what it may replace.
REPORT = "report.json"


def check_file(path: Path, what: str) -> None:
    """Raise OutputError if a file cannot be written there later."""
    with writing(path):
        _check_replaceable(path, what)
        if not path.parent.is_dir():
            raise OutputError(f"cannot write {what}: folder {path.parent} does not exist")
    with _named_errors(path, what), tempfile.TemporaryFile(dir=path.parent):
        pass


def is_file(path: Path) -> bool:
    """Whether a file exists; errors as in :func:`reading`, also for a pipe or device."""
    with reading(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(errno.EINVAL, "Not a regular file")
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


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or one of the system's own."""
    return name.startswith(".") or is_system_file(name)


def is_system_file(name: str) -> bool:
    """Whether macOS, Windows or a NAS writes files or folders of this name beside those of the user."""
    return name.startswith("._") or name in ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")


def read_bytes(path: Path) -> bytes:
    """Read a file; raise the errors of :func:`reading`."""
    with reading(path), open_regular(path) as file:
        return file.read()


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading; raise OSError for a folder, pipe or device, without waiting for data."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            raise OSError(errno.EISDIR, "Is a directory") if is_folder else OSError(errno.EINVAL, "Not a regular file")
        return descriptor

    return open(path, "rb", opener=opener)


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
        _check_replaceable(path, what)
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


def _check_replaceable(path: Path, what: str) -> None:
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise OutputError(f"cannot write {what}: {path} is {kind}")


@contextmanager
def _named_errors(path: Path, what: str) -> Iterator[None]:
    """The system's message would name the temporary file, which the user does not know."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else OutputError
        raise kind(error.errno, f"cannot write {what}: {error.strerror}", str(path)) from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder in `out`, whose files replace those of an earlier run if the block ends without error.

    One of the files that the block writes is `REPORT`: a JSON object whose entries ``"files"`` and ``"versions"`` name
    all of them and show that this package wrote them.

    Raises
    ------
    OutputError
        `out` cannot be written, or has files that no earlier run wrote, other than hidden ones.
    """
    with writing(out):
        made = [path for path in [out, *out.parents] if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_others(out)
        temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out))
    except UserError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write into the output folder {out}: {error.strerror or error}") from error
    try:
        yield temporary
        with writing(out):
            _exchange(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    shutil.rmtree(temporary)


def _refuse_others(out: Path) -> None:
    earlier = _written_files(out)
    others = sorted(path.name for path in out.iterdir() if path.name not in earlier and not is_hidden(path.name))
    if others:
        raise OutputError(
            f"the output folder {out} has files that no earlier run wrote ({listed(others)}): choose another"
        )


def _written_files(out: Path) -> list[str]:
    """Return the files of a folder that the report of an earlier run names, itself among them; none without one."""
    try:
        report = parse_json((out / REPORT).read_bytes(), finite=False)
        names = report["files"] if "spade_fast" in report["versions"] else []
    except (OSError, ValueError, TypeError, KeyError):
        return []
    if not isinstance(names, list) or REPORT not in names:
        return []
    return [path.name for path in out.iterdir() if path.name in names and path.is_file()]


def _exchange(new: Path, out: Path) -> None:
    """Move the files of a folder into `out` in place of the earlier run's; if that fails, leave `out` as it was."""
    names = [path.name for path in new.iterdir()]
    old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=out))
    try:
        for name in _written_files(out):
            os.replace(out / name, old / name)
        for name in names:
            os.replace(new / name, out / name)
    except BaseException:
        for name in names:
            if not (new / name).exists():
                os.replace(out / name, new / name)
        for path in old.iterdir():
            os.replace(path, out / path.name)
        old.rmdir()
        raise
    shutil.rmtree(old)
