"""The folder of a batch: what is finished, what failed, and for which settings.

``run.json`` says what the results depend on. A sample is finished when its file is in ``traces``, where it appears
whole. Beside it are ``maps`` (explanations, safetensors), ``reports`` (seconds; no result depends on them) and
``errors`` (JSON).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spade_fast.cluster.job import Job
from spade_fast.cluster.samples import file_name
from spade_fast.trace import write_whole

RUN_FILE = "run.json"
FORMAT = "spade_fast.batch"
_FOLDERS = ("traces", "maps", "reports", "errors")
_LOCKS = ".locks"
_OPENING = 1 << 60  # behind the places of all samples
_TEMPORARY = ".*.tmp"


class OutputError(OSError):
    """A result cannot be written: the run cannot go on."""


class Store:
    """The folder of a job; `open` makes it ready, workers only use it.

    Raises
    ------
    OutputError
        From every method that writes.
    """

    def __init__(self, job: Job) -> None:
        self.folder, self.hash, self._facts = job.folder, job.hash, job.facts
        self._claims: int | None = None

    def open(self) -> None:
        """Make the folder, or check that it belongs to the same settings and network.

        Raises
        ------
        ValueError
            It belongs to others, or holds other things.
        """
        self.check()
        with _writing(self.folder):
            for name in ("traces", "reports", "errors", *(["maps"] if self._facts["methods"] else [])):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        locked = self._lock(_OPENING, wait=True)  # another run may begin at the same time
        try:
            self.check()
            if not (self.folder / RUN_FILE).exists():
                self._write(self.folder / RUN_FILE, {"format": FORMAT, "hash": self.hash, "settings": self._facts})
        finally:
            self._unlock(_OPENING, locked)

    def close(self) -> None:
        """Give up all claims."""
        if self._claims is not None:
            os.close(self._claims)
            self._claims = None

    def check(self) -> None:
        """Raise ValueError if results of this job may not be in the folder."""
        path = self.folder / RUN_FILE
        if not path.exists():
            entries = self.folder.iterdir() if self.folder.is_dir() else ()
            if any(entry.name not in _FOLDERS and not entry.name.startswith(".") for entry in entries):
                raise ValueError(f"{self.folder} is not empty, and not the folder of a batch")
            return
        run = read_run(self.folder)
        if run["hash"] != self.hash:
            old, new = run["settings"], self._facts
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            changes = [f"{name} {_short(old.get(name))} there, {_short(new.get(name))} now" for name in names]
            raise ValueError(
                f"{self.folder} holds results of another run ({'; '.join(changes)}): choose another folder"
            )

    def trace_path(self, sample_id: str) -> Path:
        """Where the sample's trace lies once it is finished."""
        return self.folder / "traces" / f"{file_name(sample_id)}.safetensors"

    def maps_path(self, sample_id: str) -> Path:
        """Where the sample's explanations lie."""
        return self.folder / "maps" / f"{file_name(sample_id)}.safetensors"

    def finished(self, sample_id: str) -> bool:
        """Whether the sample's file is there, whole and of this run.

        Raises
        ------
        ValueError
            It belongs to another run.
        """
        header = read_header(self.trace_path(sample_id))
        if header is None:
            return False
        if header["header"].get("run") != self.hash:
            raise ValueError(f"{self.trace_path(sample_id)} was made by a run of other settings or another model")
        return True

    def record(self, sample_id: str, report: dict[str, Any]) -> None:
        """Write down what is to be known of a sample besides its results."""
        self._write(self.folder / "reports" / f"{file_name(sample_id)}.json", {"id": sample_id, **report})

    def record_error(self, sample_id: str, error: str) -> None:
        """Write down why a sample failed."""
        self._write(self._error_path(sample_id), {"id": sample_id, "error": error})

    def forget_error(self, sample_id: str) -> None:
        """Remove the error of an earlier run."""
        with _writing(self.folder):
            self._error_path(sample_id).unlink(missing_ok=True)

    @contextmanager
    def claimed(self, sample_ids: Sequence[str]) -> Iterator[list[bool]]:
        """Claim samples for the length of a ``with`` block; for each, whether no other process has it at the moment.

        A claim ends with its process, whatever ends that. On a file system without locks all claims succeed: work may
        then be done twice, with the same result.
        """
        places = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in sample_ids]
        free = [self._lock(place) for place in places]
        try:
            yield free
        finally:
            for place, mine in zip(places, free, strict=True):
                self._unlock(place, mine)

    def remove_leftovers(self, sample_ids: Sequence[str]) -> None:
        """Remove temporary files of killed processes, but none of samples that a process has at the moment."""
        names = {file_name(sample_id): sample_id for sample_id in sample_ids}
        for path in self.folder.glob(f"*/{_TEMPORARY}"):
            owner = names.get(path.name[1:].rsplit(".", 3)[0])
            if owner is None:
                continue
            with self.claimed([owner]) as (free,):
                if free:
                    path.unlink(missing_ok=True)

    def _lock(self, place: int, wait: bool = False) -> bool:
        with _writing(self.folder):
            if self._claims is None:
                self._claims = os.open(self.folder / _LOCKS, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

    def _unlock(self, place: int, locked: bool) -> None:
        if locked and self._claims is not None:
            with suppress(OSError):
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, place)

    def _error_path(self, sample_id: str) -> Path:
        return self.folder / "errors" / f"{file_name(sample_id)}.json"

    def _write(self, path: Path, contents: dict[str, Any]) -> None:
        with _writing(path):
            write_whole(path, json.dumps(contents, indent=1).encode(), "results")


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json``; ValueError if the folder is not that of a batch."""
    try:
        run = json.loads((folder / RUN_FILE).read_bytes())
        if run["format"] == FORMAT and isinstance(run["hash"], str) and isinstance(run["settings"], dict):
            return run
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder} is not the folder of a batch: {RUN_FILE} is missing or damaged")


def read_header(path: Path) -> dict[str, Any] | None:
    """Read what a trace file says of itself; None if it is not there or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["trace"])
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(error.errno, error.strerror or str(error), str(path)) from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
