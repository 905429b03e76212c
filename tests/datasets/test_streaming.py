"""What is read of large datasets, how much memory that takes, and which files stay open."""

import os
from pathlib import Path

import numpy as np
import pytest
from dataset_writers import flat, multitask_arrays, recorded, write_npz_folder, write_pt, write_sparse_pt

import worldloom.data
from worldloom.data import file_rows
from worldloom.data.file_rows import FileRows, keep_smallest
from worldloom.data.parts import CACHE, PieceCache
from worldloom.errors import DataError, FileFormatError


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_large_folder_is_sampled_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows.keep_smallest, "__defaults__", (40 << 20,))  # rewards and tasks
    for number in range(4):
        write_sparse_pt(tmp_path / f"chunk_{number}.pt", 2_000, 501, 24, 6, 30)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    before = resident()
    dataset = worldloom.data.open(tmp_path)
    assert resident() - before < 60e6
    for update in range(20):
        assert dataset.sample(64, 4, update=update)["obs"].shape == (64, 4, 24)
    assert size > 500e6
    assert resident() - before < 100e6


def test_rows_are_read_in_any_order_and_with_repeats(tmp_path):
    array = np.arange(600, dtype=np.float32).reshape(100, 6)
    (tmp_path / "x").write_bytes(b"??" + array.tobytes())
    rows = FileRows(tmp_path / "x", np.float32, (100, 6), 2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        index = rng.integers(0, 100, rng.integers(0, 40))
        np.testing.assert_array_equal(rows.take_rows(index), array[index])
    ordered = np.sort(rng.integers(0, 100, 60))
    np.testing.assert_array_equal(rows.take_rows(ordered), array[ordered])
    assert rows.take_rows(ordered).flags.writeable
    keep_smallest([rows])
    assert rows.kept
    np.testing.assert_array_equal(rows.take_rows(ordered), array[ordered])
    wide = np.arange(40_000, dtype=np.float32).reshape(10, 4_000)
    (tmp_path / "wide").write_bytes(wide.tobytes())
    rows = FileRows(tmp_path / "wide", np.float32, wide.shape, 0)
    index = np.array([3, 4, 5, 0, 9, 9])
    np.testing.assert_array_equal(rows.take_rows(index), wide[index])


def test_a_file_that_becomes_shorter_is_refused_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows.keep_smallest, "__defaults__", (0,))
    path = write_pt(tmp_path / "x.pt", multitask_arrays(recorded(lengths=[8]), [0] * 6))
    dataset = worldloom.data.open(path)
    dataset.sample(4, 3)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(DataError, match=r"x\.pt has become shorter"):
        dataset.sample(256, 3)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **flat(recorded(seed=1)))
    first = worldloom.data.open(path).sample(4, 3)["rewards"]
    other = tmp_path / "y.npz"
    np.savez(other, **flat(recorded(seed=2)))
    other.replace(path)
    second = worldloom.data.open(path).sample(4, 3)["rewards"]
    assert not np.array_equal(first, second)


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "_MAX_OPEN", 2)
    monkeypatch.setattr(file_rows.keep_smallest, "__defaults__", (0,))
    dataset = worldloom.data.open(write_npz_folder(tmp_path / "many", recorded(count=12)))
    assert len(dataset.parts) == 6
    for update in range(5):
        dataset.sample(16, 3, update=update)
    assert len(file_rows._OPEN._files) <= 2


def test_the_cache_keeps_what_was_read_last():
    cache = PieceCache(max_bytes=200)
    read = []
    for key in (1, 2, 1, 3, 1, 2):
        cache.get(key, lambda key=key: read.append(key) or np.zeros(100, np.uint8))
    assert read == [1, 2, 3, 2]
    assert cache.nbytes <= 200
    assert CACHE.max_bytes == 256 << 20


def test_compressed_arrays_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("worldloom.data.arrays.MAX_PIECE_BYTES", 1 << 10)
    arrays = flat(recorded())
    arrays |= {name: np.repeat(arrays[name], 100, axis=1) for name in ("observations", "next_observations")}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    with pytest.raises(FileFormatError, match="must be saved uncompressed"):
        worldloom.data.open(tmp_path / "x.npz")
