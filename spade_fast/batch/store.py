"""Writes the folder of a batch: which samples are finished, which failed, and for which settings.

``run.json`` contains what the results depend on. A sample is finished when its file is in ``traces``, where it appears
complete, and none of its files is damaged. The other folders are ``maps`` (explanations, safetensors), ``reports``
(JSON: seconds, worker; no result depends on them) and ``errors`` (JSON). A zip file in ``packs`` contains the files of
many finished samples instead.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from spade_fast._util.errors import InvalidValueError, OutputError
from spade_fast._util.files import is_file, read_bytes, reading, write_whole, writing
from spade_fast.batch.job import Job
from spade_fast.batch.locks import Claims
from spade_fast.batch.packs import Packs, pack_stem
from spade_fast.batch.results import (
    FORMAT,
    RUN_FILE,
    maps_name,
    read_pack,
    read_run,
    read_sample,
    report_file,
    report_name,
    trace_name,
)
from spade_fast.batch.samples import Source, file_name

_FOLDERS = ("traces", "maps", "reports", "errors", "packs")
_TEMPORARY = ".*.tmp"


class Store:
    """The folder of a job; `open` prepares it, workers only use it.

    Raises
    ------
    OutputError
        From every method that writes.
    """

    def __init__(self, job: Job) -> None:
        self.folder, self.hash, self._facts = job.folder, job.hash, job.facts
        self._packs = Packs(job.folder, job.hash)
        self._claims = Claims(job.folder)
        self._damaged: dict[Path, list[str]] = {}  # zip files, with their intact samples

    def open(self) -> None:
        """Make the folder, or check that it belongs to the same settings and network.

        The intact samples of zip files that `todo` found damaged become single files; the zip files are renamed.

        Raises
        ------
        ValueError
            It belongs to others, or contains other files.
        """
        self.check()
        with writing(self.folder):
            for name in ("traces", "reports", "errors", *(["maps"] if self._facts["methods"] else [])):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        with self._claims.of_all():  # another run may begin at the same time
            self.check()
            if not (self.folder / RUN_FILE).exists():
                run = {"format": FORMAT, "hash": self.hash, "settings": self._facts}
                self._write(self.folder / RUN_FILE, json.dumps(run, indent=1).encode())
            for path, stems in self._damaged.items():
                with self._claims.of(stems) as free, writing(self.folder):
                    if all(free):  # otherwise the next run does it
                        names = [name for stem in stems for name in reversed(_names(stem))]
                        self._packs.unpack(path, names)

    def close(self) -> None:
        """Give up all claims."""
        self._claims.close()

    def check(self) -> None:
        """Raise ValueError if results of this job may not be written into the folder."""
        if not is_file(self.folder / RUN_FILE):
            with reading(self.folder):
                entries = list(self.folder.iterdir()) if self.folder.is_dir() else []
            if any(entry.name not in _FOLDERS and not entry.name.startswith(".") for entry in entries):
                raise InvalidValueError(f"{self.folder} is not empty, and not the folder of a batch")
            return
        run = read_run(self.folder)
        if run["hash"] != self.hash:
            old, new = run["settings"], self._facts
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            changes = [f"{name} {_short(old.get(name))} there, {_short(new.get(name))} now" for name in names]
            raise InvalidValueError(
                f"{self.folder} holds results of another run ({'; '.join(changes)}): choose another folder"
            )

    def check_writable(self) -> None:
        """Raise OutputError if the folder cannot be written, without writing anything."""
        with writing(self.folder):
            place = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise OutputError(errno.EACCES, "it is not a folder that can be written", str(place))

    def trace_path(self, sample_id: str) -> Path:
        """Path of a sample's trace."""
        return self.folder / trace_name(file_name(sample_id))

    def maps_path(self, sample_id: str) -> Path:
        """Path of a sample's explanations."""
        return self.folder / maps_name(file_name(sample_id))

    def refresh(self) -> None:
        """Read what other processes have packed since."""
        self._packs.refresh()

    def todo(self, source: Source) -> list[int]:
        """Read all files, and return the samples that are not finished; errors are those of `finished`."""
        self.refresh()
        lost = self._lost()
        single = {path.stem for path in self.folder.glob(trace_name("[!.]*"))}
        there = [
            (stem := file_name(name)) in single or (stem in self._packs and stem not in lost) for name in source.ids
        ]
        return [index for index, found in enumerate(there) if not (found and self.finished(source, index))]

    def _lost(self) -> set[str]:
        """Return the samples that are damaged in zip files, and note which are intact beside them."""
        lost: set[str] = set()
        for path in self._packs.paths():
            try:
                found = read_pack(path, self.hash, self._facts["methods"])
                damaged = [stem for stem, intact in found.items() if not intact]
            except FileNotFoundError:  # another process has set it aside
                continue
            except BadZipFile:
                found, damaged = {}, [""]
            if damaged:
                self._damaged[path] = [stem for stem in found if stem not in damaged]
                lost.update(damaged)
        return lost

    def finished(self, source: Source, index: int) -> bool:
        """Whether a sample's files exist, intact and of this run; those in zip files are not read.

        Raises
        ------
        ValueError
            It belongs to another run, or to another sample.
        """
        name = source.ids[index]
        stem = file_name(name)
        if stem in self._packs:
            made_from = self._packs.note(stem)
        else:
            header = self._single(stem)
            if header is None:
                return False
            made_from = str(header.get("file_bytes"))
        size = str(source.size(index))
        if size != made_from and "None" not in (size, made_from):
            raise InvalidValueError(
                f"sample {name!r} is a file of {size} bytes now, and was one of {made_from} when it was finished in "
                f"{self.folder}: choose another folder or id"
            )
        return True

    def _single(self, stem: str) -> dict[str, Any] | None:
        """Return the header of a sample that is finished, and not packed; None if any of its files is damaged."""
        header = read_sample(stem, lambda name: read_bytes(self.folder / name), self._facts["methods"])
        if header is not None and header.get("run") != self.hash:
            raise InvalidValueError(
                f"{self.folder / trace_name(stem)} was made by a run of other settings or another model"
            )
        return header

    def pack(self, stems: Sequence[str]) -> None:
        """Move the files of finished samples, by their `file_name`, into a zip file."""
        with self._claims.of(stems) as free:
            self.refresh()
            mine = [stem for stem, is_free in zip(stems, free, strict=True) if is_free]
            headers = {stem: self._single(stem) for stem in mine if stem not in self._packs}
            new = {stem: str(header.get("file_bytes")) for stem, header in headers.items() if header is not None}
            with self._claims.of([pack_stem(new)]), writing(self.folder):
                if new:
                    self._packs.write(new, [name for stem in new for name in self._names(stem)])
                # A process may have been killed here: the trace is removed last, so that another finds the rest.
                for name in [name for stem in mine if stem in self._packs for name in reversed(self._names(stem))]:
                    (self.folder / name).unlink(missing_ok=True)

    def _names(self, stem: str) -> list[str]:
        return [name for name in _names(stem) if (self.folder / name).exists()]

    def pack_all(self, count: int) -> None:
        """Move the files of all finished samples into zip files of `count` samples."""
        stems = sorted(path.stem for path in self.folder.glob(trace_name("[!.]*")))
        for start in range(0, len(stems), count):
            self.pack(stems[start : start + count])

    def record(self, sample_id: str, report: dict[str, Any]) -> None:
        """Write the report of a sample: seconds, worker and warnings."""
        self._write(self.folder / report_name(file_name(sample_id)), report_file({"id": sample_id, **report}))

    def record_error(self, sample_id: str, error: str) -> None:
        """Write why a sample failed."""
        self._write(self._error_path(sample_id), report_file({"id": sample_id, "error": error}))

    def forget_error(self, sample_id: str) -> None:
        """Remove the error of an earlier run."""
        with writing(self.folder):
            self._error_path(sample_id).unlink(missing_ok=True)

    def claimed(self, sample_ids: Sequence[str]) -> AbstractContextManager[list[bool]]:
        """Claim samples during a ``with`` block; yields for each whether no other process has claimed it."""
        return self._claims.of([file_name(sample_id) for sample_id in sample_ids])

    def remove_leftovers(self) -> None:
        """Remove leftovers of killed processes: temporary files, and errors of samples that are now finished."""
        for path in [*self.folder.glob(_TEMPORARY), *self.folder.glob(f"*/{_TEMPORARY}")]:
            with self._claims.of([path.name[1:].rsplit(".", 3)[0]]) as (free,), writing(path):
                if free:
                    path.unlink(missing_ok=True)
        for path in self.folder.glob("errors/[!.]*.json"):
            if path.stem in self._packs or (self.folder / trace_name(path.stem)).exists():
                with writing(path):
                    path.unlink(missing_ok=True)

    def _error_path(self, sample_id: str) -> Path:
        return self.folder / "errors" / f"{file_name(sample_id)}.json"

    def _write(self, path: Path, contents: bytes) -> None:
        with writing(path):
            write_whole(path, contents, "results")


def _names(stem: str) -> tuple[str, ...]:
    return trace_name(stem), maps_name(stem), report_name(stem)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
