"""The samples of a batch: how they are found and named, and how a worker loads one."""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError, MissingFileError
from spade_fast._util.extras import extra_for
from spade_fast._util.files import is_file, is_hidden, is_system_file, reading
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.photo import photo_suffixes, read_photo
from spade_fast.inputs.pil_pixels import Upright, upright

# File names may have 255 bytes; the folder adds a suffix and, while writing, a prefix.
_LONGEST_NAME = 200
_GLOB = "*?["
# Why files are skipped, in the singular and the plural.
_SKIPPED = {
    "hidden": ("hidden or system file", "hidden or system files"),
    "other": ("file that is not a photo", "files that are not photos"),
}


class Source(Protocol):
    """Samples by index; pickled once for each worker."""

    ids: list[str]
    skipped: Mapping[str, int]
    """Number of files that were skipped: ``hidden`` ones and those of the system, and ``other`` ones than photos."""

    def load(self, index: int, model: LoadedModel) -> Tensor:
        """Return a sample as the network takes it: ``[1, C, H, W]``, on the CPU.

        Warnings are kept in the sample's report.
        """

    def size(self, index: int) -> int | None:
        """Return the size of a sample's file in bytes; None if it has none."""


class Photos:
    """Image files, each with an id.

    Raises
    ------
    ValueError
        Two samples have the same id, or there are none.
    """

    def __init__(self, paths: Sequence[Path], ids: Sequence[str], skipped: Mapping[str, int] | None = None) -> None:
        # As text: a million `Path` objects take twice the memory and 30 times as long to send.
        self.paths, self.ids = [str(path.absolute()) for path in paths], _unique(ids)
        self.skipped: Mapping[str, int] = dict(skipped or {})

    def load(self, index: int, model: LoadedModel) -> Tensor:
        return _seen(read_photo(Path(self.paths[index])), model)

    def size(self, index: int) -> int | None:
        try:
            return os.stat(self.paths[index]).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None


class Items:
    """Items of a torch `Dataset`, each with its index as id.

    An item is a PIL image of any mode, read as files are, or the network's input ``[C, H, W]`` (floating point,
    normalised), or a tuple that begins with one.
    """

    skipped: Mapping[str, int] = {}

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.ids = _unique([str(index) for index in range(len(dataset))])

    def load(self, index: int, model: LoadedModel) -> Tensor:
        item = self.dataset[index]
        if isinstance(item, tuple | list) and len(item) > 0:
            item = item[0]
        if isinstance(item, Tensor):
            if not item.is_floating_point() or item.dim() != 3:
                raise InvalidTypeError(
                    f"the dataset must give floating-point [C, H, W], got {item.dtype} {list(item.shape)}"
                )
            return item.detach()[None].cpu().to(model.dtype)
        if not hasattr(item, "convert"):
            raise InvalidTypeError(f"the dataset must give PIL images or tensors, got {type(item).__name__}")
        return _seen(upright(item), model)

    def size(self, index: int) -> int | None:
        return None


def _seen(photo: Upright, model: LoadedModel) -> Tensor:
    """Return a photo as the network takes it, with a warning of what the network does not see of it."""
    for caution in photo.cautions(model.ground):
        warnings.warn(caution, stacklevel=3)
    return model.preprocess(photo.image)[0]


