"""Fuzzing of the readers of foreign files: damaged or forged bytes raise FileFormatError, quickly and in little memory.

The mutations are seeded. CI runs some 1,700 files; ``-m slow`` runs 12,000.
"""

import pickle
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from worldloom.errors import FileFormatError
from worldloom.interop.archive import read_npz
from worldloom.interop.pickles import read_dreamerv3_checkpoint, read_pickle
from worldloom.interop.torch_file import read_torch

DATA = Path(__file__).resolve().parents[1] / "data"
TREE = {
    "params": {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, ml_dtypes.bfloat16),
        "c": np.float64(2),
    },
    "counters": {"updates": 3, "more": [1, (2.5, None), {True, "x"}, b"y" * 300, 2**70]},
}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """``data`` with one to four random edits: changed bytes, chunks removed, repeated, moved or overwritten."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(changed) + 1)), int(rng.integers(1, 17))
        match rng.integers(6):
            case 0:
                changed[at : at + 1] = rng.bytes(1)
            case 1:
                changed[at : at + length] = b""
            case 2:
                changed[at:at] = changed[at : at + length] * int(rng.integers(1, 9))
            case 3:
                start = int(rng.integers(len(changed) + 1))
                changed[at : at + length] = changed[start : start + length]
            case 4:
                changed[at : at + length] = rng.choice([b"\xff", b"\0", b"\x7f"]) * length
            case 5:
                del changed[int(rng.integers(len(changed) // 2, len(changed) + 1)) :]
    return bytes(changed)


def repacked(path: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """The entries of a zip file with one of them mutated; written again, their checksums match."""
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    interesting = [name for name in entries if name.endswith((".pkl", ".npy"))]
    name = interesting[int(rng.integers(len(interesting)))]
    entries[name] = mutate(entries[name], rng)
    return entries


def write_zip(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)


def pickle_bytes(rng, source, path):
    path.write_bytes(mutate(source.read_bytes(), rng))


def random_opcodes(rng, source, path):
    opcodes = np.frombuffer(b"()]}\x8fNKMJGX\x8cBC\x85\x86\x87tqrhj\x94cR\x81b\x93Qsuae\x90\x91.\x8a\x89\x88", np.uint8)
    path.write_bytes(b"\x80\x04" + rng.choice(opcodes, rng.integers(5, 200)).tobytes() + b".")


def random_bytes(rng, source, path):
    start = [b"", b"\x80\x04", b"\x80\x02", b"PK\x03\x04"][int(rng.integers(4))]
    path.write_bytes(start + rng.bytes(int(rng.integers(0, 500))))


def zip_bytes(rng, source, path):
    path.write_bytes(mutate(source.read_bytes(), rng))


def zip_entry(rng, source, path):
    write_zip(path, repacked(source, rng))


def zip_directory(rng, source, path):
    """Mutates only the headers: the central directory at the end, or the first local header."""
    data = source.read_bytes()
    at = data.index(b"PK\x01\x02")
    path.write_bytes(data[:at] + mutate(data[at:], rng) if rng.random() < 0.8 else mutate(data[:64], rng) + data[64:])


def stub_torch(path):
    return read_torch(path, stub_unknown=True)


CASES = [
    (read_pickle, pickle_bytes, "tree-2.pkl"),
    (read_pickle, pickle_bytes, "tree-4.pkl"),
    (read_pickle, pickle_bytes, "tree-5.pkl"),
    (read_pickle, random_opcodes, "tree-4.pkl"),
    (read_pickle, random_bytes, "tree-4.pkl"),
    (read_dreamerv3_checkpoint, pickle_bytes, "tree-4.pkl"),
    (read_torch, zip_bytes, "torch-tensors.pt"),
    (read_torch, zip_entry, "torch-tensors.pt"),
    (read_torch, zip_directory, "torch-tensors.pt"),
    (read_torch, random_bytes, "torch-tensors.pt"),
    (stub_torch, zip_entry, "torch-omegaconf.pt"),
    (read_npz, zip_bytes, "stored.npz"),
    (read_npz, zip_entry, "stored.npz"),
    (read_npz, zip_directory, "stored.npz"),
    (read_npz, zip_bytes, "compressed.npz"),
    (read_npz, random_bytes, "stored.npz"),
]


def write_sources(folder: Path) -> None:
    """Intact files to start from."""
    for protocol in (2, 4, 5):
        (folder / f"tree-{protocol}.pkl").write_bytes(pickle.dumps(TREE, protocol))
    arrays = {"a": TREE["params"]["a"], "text": np.array(["xy"]), "flags": np.array([True, False]), "n": np.array(3)}
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", **arrays)
    for name in ("torch-tensors.pt", "torch-omegaconf.pt"):
        (folder / name).write_bytes((DATA / name).read_bytes())


class Figures(NamedTuple):
    """Numbers of damaged and of refused files, and the CPU seconds and peak memory of the worst one."""

    files: int
    refused: int
    slowest_s: float
    peak_bytes: int


def attempt(read, path: Path, allowed) -> tuple[str, float, int]:
    """The error message or "", the CPU seconds used, and the peak memory in bytes."""
    message = ""
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        read(path)
    except allowed as error:
        message = str(error)
    return message, time.process_time() - start, tracemalloc.get_traced_memory()[1] - before


def fuzz(read, damage, source: Path, path: Path, *, count: int, seed: int, allowed=FileFormatError) -> Figures:
    """Reads ``count`` damaged copies of ``source``. Fails on other errors, time or memory."""
    rng = np.random.default_rng(seed)
    refused, slowest, most = 0, 0.0, 0
    tracemalloc.start()
    try:
        for number in range(count):
            damage(rng, source, path)
            try:
                message, seconds, peak = attempt(read, path, allowed)
                if seconds > 1 or peak > 2_000_000:  # a machine that swaps; modules that are read once
                    message, seconds, peak = attempt(read, path, allowed)
            except Exception as error:
                pytest.fail(f"file {number} of seed {seed}: {type(error).__name__}: {error}")
            refused, slowest, most = refused + bool(message), max(slowest, seconds), max(most, peak)
            assert seconds < 1, f"file {number} of seed {seed}"
            assert peak < 2_000_000, f"file {number} of seed {seed}"
            assert len(message) < 1000
    finally:
        tracemalloc.stop()
    return Figures(count, refused, slowest, most)


@pytest.mark.parametrize(("read", "damage", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_files_are_refused_quickly_and_in_little_memory(read, damage, name, sources, tmp_path):
    read(sources / name)
    figures = fuzz(read, damage, sources / name, tmp_path / "damaged", count=110, seed=0)
    assert figures.refused > 50  # some edits change a number or a name only, and give another valid file


@pytest.mark.slow
@pytest.mark.parametrize(("read", "damage", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_many_more_damaged_files(read, damage, name, sources, tmp_path):
    assert fuzz(read, damage, sources / name, tmp_path / "damaged", count=750, seed=1).refused > 300
