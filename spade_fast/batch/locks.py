"""Claims of processes on samples in the folder of a batch: file locks, which end with their process."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from spade_fast._util.files import writing

_FILE = ".locks"
_OPENING = 1 << 60  # beyond the offsets of all names


class Claims:
    """The claims of this process in a folder: bytes of one file that it has locked.

    On a file system without locks all claims succeed: samples may then be done twice, with the same result.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._file: int | None = None

    def close(self) -> None:
        """Give up all claims."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextmanager
    def of(self, stems: Sequence[str]) -> Iterator[list[bool]]:
        """Claim files by their stems during a ``with`` block; yields for each whether no other process has claimed it.

        Raises
        ------
        OutputError
            The folder cannot be written.
        """
        places = [int.from_bytes(hashlib.sha256(stem.encode()).digest()[:7], "big") for stem in stems]
        free = [self._lock(place) for place in places]
        try:
            yield free
        finally:
            for place, mine in zip(places, free, strict=True):
                self._unlock(place, mine)

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Keep other processes out of such a block; OutputError as above."""
        locked = self._lock(_OPENING, wait=True)
        try:
            yield
        finally:
            self._unlock(_OPENING, locked)

    def _lock(self, place: int, wait: bool = False) -> bool:
        if self._file is None:
            with writing(self._path):
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

    def _unlock(self, place: int, locked: bool) -> None:
        if locked and self._file is not None:
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