def find_samples(given: Any) -> Source:
    """Find the samples of an input.

    Parameters
    ----------
    given
        A folder: its images, also those in subfolders, by the suffixes of the formats that `open_photo` reads; hidden
        files and folders are skipped. A file name or a pattern with ``*``, ``?``, ``[...]`` and ``**``. A ``.csv`` or
        ``.parquet`` file with a column ``path``, relative to the file's folder, and optionally a column ``id``. A
        dataset with ``__len__`` and ``__getitem__``, or ``module:callable``, which returns one. If no ids are given,
        the id of a file is its path: relative to the folder, relative to the part of the pattern before its first
        wildcard, or as written in the list.

    Raises
    ------
    OSError
        No such file or folder, nothing matches the pattern (FileNotFoundError), or a folder cannot be read.
    ValueError
        No samples, two of the same id, or a list without a column ``path`` or with an empty path.
    TypeError
        Anything else.
    ImportError
        A Parquet file, but pyarrow is missing.
    """
    if not isinstance(given, str | os.PathLike):
        if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
            return Items(given)
        raise InvalidTypeError(f"samples must be a path, a pattern or a dataset, got {type(given).__name__}")
    path = Path(given)
    with reading(path):
        is_folder = path.is_dir()
    if is_folder:
        found, skipped = _images(path)
        if not found:
            raise MissingFileError(
                f"no images in folder {path} ({', '.join(sorted(photo_suffixes()))}){skipped_text(skipped)}"
            )
        return _photos(found, path, skipped)
    if is_file(path):
        return _listed(path) if path.suffix.lower() in (".csv", ".parquet") else _photos([path], path.parent)
    pattern = str(given)
    module, _, attribute = pattern.partition(":")
    if attribute and all(part.isidentifier() for part in module.split(".")):
        return find_samples(_dataset(module, attribute))
    if not any(character in pattern for character in _GLOB):
        raise MissingFileError(f"no such file or folder: {path}")
    fixed = pattern[: min(pattern.find(character) for character in _GLOB if character in pattern)]
    folder = Path(os.path.dirname(fixed))
    matches = [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    found = [file for file in matches if not any(map(is_system_file, file.relative_to(folder).parts))]
    if not found:
        raise MissingFileError(f"no file matches {pattern}")
    return _photos(found, folder, {"hidden": len(matches) - len(found)})


def _dataset(module: str, attribute: str) -> Any:
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InvalidValueError(
            f"{module}:{attribute} is neither a file nor a function with a dataset: {error}"
        ) from error
    try:
        return make()
    except Exception as error:
        raise InvalidValueError(f"{module}:{attribute} failed with {type(error).__name__}: {error}") from error


def _images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """All images in a folder and its subfolders, also through links, sorted; and the numbers of files skipped.

    A hidden folder counts as one file. OSError if a folder cannot be read.
    """
    found, skipped, seen = [], Counter[str](), set()
    suffixes = photo_suffixes()

    def refuse(error: OSError) -> None:
        with reading(Path(error.filename)):
            raise error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        visible = sorted(name for name in folders if not is_hidden(name))
        skipped["hidden"] += len(folders) - len(visible)
        folders[:] = visible  # sorted: ids must not depend on which of two links to a folder is visited first
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()  # a link to a folder that was already visited
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            path = Path(place, name)
            if is_hidden(name):
                skipped["hidden"] += 1
            elif path.suffix.lower() in suffixes and (path.is_file() or path.is_symlink()):
                found.append(path)  # a link to a missing file is also a sample: one that fails
            else:
                skipped["other"] += 1
    return sorted(found), skipped


def skipped_text(skipped: Mapping[str, int]) -> str:
    """Return " (skipped ...)" with the numbers of files, or an empty string if none was skipped."""
    parts = [f"{count} {_SKIPPED[kind][count != 1]}" for kind, count in skipped.items() if count]
    return f" (skipped {', '.join(parts)})" if parts else ""


def file_name(sample_id: str) -> str:
    """Return an id as a file name: a different one per id, without separators, never hidden, of bounded length."""
    name = quote(sample_id, safe="")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 33]}-{hashlib.sha256(sample_id.encode()).hexdigest()[:32]}"
    return name


def _photos(paths: Sequence[Path], folder: Path, skipped: Mapping[str, int] | None = None) -> Photos:
    return Photos(paths, [path.relative_to(folder).as_posix() for path in paths], skipped)


def _listed(path: Path) -> Photos:
    columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if "path" not in columns:
        raise InvalidValueError(f"{path} must have a column 'path', got {', '.join(map(repr, columns)) or 'none'}")
    files, ids = columns["path"], columns.get("id", columns["path"])
    for row, cells in enumerate(zip(files, ids, strict=True), start=1):
        if None in cells or "" in cells:
            raise InvalidValueError(f"{path} has no path or no id in row {row}")
    return Photos([path.parent / str(file) for file in files], [str(name) for name in ids])


def _read_csv(path: Path) -> dict[str, list[Any]]:
    try:
        with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidValueError(f"{path} is not a list of comma-separated values in UTF-8: {error}") from error
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    with extra_for("lists in Parquet need"):
        from pyarrow import ArrowInvalid, parquet
    try:
        columns = [name for name in parquet.read_schema(path).names if name in ("path", "id")]
        return parquet.read_table(path, columns=columns).to_pydict()
    except ArrowInvalid as error:
        raise InvalidValueError(f"{path} is not a Parquet file, or a damaged one: {error}") from error


def _unique(ids: Sequence[str]) -> list[str]:
    if not ids:
        raise InvalidValueError("there are no samples")
    # File names may contain bytes that are not text; headers may not.
    names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in ids]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidValueError(
            f"sample ids must differ, but {len(twice)} occur more than once, the first is {twice[0]!r}"
        )
    return names
