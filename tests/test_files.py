import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest

from nnunet_topomae.files import keep_as, lock, read_json, remove_leftovers, take_lock, write_file, write_json


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    write_json({"old": 1}, file)
    write_json({"new": [1, 2]}, file)
    assert json.loads(file.read_text()) == {"new": [1, 2]}
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_named_whatever_the_library_says(tmp_path):
    file = tmp_path / "a.pth"
    file.write_bytes(b"old")

    def fail(stream):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 4999296 vs 4999184")

    with pytest.raises(OSError, match=r"a\.pth cannot be written: No space left on device; free space on the disk /"):
        write_file(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_flushed_are_written_to(tmp_path, monkeypatch, number):
    flush = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_file(tmp_path / "a", lambda stream: stream.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="a cannot be written"):
        write_file(tmp_path / "a", lambda stream: stream.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"old"


def test_an_older_version_stays_under_another_name(tmp_path):
    file, older = tmp_path / "a", tmp_path / "b"
    for content in (b"1", b"2", b"3"):
        if file.exists():
            keep_as(file, older)
        write_file(file, lambda stream, content=content: stream.write(content))
    assert (file.read_bytes(), older.read_bytes()) == (b"3", b"2")


def test_two_writers_whose_processes_have_the_same_number_do_not_mix(tmp_path):
    """As in two containers that share a folder; here one writes while the other does."""
    file = tmp_path / "a.txt"

    def write(stream):
        stream.write(b"first")
        write_file(file, lambda other: other.write(b"second"))

    write_file(file, write)
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_leftovers_of_killed_processes_alone_are_removed(tmp_path):
    for name in (".a.pth.123-0f4a77c1", ".lock", "a.pth", ".hidden.txt"):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [tmp_path / ".a.pth.123-0f4a77c1"]
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "a.pth", ".hidden.txt"}


def test_a_disk_without_locks_does_not_keep_anyone_from_working(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    said = []
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock(tmp_path / ".lock", said.append).close()
    assert said == [f"{tmp_path} is on a disk without locks (No locks available): let no other process work there"]


@pytest.mark.parametrize("inherited", [False, True])
def test_a_lock_that_another_process_holds_can_be_waited_for(tmp_path, inherited):
    file = tmp_path / ".lock"
    code = (
        f"import sys\nfrom nnunet_topomae.files import take_lock\nstream = open({str(file)!r}, 'ab')\n"
        f"take_lock(stream, print, inherited={inherited})\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with file.open("ab") as stream:
            assert not take_lock(stream, print, inherited=inherited)
            other.stdin.close()
            assert take_lock(stream, print, inherited=inherited, wait=True)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"a\.json does not exist$"),
        ("{", ValueError, r"a\.json is no valid JSON: Expecting property name"),
        ("[" * 100_000, ValueError, r"a\.json is no valid JSON: maximum recursion depth"),
        ("[1]", ValueError, r"a\.json must hold a JSON object, got list$"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content, error, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=message):
        read_json(file)
