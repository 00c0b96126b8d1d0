"""Zip files, uncompressed, that hold the files of many samples; ``unzip`` restores the single files."""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.files import open_regular, whole_file, write_whole

_COPIED = 1 << 20  # bytes at a time
_DAMAGE = (EOFError, RuntimeError, ValueError, struct.error, zlib.error, lzma.LZMAError)


class Packs:
    """The zip files of a batch. Their members are the files of samples, under their names in the batch's folder.

    Parameters
    ----------
    folder
        Folder of the batch; the zip files are in ``packs``.
    run
        Hash of the run, which is the comment of each zip file.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run
        self._members: dict[str, tuple[Path, str]] = {}
        self._seen: set[str] = set()
        self._damaged: set[Path] = set()

    def refresh(self) -> None:
        """Read new zip files, and forget removed ones; ValueError if one belongs to another run."""
        names = self._names()
        for path in {self._folder / "packs" / name for name in self._seen - names}:
            self._members = {stem: member for stem, member in self._members.items() if member[0] != path}
            self._damaged.discard(path)
        self._seen &= names
        for name in names - self._seen:
            self._read(self._folder / "packs" / name)
            self._seen.add(name)

    def damaged(self) -> list[Path]:
        """Return the zip files that could not be read."""
        return sorted(self._damaged)

    def paths(self) -> list[Path]:
        """Return all zip files, also damaged ones."""
        return [self._folder / "packs" / name for name in sorted(self._names())]

    def _names(self) -> set[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(self._folder / "packs")
            return {name for name in names if name.endswith(".zip") and not name.startswith(".")}
        return set()

    def __contains__(self, stem: str) -> bool:
        return stem in self._members

    def pack(self, stem: str) -> Path:
        """Return the zip file that contains a sample; KeyError if none does."""
        return self._members[stem][0]

    def note(self, stem: str) -> str:
        """Return the note of a packed sample."""
        return self._members[stem][1]

    def unpack(self, path: Path, names: Iterable[str]) -> None:
        """Write those of these files that a zip file has, in this order, and set it aside; OSError if that fails."""
        with suppress(BadZipFile), open_pack(path) as archive:
            for name in names:
                if name in archive.NameToInfo:
                    write_whole(self._folder / name, read_member(archive, name), "results")
        with suppress(FileNotFoundError):  # another process has done it
            path.replace(path.with_name(f"{path.name}.damaged"))

    def write(self, notes: Mapping[str, str], names: Sequence[str]) -> None:
        """Copy files of samples into a new zip file, with a note for each sample; OSError if that fails."""
        path = self._folder / "packs" / f"{pack_stem(notes)}.zip"
        path.parent.mkdir(exist_ok=True)
        with whole_file(path, "a pack") as file, ZipFile(file, "w") as archive:
            archive.comment = self._run.encode()
            for name in names:
                entry = ZipInfo.from_file(self._folder / name, name, strict_timestamps=False)
                entry.comment = notes[PurePosixPath(name).stem].encode()
                with (self._folder / name).open("rb") as single, archive.open(entry, "w") as member:
                    shutil.copyfileobj(single, member, _COPIED)
        self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with open_pack(path) as archive:
                run, entries = archive.comment, {entry.filename: entry.comment.decode() for entry in archive.infolist()}
        except BadZipFile:
            self._damaged.add(path)
            return
        if run != self._run.encode():
            raise InvalidValueError(f"{path} was made by a run of other settings or another model, or is damaged")
        for name, note in entries.items():
            if is_trace(name):
                self._members[PurePosixPath(name).stem] = path, note


def is_trace(name: str) -> bool:
    """Whether a file in the folder or in a zip file is a trace."""
    return name.startswith("traces/") and name.endswith(".safetensors") and name.count("/") == 1


@contextmanager
def open_pack(path: Path) -> Iterator[ZipFile]:
    """Open a zip file for reading; raise BadZipFile if it is damaged, or is not a pack, as a compressed one is not."""
    with damage_as_one_error(), open_regular(path) as file, ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise BadZipFile("it has compressed members")
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise BadZipFile("its members are larger than it is")
        if len(archive.NameToInfo) != len(entries):
            raise BadZipFile("it has a member twice")
        yield archive


def read_member(archive: ZipFile, name: str) -> bytes:
    """Read a file in a zip file; BadZipFile for any damage, KeyError if it does not exist."""
    with damage_as_one_error():
        return archive.read(name)


@contextmanager
def damage_as_one_error() -> Iterator[None]:
    """Raise BadZipFile for every error that `zipfile` raises for a damaged zip file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # None: bad bzip2; EINVAL: an offset before the file begins
            raise
        raise BadZipFile(str(error)) from error
    except _DAMAGE as error:
        raise BadZipFile(str(error)) from error


def pack_stem(stems: Iterable[str]) -> str:
    """Return the name of the zip file for samples: the same for the same samples."""
    return hashlib.sha256("\n".join(sorted(stems)).encode()).hexdigest()[:32]
