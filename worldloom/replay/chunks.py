"""Chunk files: the rows of one block, written once and never changed.

A file is a line of JSON that says what follows, then each column as plain little-endian numbers at a multiple of 64
bytes, which can be mapped into memory as it is. Its name holds the first row, the number of rows and the beginning of
its SHA-256: other content never gets the same name, so writing cannot harm a file that something refers to.
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
from worldloom.replay.rows import Column, Part

FORMAT, VERSION = "worldloom.replay.chunk", 1
ALIGNMENT = 64
PIECE_BYTES = 1 << 20
"""Read and checked at a time."""

CHUNK_NAME = re.compile(r"(rows|latents)-\d{12,}-\d+-[0-9a-f]{16}\.chunk")
PARTIAL = ".partial"


class Chunk(NamedTuple):
    """What a reference says of one chunk file; the file's name and size follow from it.

    Attributes:
      kind: ``"rows"`` or ``"latents"``.
      first: number of the first row.
      rows: how many rows.
      sha256: of the whole file, hexadecimal.
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
    """Where things are in a chunk file.

    Args:
      kind: ``"rows"`` or ``"latents"``.
      columns: of the rows, in order.
      first: number of the first row.
      rows: how many rows.

    Attributes:
      header: the bytes before the first column.
      offsets: position of each column.
      size: bytes of the whole file.
    """

    def __init__(self, kind: str, columns: Mapping[str, Column], first: int, rows: int):
        described = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "first_row": first,
            "rows": rows,
            "columns": [[name, column.shape, _stored(column).str] for name, column in columns.items()],
        }
        line = json.dumps(described).encode()
        self.header = line.ljust(_aligned(len(line) + 1) - 1) + b"\n"
        self.columns, self.rows = columns, rows
        self.offsets: dict[str, int] = {}
        self.size = len(self.header)
        for name, column in columns.items():
            self.offsets[name] = _aligned(self.size)
            self.size = self.offsets[name] + rows * column.nbytes


def write_chunk(folder: Path, kind: str, columns: Mapping[str, Column], part: Part, mask: Mapping[str, Any]) -> Chunk:
    """Write the rows of ``part`` as a file that appears under its name only when complete and on the disk.

    Of the columns in ``mask`` only those bits are written. Raises ``OSError`` if it cannot be done.
    """
    layout, digest = Layout(kind, columns, part.first, part.rows), hashlib.sha256()
    partial = folder / f"{kind}-{part.first:012}{PARTIAL}"
    try:
        with partial.open("wb") as file:

            def write(data: Any) -> None:
                digest.update(data)
                file.write(data)

            write(layout.header)
            position = len(layout.header)
            for name, column in columns.items():
                values = part.column(name)
                values = values & mask[name] if name in mask else values
                write(bytes(layout.offsets[name] - position))
                write(np.ascontiguousarray(values, _stored(column)).reshape(-1).view(np.uint8))
                position = layout.offsets[name] + part.rows * column.nbytes
            file.flush()
            os.fsync(file.fileno())
        chunk = Chunk(kind, part.first, part.rows, digest.hexdigest())
        partial.replace(folder / chunk.name)
    finally:
        partial.unlink(missing_ok=True)
    return chunk


def read_chunk(
    folder: Path, chunk: Chunk, columns: Mapping[str, Column], look: Callable[[str, int, np.ndarray], None]
) -> None:
    """Read a chunk file once, in small pieces, and verify its checksum.

    ``look(name, start, values)`` sees every piece: rows ``start …`` of the chunk, of column ``name``. What it has seen
    counts only once this function has returned.

    Raises ``FileFormatError`` if the file is missing or damaged; what ``look`` raises, if it is not.
    """
    layout = Layout(chunk.kind, columns, chunk.first, chunk.rows)
    path, digest, problem = folder / chunk.name, hashlib.sha256(), None
    with _opened(path, layout.size) as file:

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
                values = np.frombuffer(data, _stored(column)).reshape(count, *column.shape)
                try:
                    look(name, start, values.astype(column.dtype, copy=False))
                except WorldloomError as error:
                    # Damage is the better explanation of nonsense, if the checksum says so.
                    problem = problem or error
            position = layout.offsets[name] + chunk.rows * column.nbytes
    if not intact or digest.hexdigest() != chunk.sha256:
        raise FileFormatError(f"The replay file {path} is damaged: its checksum is not that of what was written.")
    if problem is not None:
        raise problem


class MappedBlock(Mapping[str, np.ndarray]):
    """The rows of a chunk file as a block of read-only arrays, without reading them.

    Args:
      folder: where the file is.
      chunk: the file.
      columns: its columns.
      held: columns that are kept in memory instead, and can be changed there.
    """

    def __init__(self, folder: Path, chunk: Chunk, columns: Mapping[str, Column], held: Mapping[str, np.ndarray]):
        self.chunk, self.path = chunk, folder / chunk.name
        self.layout = Layout(chunk.kind, columns, chunk.first, chunk.rows)
        self._held = dict(held)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._held:
            return self._held[name]
        column, rows = self.layout.columns[name], self.layout.rows
        values: np.ndarray = np.ndarray(
            (rows, *column.shape), _stored(column), MAPS.of(self), self.layout.offsets[name]
        )
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.columns)

    def __len__(self) -> int:
        return len(self.layout.columns)

    # Two blocks are the same if they are the same object.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Maps:
    """The files that are mapped into memory at present: the ones used last, of blocks that are still in use.

    Every map costs a file descriptor, and the disk space of a deleted file.

    Args:
      most: how many at a time.
    """

    def __init__(self, most: int):
        self.most = most
        self._maps: weakref.WeakKeyDictionary[MappedBlock, mmap.mmap] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, block: MappedBlock) -> mmap.mmap:
        """The file of ``block``, mapped. Raises ``FileFormatError`` if it is not there any more."""
        with self._lock:
            memory = self._maps.pop(block, None) or _map_file(block.path, block.layout.size)
            self._maps[block] = memory
            while len(self._maps) > self.most:
                del self._maps[next(iter(self._maps))]
        return memory


MAPS = Maps(128)
"""Of this process. Some systems allow 256 descriptors."""


def _map_file(path: Path, size: int) -> mmap.mmap:
    """Map a file of ``size`` bytes into memory, read-only."""
    with _opened(path, size) as file:
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
def _opened(path: Path, size: int) -> Iterator[Any]:
    check_size(path, size)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise FileFormatError(f"The replay file {path} cannot be read: {error.strerror}.") from error


def _stored(column: Column) -> np.dtype:
    return column.dtype.newbyteorder("<")


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
