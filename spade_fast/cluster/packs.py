"""Files of many samples in one: zip files without compression, which ``unzip`` turns into single files again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from spade_fast.trace import whole_file

_COPIED = 1 << 20  # bytes at a time


class Packs:
    """The zip files of a batch. Their members are samples' files, by the names they had in the batch's folder.

    Parameters
    ----------
    folder
        Of the batch; the zip files are in ``packs``.
    run
        Hash of the run, which each of them has as its comment.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run
        self._packs: dict[str, Path] = {}
        self._notes: dict[str, str] = {}
        self._seen: set[Path] = set()

    def refresh(self) -> None:
        """Look for new zip files; ValueError if one is of another run."""
        for path in self.paths():
            if path not in self._seen:
                self._seen.add(path)
                self._read(path)

    def paths(self) -> list[Path]:
        """Return all zip files, damaged ones too."""
        return sorted((self._folder / "packs").glob("[!.]*.zip"))

    def __contains__(self, stem: str) -> bool:
        return stem in self._packs

    def pack(self, stem: str) -> Path:
        """Return the zip file of a sample; KeyError if none has it."""
        return self._packs[stem]

    def note(self, stem: str) -> str:
        """Return what was noted of a packed sample."""
        return self._notes[stem]

    def write(self, notes: Mapping[str, str], names: Sequence[str]) -> None:
        """Copy samples' files into a new zip file, with notes of samples; OSError if that fails."""
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
            with ZipFile(path) as archive:
                run, entries = archive.comment.decode(), archive.infolist()
        except BadZipFile:
            return
        if run != self._run:
            raise ValueError(f"{path} was made by a run of other settings or another model")
        for entry in entries:
            stem = PurePosixPath(entry.filename).stem
            if entry.filename.startswith("traces/"):
                self._packs[stem], self._notes[stem] = path, entry.comment.decode()


def packed_stems(archive: ZipFile) -> Iterator[str]:
    """The samples of a zip file, by the name of their files."""
    return (PurePosixPath(name).stem for name in archive.namelist() if name.startswith("traces/"))


def pack_stem(stems: Iterable[str]) -> str:
    """Return the name of the zip file for samples: the same one for the same samples."""
    return hashlib.sha256("\n".join(sorted(stems)).encode()).hexdigest()[:32]
