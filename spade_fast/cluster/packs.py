"""Files of many samples in one: zip files without compression, which ``unzip`` turns into single files again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from spade_fast.trace import whole_file


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

    def write(self, stems: Sequence[str], names: Sequence[str]) -> None:
        """Copy samples' files into a new zip file; OSError if that fails."""
        path = self._folder / "packs" / f"{pack_stem(stems)}.zip"
        path.parent.mkdir(exist_ok=True)
        with whole_file(path, "a pack") as file, ZipFile(file, "w", strict_timestamps=False) as archive:
            archive.comment = self._run.encode()
            for name in names:
                archive.write(self._folder / name, name)
        self._packs.update(dict.fromkeys(stems, path))

    def _read(self, path: Path) -> None:
        try:
            with ZipFile(path) as archive:
                run, stems = archive.comment.decode(), list(packed_stems(archive))
        except BadZipFile:
            return
        if run != self._run:
            raise ValueError(f"{path} was made by a run of other settings or another model")
        self._packs.update(dict.fromkeys(stems, path))


def packed_stems(archive: ZipFile) -> Iterator[str]:
    """The samples of a zip file, by the name of their files."""
    return (PurePosixPath(name).stem for name in archive.namelist() if name.startswith("traces/"))


def pack_stem(stems: Sequence[str]) -> str:
    """Return the name of the zip file for samples: the same one for the same samples."""
    return hashlib.sha256("\n".join(sorted(stems)).encode()).hexdigest()[:32]
