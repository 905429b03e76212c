"""Atomic writes: the old file or the new one, never a part of either."""

import os
import threading
from pathlib import Path

import pytest

from worldloom.files import atomic_file, write_atomically


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "numbers.bin"
    with atomic_file(path) as file:
        file.write(b"1")
        file.flush()
        assert not path.exists()
        file.write(b"2")
    assert path.read_bytes() == b"12"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_and_text_are_written_unchanged(tmp_path):
    write_atomically(tmp_path / "a", b"\x00\r\n\xff")
    write_atomically(str(tmp_path / "b"), "λ\r\n\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n\xff"
    assert (tmp_path / "b").read_bytes() == "λ\r\n\n".encode()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path, old, error):
    path = tmp_path / "config.json"
    if old is not None:
        path.write_bytes(old)

    def write():
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (path.read_bytes() if path.exists() else None) == old
    assert list(tmp_path.iterdir()) == ([] if old is None else [path])


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_of_the_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("disk full")

    path = tmp_path / "config.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[function], fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_is_on_disk_before_the_file_gets_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(path.exists()), fsync(descriptor)))
    write_atomically(path, b"data")
    assert synced == [False]


@pytest.mark.parametrize(
    "name",
    ["a b.json", ".hidden", "name.tmp", "100%.png", "λ–世界.gif", "line\nbreak", "*?[x]", "-rf", "é" * 127, "x" * 255],
)
def test_any_name_that_the_file_system_allows_can_be_written(tmp_path, name):
    path = tmp_path / name
    for data in (b"first", b"second"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_and_a_folder_as_target_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "file", b"data")
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"data")
    assert not list(tmp_path.iterdir())


def test_a_link_is_replaced_and_the_file_behind_it_left_alone(tmp_path):
    shared, link = tmp_path / "blob", tmp_path / "link"
    shared.write_bytes(b"shared")
    link.symlink_to(shared)
    write_atomically(link, b"own")
    assert (shared.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"shared", b"own", False)


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    write_atomically(path, "text")
    reader.join(10)
    assert received == [b"text"]
    assert path.is_fifo()


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
