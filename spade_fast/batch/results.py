"""Reads the folder of a batch: names of its files, and `Results`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from zipfile import BadZipFile, ZipFile

from torch import Tensor

from spade_fast._util.errors import InputError, InvalidValueError, UnknownSampleError
from spade_fast._util.files import open_regular, read_bytes, reading
from spade_fast._util.safetensors_file import intact_metadata, intact_tensors, safetensors_file, safetensors_header
from spade_fast._util.strict_json import canonical_json, parse_json
from spade_fast.batch.packs import Packs, damage_as_one_error, is_trace, open_pack, read_member
from spade_fast.batch.samples import file_name
from spade_fast.pruning.trace_file import read_stored, read_trace
from spade_fast.pruning.traces import Trace

_Read = TypeVar("_Read")

RUN_FILE = "run.json"
FORMAT = "spade_fast.batch"
_MAPS = "spade_fast.maps"


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
        Metadata of the trace's file; None if it, or with `whole` another file of the sample, is damaged.
    report
        Seconds, worker and warnings; empty if they are lost, None if they are damaged.
    """

    stem: str
    file: str
    header: dict[str, Any] | None
    report: dict[str, Any] | None


class Results(Mapping[str, Trace]):
    """The traces of a batch by sample id, from single or packed files; also while the batch is running.

    >>> results = Results("traces")                    # doctest: +SKIP
    >>> with results["cat.jpg"].applied(model): ...    # doctest: +SKIP

    Raises
    ------
    ValueError
        `folder` is not that of a batch; or, for an item, its file is damaged, or is that of another sample or run.
    KeyError
        For an item: the sample is not finished, or was not explained.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        run = read_run(self._folder)
        self._run, self._methods = run["hash"], run["settings"].get("methods", [])
        self._packs = Packs(self._folder, self._run)

    def __getitem__(self, sample_id: str) -> Trace:
        name = trace_name(file_name(sample_id))
        trace = Trace.from_bytes(self._read(sample_id, name), str(self._folder / name))
        self._check(name, sample_id, trace.sample_id, trace.header.get("run"))
        return trace

    def __iter__(self) -> Iterator[str]:
        return (found.header["header"]["sample_id"] for found in self.stored() if found.header is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def maps(self, sample_id: str) -> dict[str, Tensor]:
        """Return the explanations of a sample, each ``[H, W]``, by name: ``"dense.METHOD"`` and ``"trace.METHOD"``.

        The latter are means over all traces of the sample, of maps divided by their sums, if there are several.
        """
        name = maps_name(file_name(sample_id))
        maps, facts = read_maps(self._read(sample_id, name), str(self._folder / name))
        self._check(name, sample_id, facts.get("sample_id"), facts.get("run"))
        return maps

    def _check(self, name: str, sample_id: str, found_id: Any, run: Any) -> None:
        if found_id != sample_id:
            raise InvalidValueError(f"{self._folder / name} was made from sample {found_id!r}, not {sample_id!r}")
        if run != self._run:
            raise InvalidValueError(f"{self._folder / name} was made by a run of other settings or another model")

    def stored(self, whole: bool = False) -> Iterator[Stored]:
        """Iterate over all finished samples, each once, those in single files first.

        With `whole`, traces and maps are read to the end: those in which anything differs from what was written, and
        those of another sample or run, count as damaged.
        """
        self._packs.refresh()
        single = set()
        for path in sorted(self._folder.glob(trace_name("[!.]*"))):
            header = read_header(path)
            if whole:
                header = self._whole(path.stem, lambda name: read_bytes(self._folder / name), header)
            if header is None:
                self._packs.refresh()
            # A worker may be packing it at this moment.
            if path.stem not in self._packs and (header is not None or path.exists()):
                single.add(path.stem)
                report = read_report(self._folder / report_name(path.stem))
                yield Stored(path.stem, path.relative_to(self._folder).as_posix(), header, report)
        for pack in self._packs.paths():
            file = pack.relative_to(self._folder).as_posix()
            try:
                with open_pack(pack) as archive:
                    for found in _packed(archive, file):
                        if found.stem not in single:
                            read = partial(read_member, archive)
                            header = self._whole(found.stem, read, found.header) if whole else found.header
                            yield replace(found, header=header)
            except BadZipFile:
                yield Stored("", file, None, {})

    def _whole(self, stem: str, read: Callable[[str], bytes], header: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the header unless the sample's files are damaged, or those of another sample or run."""
        found = read_sample(stem, read, self._methods)
        return header if found is not None and found.get("run") == self._run else None

    def _read(self, sample_id: str, name: str) -> bytes:
        with suppress(FileNotFoundError):
            return read_bytes(self._folder / name)
        self._packs.refresh()
        try:
            with open_pack(self._packs.pack(file_name(sample_id))) as archive:
                return archive.read(name)
        except KeyError:
            damaged = "".join(f"; {path} is damaged" for path in self._packs.damaged())
            raise UnknownSampleError(
                f"{self._folder} has no {name.partition('/')[0]} of sample {sample_id!r}{damaged}"
            ) from None
        except BadZipFile as error:
            raise InvalidValueError(f"the pack with sample {sample_id!r} is damaged: {error}") from error


