"""Chunk files: the rows of one block, written once and never changed.

A file is a line of JSON that describes the columns, then each column as plain little-endian numbers at a multiple of 64
bytes, so that it can be memory-mapped. Its name contains the first row, the number of rows and the beginning of its
SHA-256: different content gets a different name, so writing never overwrites a file that is still referenced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import stat
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldloom.errors import FileFormatError, WorldloomError
from worldloom.replay.table import BlockSlice, Column

FORMAT, VERSION = "worldloom.replay.chunk", 1
ALIGNMENT = 64
PIECE_BYTES = 1 << 20
"""How much is read and checked at a time."""

CHUNK_NAME = re.compile(r"(rows|latents)-\d{12,}-\d+-[0-9a-f]{16}\.chunk")
PARTIAL = ".partial"


class Chunk(NamedTuple):
    """Identity of a chunk file, from which its name and size follow.

    Attributes:
      kind: ``"rows"`` or ``"latents"``.
      first: number of the first row.
      rows: number of rows.
      sha256: checksum of the whole file, hexadecimal.
    """

    kind: str
    first: int
    rows: int
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.kind}-{self.first:012}-{self.rows}-{self.sha256[:16]}.chunk"


class Layout:
    """The byte layout of a chunk file.

    Args:
      kind: ``"rows"`` or ``"latents"``.
      columns: columns of the rows, in order.
      first: number of the first row.
      rows: number of rows.

    Attributes:
      header: the bytes before the first column.
      offsets: byte offset of each column.
      size: bytes of the whole file.
    """

    def __init__(self, kind: str, columns: Mapping[str, Column], first: int, rows: int):
        described = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "first_row": first,
            "rows": rows,
            "columns": [[name, column.shape, _file_dtype(column).str] for name, column in columns.items()],
        }
        line = json.dumps(described).encode()
        self.header = line.ljust(_align(len(line) + 1) - 1) + b"\n"
        self.columns, self.rows = columns, rows
        self.offsets: dict[str, int] = {}
        self.size = len(self.header)
        for name, column in columns.items():
            self.offsets[name] = _align(self.size)
            self.size = self.offsets[name] + rows * column.nbytes


def write_chunk(
    folder: Path, kind: str, columns: Mapping[str, Column], block_slice: BlockSlice, bit_masks: Mapping[str, Any]
) -> Chunk:
    """Write the rows of ``block_slice`` as a chunk file, which gets its name only when complete and synced to disk.

    Columns in ``bit_masks`` are written after a bitwise "and" with their mask. Raises ``OSError`` if it cannot be
    written.
    """
    layout, digest = Layout(kind, columns, block_slice.first, block_slice.rows), hashlib.sha256()
    # Not by ``files.atomic_file``: the name holds the checksum, which is known only when everything is written.
    partial = folder / f"{kind}-{block_slice.first:012}{PARTIAL}"
    try:
        with partial.open("wb") as file:

            def write(data: Any) -> None:
                digest.update(data)
                file.write(data)

            write(layout.header)
            position = len(layout.header)
            for name, column in columns.items():
                values = block_slice.column(name)
                values = values & bit_masks[name] if name in bit_masks else values
                write(bytes(layout.offsets[name] - position))
                write(np.ascontiguousarray(values, _file_dtype(column)).reshape(-1).view(np.uint8))
                position = layout.offsets[name] + block_slice.rows * column.nbytes
            file.flush()
            os.fsync(file.fileno())
        chunk = Chunk(kind, block_slice.first, block_slice.rows, digest.hexdigest())
        partial.replace(folder / chunk.name)
    finally:
        partial.unlink(missing_ok=True)
    return chunk


def read_chunk(
    folder: Path, chunk: Chunk, columns: Mapping[str, Column], on_piece: Callable[[str, int, np.ndarray], None]
) -> None:
    """Read a chunk file once, in small pieces, and verify its checksum.

    ``on_piece(name, start, values)`` is called with every piece: column ``name`` of rows ``start …`` of the chunk. The
    pieces can be trusted only once this function has returned.

    Raises ``FileFormatError`` if the file is missing or damaged, else the first ``WorldloomError`` of ``on_piece``.
    """
    layout = Layout(chunk.kind, columns, chunk.first, chunk.rows)
    path, digest, problem = folder / chunk.name, hashlib.sha256(), None
    with _open_checked(path, layout.size) as file:

        def read(size: int) -> bytes:
            data = file.read(size)
            digest.update(data)
            return data

        intact = read(len(layout.header)) == layout.header
        position = len(layout.header)
        for name, column in columns.items():
            read(layout.offsets[name] - position)
            step = max(1, PIECE_BYTES // column.nbytes)
            for start in range(0, chunk.rows if intact else 0, step):
                count = min(step, chunk.rows - start)
                data = read(count * column.nbytes)
                if len(data) < count * column.nbytes:
                    intact = False
                    break
                values = np.frombuffer(data, _file_dtype(column)).reshape(count, *column.shape)
                try:
                    on_piece(name, start, values.astype(column.dtype, copy=False))
                except WorldloomError as error:
                    # Deferred: if the checksum is wrong, damage is the better explanation of invalid values.
                    problem = problem or error
            position = layout.offsets[name] + chunk.rows * column.nbytes
    if not intact or digest.hexdigest() != chunk.sha256:
        raise FileFormatError(f"The replay file {path} is damaged: its checksum differs from the one recorded.")
    if problem is not None:
        raise problem


class MappedBlock(Mapping[str, np.ndarray]):
    """The rows of a chunk file as a block of read-only, memory-mapped arrays.

    Args:
      folder: the folder of the file.
      chunk: the file.
      columns: its columns.
      in_memory: columns that are kept in memory instead, where they can be changed.
    """

    def __init__(self, folder: Path, chunk: Chunk, columns: Mapping[str, Column], in_memory: Mapping[str, np.ndarray]):
        self.chunk, self.path = chunk, folder / chunk.name
        self.layout = Layout(chunk.kind, columns, chunk.first, chunk.rows)
        self._in_memory = dict(in_memory)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._in_memory:
            return self._in_memory[name]
        column, rows = self.layout.columns[name], self.layout.rows
        values: np.ndarray = np.ndarray(
            (rows, *column.shape), _file_dtype(column), MAP_CACHE.get(self), self.layout.offsets[name]
        )
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.columns)

    def __len__(self) -> int:
        return len(self.layout.columns)

    # By identity, as weak dictionary keys; Mapping would compare the arrays.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class MapCache:
    """The most recently used memory maps, of blocks that still exist.

    Every open map costs a file descriptor, and the disk space of its file even if that is deleted.

    Args:
      max_open: largest number of maps open at a time.
    """

    def __init__(self, max_open: int):
        self.max_open = max_open
        self._maps: weakref.WeakKeyDictionary[MappedBlock, mmap.mmap] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, block: MappedBlock) -> mmap.mmap:
        """The memory map of the file of ``block``. Raises ``FileFormatError`` if the file is gone."""
        with self._lock:
            memory = self._maps.pop(block, None) or _map_file(block.path, block.layout.size)
            self._maps[block] = memory
            # A dict keeps the order of insertion: the least recently used map is the first.
            while len(self._maps) > self.max_open:
                del self._maps[next(iter(self._maps))]
        return memory


MAP_CACHE = MapCache(128)
"""Shared by the process. Some systems allow only 256 file descriptors."""


def _map_file(path: Path, size: int) -> mmap.mmap:
    """Memory-map a file of ``size`` bytes, read-only."""
    with _open_checked(path, size) as file:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


def check_size(path: Path, size: int) -> None:
    """Raise ``FileFormatError`` unless ``path`` is a regular file of ``size`` bytes."""
    try:
        found = path.stat()
    except OSError as error:
        raise FileFormatError(f"The replay file {path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise FileFormatError(f"The replay file {path} is damaged: it has {found.st_size} bytes, not {size}.")


@contextlib.contextmanager
def _open_checked(path: Path, size: int) -> Iterator[Any]:
    check_size(path, size)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise FileFormatError(f"The replay file {path} cannot be read: {error.strerror}.") from error


def _file_dtype(column: Column) -> np.dtype:
    return column.dtype.newbyteorder("<")


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
