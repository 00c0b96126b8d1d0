"""Files and folders appear, and are replaced, as a whole; files are read and written only where regular files are."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from spade_fast import InputError, MissingFileError, OutputError
from spade_fast._util.files import REPORT, check_file, is_file, open_regular, read_bytes, whole_folder, write_whole


def write(out, files, versions=("spade_fast",)):
    """One run, whose files hold its number of files."""
    with whole_folder(out) as folder:
        for name in files:
            (folder / name).write_text(str(len(files)))
        report = {"files": [*files, REPORT], "versions": dict.fromkeys(versions, "1")}
        (folder / REPORT).write_text(json.dumps(report))


def listing(out):
    return {path.name: path.read_text() for path in out.iterdir() if path.name != REPORT}


def test_a_second_run_replaces_the_first(tmp_path):
    out = tmp_path / "new/out"
    write(out, ["a.png", "b.png", "index.html"])
    write(out, ["b.png", "c.png"])
    assert listing(out) == {"b.png": "2", "c.png": "2"} and (out / REPORT).exists()


@pytest.mark.parametrize("moved", range(8))
def test_an_aborted_run_leaves_the_folder_as_it_was(tmp_path, monkeypatch, moved):
    out = tmp_path / "out"
    write(out, ["a.png", "b.png", "index.html"])
    before = listing(out)
    replace, count = os.replace, iter(range(100))

    def failing(*arguments):
        if next(count) == moved:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        if moved < 7:  # four old files and three new ones are moved
            with pytest.raises(KeyboardInterrupt):
                write(out, ["b.png", "c.png"])
            assert listing(out) == before and REPORT in os.listdir(out)
        else:
            write(out, ["b.png", "c.png"])
    write(out, ["d.png"])
    assert listing(out) == {"d.png": "1"}


def test_files_of_the_user_are_refused_and_stay(tmp_path):
    out = tmp_path / "out"
    write(out, ["a.png"])
    (out / "notes.txt").write_text("mine")
    (out / ".DS_Store").write_text("")
    with pytest.raises(OSError, match=r"out has files that no earlier run wrote \(notes.txt\): choose another"):
        write(out, ["b.png"])
    assert listing(out) == {"a.png": "1", "notes.txt": "mine", ".DS_Store": ""}
    (out / "notes.txt").unlink()
    write(out, ["b.png"])
    assert listing(out) == {"b.png": "1", ".DS_Store": ""}


@pytest.mark.parametrize(
    "report",
    [
        "mine",
        "[1]",
        '"files"',
        "null",
        "[" * 100_000,
        '{"files": ["mine.txt", "report.json"]}',
        '{"files": ["mine.txt", "report.json"], "versions": {"other": "1"}}',
        '{"files": ["mine.txt"], "versions": {"spade_fast": "1"}}',
        '{"files": {"mine.txt": 1, "report.json": 1}, "versions": {"spade_fast": "1"}}',
        '{"files": [["mine.txt"], 3, "../above.txt", "report.json"], "versions": {"spade_fast": "1"}}',
    ],
)
def test_reports_of_others_let_nothing_be_replaced(tmp_path, report):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (tmp_path / "above.txt").write_text("mine")
    (out / REPORT).write_text(report)
    with pytest.raises(OSError, match="has files that no earlier run wrote"):
        write(out, ["a.png"])
    assert listing(out) == {"mine.txt": "mine"} and (out / REPORT).read_text() == report
    (out / "mine.txt").unlink()
    if '"versions": {"spade_fast"' in report and "[[" in report:
        write(out, ["a.png"])
        assert (tmp_path / "above.txt").exists()


def test_many_files_are_counted(tmp_path):
    for name in "abcde":
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=r"\(a, b, c and 2 more\)"):
        write(tmp_path, ["a.png"])


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