def read_sample(stem: str, read: Callable[[str], bytes], methods: Sequence[str]) -> dict[str, Any] | None:
    """Return the header of a sample's trace, or None unless all its files are intact and of this sample.

    These are the trace, the maps if there are `methods`, and the report if it is not lost. `read` returns the bytes of
    a file by its name in the folder.
    """
    try:
        header = read_trace(read(trace_name(stem)), "this").header
        if file_name(header["sample_id"]) != stem:
            return None
        if methods:
            _, facts = read_maps(read(maps_name(stem)), "this")
            if (facts.get("sample_id"), facts.get("run")) != (header["sample_id"], header.get("run")):
                return None
        with suppress(FileNotFoundError, KeyError):
            report = _report(read(report_name(stem)))
            if report is None or report.get("id") != header["sample_id"]:
                return None
        return header
    except (FileNotFoundError, KeyError, InvalidValueError, BadZipFile):
        return None
    except InputError as error:
        _raise_unless_no_file(error)
        return None


def read_pack(path: Path, run: str, methods: Sequence[str]) -> dict[str, bool]:
    """Read a pack to its end; return for each of its samples, by `file_name`, whether its files are intact.

    BadZipFile if none of it can be read.
    """
    with open_pack(path) as archive:
        found = {}
        for stem in (PurePosixPath(name).stem for name in archive.namelist() if is_trace(name)):
            header = read_sample(stem, partial(read_member, archive), methods)
            found[stem] = header is not None and header.get("run") == run
        return found


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json``; ValueError if the folder is not that of a batch."""
    try:
        run: dict[str, Any] = parse_json(read_bytes(folder / RUN_FILE))
        if run["format"] == FORMAT and isinstance(run["hash"], str) and isinstance(run["settings"], dict):
            return run
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    raise InvalidValueError(f"{folder} is not the folder of a batch: {RUN_FILE} is missing or damaged")


def read_header(path: Path) -> dict[str, Any] | None:
    """Read the metadata of a trace file; None if it does not exist or is incomplete."""
    try:
        with reading(path), open_regular(path) as file:
            return _header(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        return None
    except InputError as error:
        _raise_unless_no_file(error)
        return None


def _header(file: IO[bytes], size: int) -> dict[str, Any] | None:
    with suppress(InvalidValueError):
        return read_stored(file, size)
    return None


def maps_file(maps: Mapping[str, Tensor], sample_id: str, run: str) -> bytes:
    """Return the bytes of a file of explanations."""
    return safetensors_file(maps, {"format": _MAPS, "sample_id": sample_id, "run": run})


def read_maps(contents: bytes, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the explanations in such a file, and ``sample_id`` and ``run``; ValueError, which names it, if damaged."""
    try:
        facts = intact_metadata(safetensors_header(BytesIO(contents), len(contents)))
        if facts.get("format") != _MAPS:
            raise ValueError("it does not contain maps")
        return intact_tensors(contents, facts), facts
    except ValueError as error:
        raise InvalidValueError(f"{path} is damaged: {error}") from error


def _packed(archive: ZipFile, file: str) -> Iterator[Stored]:
    for name in filter(is_trace, archive.namelist()):
        stem = PurePosixPath(name).stem
        header = _member(archive, name, partial(_header, size=archive.getinfo(name).file_size))
        report = _member(archive, report_name(stem), lambda member: member.read())
        yield Stored(stem, file, header, {} if report is None else _report(report))


def _member(archive: ZipFile, name: str, read: Callable[[IO[bytes]], _Read]) -> _Read | None:
    """Read a file in a zip file; None if it does not exist or is damaged."""
    with suppress(KeyError, BadZipFile), damage_as_one_error(), archive.open(name) as member:
        return read(member)
    return None


def report_file(entries: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file with the report or the error of a sample."""
    return json.dumps({**entries, "hash": _hash(entries)}, indent=1).encode()


def read_report(path: Path) -> dict[str, Any] | None:
    """Read the entries of such a file; none if it does not exist, None if it is damaged."""
    try:
        return _report(read_bytes(path))
    except FileNotFoundError:
        return {}
    except InputError as error:
        _raise_unless_no_file(error)
        return None


def _report(contents: bytes) -> dict[str, Any] | None:
    try:
        entries = dict(parse_json(contents))
        return entries if entries.pop("hash") == _hash(entries) else None
    except (KeyError, TypeError, ValueError):
        return None


def _raise_unless_no_file(error: InputError) -> None:
    """Take a folder, pipe or device in the place of a file for a damaged file."""
    if error.errno not in (errno.EISDIR, errno.EINVAL):
        raise error


def _hash(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entries)).hexdigest()
