"""Reads the folder of a batch: names of its files, and `Results`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from torch import Tensor

from spade_fast._util.errors import InvalidValueError, UnknownSampleError
from spade_fast._util.files import read_bytes, reading
from spade_fast._util.safetensors_file import safetensors_metadata
from spade_fast.batch.packs import Packs, damage_as_one_error, is_trace
from spade_fast.batch.samples import file_name
from spade_fast.pruning.traces import Trace

_Read = TypeVar("_Read")

RUN_FILE = "run.json"
FORMAT = "spade_fast.batch"


def trace_name(stem: str) -> str:
    """Name of a trace's file inside the folder; `stem` is the `file_name` of the sample."""
    return f"traces/{stem}.safetensors"


def maps_name(stem: str) -> str:
    """Name of the file with the explanations of a sample."""
    return f"maps/{stem}.safetensors"


def report_name(stem: str) -> str:
    """Name of the file with the seconds, worker and warnings of a sample."""
    return f"reports/{stem}.json"


@dataclass(frozen=True)
class Stored:
    """A finished sample in the folder.

    Attributes
    ----------
    stem
        Its `file_name`; empty for a zip file that cannot be read.
    file
        File of the trace, or the zip file that contains it, relative to the folder.
    header
        Metadata of the trace's file; None if it is damaged.
    report
        Seconds, worker and warnings; empty if they are lost.
    """

    stem: str
    file: str
    header: dict[str, Any] | None
    report: dict[str, Any]


class Results(Mapping[str, Trace]):
    """The traces of a batch by sample id, from single or packed files; also while the batch is running.

    >>> results = Results("traces")                    # doctest: +SKIP
    >>> with results["cat.jpg"].applied(model): ...    # doctest: +SKIP

    Raises
    ------
    ValueError
        `folder` is not that of a batch; or, for an item, its file is damaged.
    KeyError
        For an item: the sample is not finished, or was not explained.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._packs = Packs(self._folder, read_run(self._folder)["hash"])

    def __getitem__(self, sample_id: str) -> Trace:
        name = trace_name(file_name(sample_id))
        return Trace.from_bytes(self._read(sample_id, name), str(self._folder / name))

    def __iter__(self) -> Iterator[str]:
        return (found.header["header"]["sample_id"] for found in self.stored() if found.header is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def maps(self, sample_id: str) -> dict[str, Tensor]:
        """Return the explanations of a sample, each ``[H, W]``, by name: ``"dense.METHOD"`` and ``"trace.METHOD"``."""
        name = maps_name(file_name(sample_id))
        try:
            return from_safetensors(self._read(sample_id, name))
        except SafetensorError as error:
            raise InvalidValueError(f"{self._folder / name} is damaged: {error}") from error

    def stored(self) -> Iterator[Stored]:
        """Iterate over all finished samples, each once, those in single files first."""
        self._packs.refresh()
        single = set()
        for path in sorted(self._folder.glob(trace_name("[!.]*"))):
            header = read_header(path)
            # A worker may be packing it at this moment.
            if path.stem not in self._packs and (header is not None or path.exists()):
                single.add(path.stem)
                report = read_json(self._folder / report_name(path.stem))
                yield Stored(path.stem, path.relative_to(self._folder).as_posix(), header, report)
        for pack in self._packs.paths():
            file = pack.relative_to(self._folder).as_posix()
            try:
                with damage_as_one_error(), ZipFile(pack) as archive:
                    yield from (found for found in _packed(archive, file) if found.stem not in single)
            except BadZipFile:
                yield Stored("", file, None, {})

    def _read(self, sample_id: str, name: str) -> bytes:
        with suppress(FileNotFoundError):
            return read_bytes(self._folder / name)
        self._packs.refresh()
        try:
            with damage_as_one_error(), ZipFile(self._packs.pack(file_name(sample_id))) as archive:
                return archive.read(name)
        except KeyError:
            raise UnknownSampleError(
                f"{self._folder} has no {name.partition('/')[0]} of sample {sample_id!r}"
            ) from None
        except BadZipFile as error:
            raise InvalidValueError(f"the pack with sample {sample_id!r} is damaged: {error}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json``; ValueError if the folder is not that of a batch."""
    try:
        run = json.loads(read_bytes(folder / RUN_FILE))
        if run["format"] == FORMAT and isinstance(run["hash"], str) and isinstance(run["settings"], dict):
            return run
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    raise InvalidValueError(f"{folder} is not the folder of a batch: {RUN_FILE} is missing or damaged")


def read_header(path: Path) -> dict[str, Any] | None:
    """Read the metadata of a trace file; None if it does not exist or is incomplete."""
    try:
        with reading(path), path.open("rb") as file:
            return _header(file, path.stat().st_size)
    except FileNotFoundError:
        return None


def _header(file: IO[bytes], size: int) -> dict[str, Any] | None:
    try:
        found = json.loads(safetensors_metadata(file, size)["trace"])
        return found if isinstance(found["header"]["sample_id"], str) else None
    except (KeyError, TypeError, ValueError):
        return None


def _packed(archive: ZipFile, file: str) -> Iterator[Stored]:
    for name in filter(is_trace, archive.namelist()):
        stem = PurePosixPath(name).stem
        header = _member(archive, name, partial(_header, size=archive.getinfo(name).file_size))
        report = _member(archive, report_name(stem), lambda member: member.read())
        yield Stored(stem, file, header, _entries(report or b""))


def _member(archive: ZipFile, name: str, read: Callable[[IO[bytes]], _Read]) -> _Read | None:
    """Read a file in a zip file; None if it does not exist or is damaged."""
    with suppress(KeyError, BadZipFile), damage_as_one_error(), archive.open(name) as member:
        return read(member)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read the entries of a JSON file; none if it does not exist or is damaged."""
    try:
        return _entries(read_bytes(path))
    except FileNotFoundError:
        return {}


def _entries(contents: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(contents)
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}
