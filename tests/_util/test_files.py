"""Files are read and written only where regular files are or can be."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from spade_fast import InputError, MissingFileError, OutputError
from spade_fast._util.files import check_file, is_file, open_regular, read_bytes, write_whole


@pytest.fixture(params=["pipe", "socket", "folder", "/dev/full", "/dev/zero"])
def place(request, tmp_path) -> Path:
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif request.param == "folder":
        path.mkdir()
    return path


def test_what_is_not_a_file_is_not_read(place):
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_bytes(place)
    assert caught.value.filename == str(place)
    with pytest.raises(OSError):
        open_regular(place)
    if place.is_dir():
        assert not is_file(place)
    else:
        with pytest.raises(InputError, match="Not a regular file"):
            is_file(place)


def test_what_is_not_a_file_is_not_replaced(place):
    before = place.stat()
    kind = "a folder" if place.is_dir() else "a pipe, a socket or a device"
    for write in (lambda: write_whole(place, b"x", "the trace"), lambda: check_file(place, "the trace")):
        with pytest.raises(OutputError, match=f"cannot write the trace: {place} is {kind}"):
            write()
    assert place.stat().st_ino == before.st_ino and os.listdir(place.parent).count(place.name) == 1


def test_files_and_missing_files(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(MissingFileError):
        read_bytes(path)
    assert not is_file(path)
    write_whole(path, b"one", "it")
    (tmp_path / "link").symlink_to(path)
    for there in (path, tmp_path / "link"):
        assert is_file(there) and read_bytes(there) == b"one"
        check_file(there, "it")
    write_whole(path, b"two", "it")
    assert read_bytes(path) == b"two"
