"""Reading photos out of Qt's resource archives."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Mapping

import pytest

from studies.shared.photos import _qt_resources


def qt_archive(files: Mapping[str, bytes], version: int = 3, compress: Collection[str] = ()) -> bytes:
    """Write a Qt resource archive of one folder, following Qt's documentation of the format."""
    names, data, nodes = b"", b"", []

    def add_name(text: str) -> int:
        nonlocal names
        start = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return start

    tail = b"" if version == 1 else struct.pack(">Q", 0)
    folder = add_name("folder")
    nodes.append(struct.pack(">IHII", 0, 2, 1, 1) + tail)
    nodes.append(struct.pack(">IHII", folder, 2, len(files), 2) + tail)
    for name, content in files.items():
        flags = 1 if name in compress else 0
        packed = struct.pack(">I", len(content)) + zlib.compress(content) if flags else content
        nodes.append(struct.pack(">IHHHI", add_name(name), flags, 0, 0, len(data)) + tail)
        data += struct.pack(">I", len(packed)) + packed
    tree = b"".join(nodes)
    start = 20 if version < 3 else 24
    head = b"qres" + struct.pack(">4I", version, start, start + len(tree), start + len(tree) + len(data))
    return head + (b"" if version < 3 else bytes(4)) + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_of_a_qt_archive_are_read(version: int) -> None:
    files = {"a.webp": b"first", "ü.txt": b"second" * 100, "empty": b""}
    archive = qt_archive(files, version, compress={"ü.txt"})
    assert dict(_qt_resources(archive)) == {f"/folder/{name}": content for name, content in files.items()}


def test_other_files_are_not_qt_archives() -> None:
    with pytest.raises(ValueError, match="not a Qt resource archive"):
        list(_qt_resources(b"PK" + bytes(40)))
