"""Replay on disk: what has arrived goes to chunk files now and then, and a resumed run maps them into memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.config import is_integer
from worldloom.errors import CheckpointError, FileFormatError
from worldloom.replay import door
from worldloom.replay.buffer import GIVEN, ReplayBuffer
from worldloom.replay.chunks import (
    CHUNK_NAME,
    PARTIAL,
    Chunk,
    Layout,
    MappedBlock,
    check_size,
    read_chunk,
    write_chunk,
)
from worldloom.replay.rows import MAX_BLOCK_ROWS, Column, Part, Rows
from worldloom.replay.schema import Schema

FORMAT, VERSION = "worldloom.replay.store", 1

MAX_BLOCK_BYTES = 1 << 28
"""Largest block that is taken memory for when reading, and largest row."""

ROWS, LATENTS = "rows", "latents"
Reference = dict[str, Any]


class ReplayStore:
    """A folder of chunk files that hold the content of one :class:`~worldloom.replay.ReplayBuffer`.

    Each block of 32 MiB of rows becomes one file, written once. A block that is not full yet, or whose latents have
    been written to since, is written to a new file; the old one stays for whoever refers to it. So a checkpoint costs
    the rows since the last one, at most one block more, and of latents all blocks that training has touched: as a rule
    *all* latents, because it draws windows from everywhere.

    A *reference* is a JSON-serialisable dict that names the files of one moment, with checksums. A checkpoint keeps it;
    :meth:`load` gives back the buffer of that moment, bit for bit.

    Args:
      folder: where the files are; created by the first write. It belongs to one run.

    Files may be written and collected in another thread than the one that uses the buffer.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._written: dict[int, Chunk] = {}
        self._newest: set[str] = set()
        self._lock = threading.Lock()

    def snapshot(self, buffer: ReplayBuffer) -> Pending:
        """What ``buffer`` holds now, to be written later; cheap.

        Nothing is copied now: rows never change, and a block of latents is copied when it is next written to. While
        :meth:`Pending.write` goes on, latents may therefore take up to twice their memory.
        """
        buffer._latent_rows.freeze()
        tables = {ROWS: buffer._rows, LATENTS: buffer._latent_rows}
        return Pending(self, buffer._description(), {kind: _Table(kind, rows) for kind, rows in tables.items()})

    def write(self, buffer: ReplayBuffer) -> Reference:
        """Write what is not on disk yet, and return the reference: ``snapshot(buffer).write()``."""
        return self.snapshot(buffer).write()

    def load(self, reference: Mapping[str, Any]) -> ReplayBuffer:
        """The buffer at the moment of ``reference``: the same rows under the same numbers, hence the same batches.

        Every file is read once, in small pieces, to verify its checksum and content. Full blocks then stay on disk
        and are mapped into memory; what is appended or written goes to memory as ever. Files of later moments are left
        alone.

        Raises:
          FileFormatError: a file is missing or damaged, or ``reference`` is not one.
        """
        try:
            return self._load(reference)
        except FileFormatError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileFormatError(
                f"What a checkpoint says of the replay in {self.folder} makes no sense: {repr(error)[:300]}."
            ) from error

    def collect(self, references: Iterable[Mapping[str, Any]]) -> list[str]:
        """Delete the files that none of ``references`` names, nor the newest one written or loaded here.

        Returns:
          Names of the files deleted.

        Raises:
          FileFormatError: a reference is none; then nothing is deleted.
        """
        keep = set().union(*(self.names(reference) for reference in references))
        with self._lock:
            keep |= self._newest
            found = [path for path in self.folder.iterdir() if _ours(path)] if self.folder.is_dir() else []
            doomed = [path for path in found if path.name not in keep]
            for path in doomed:
                path.unlink(missing_ok=True)
            self._written = {stamp: chunk for stamp, chunk in self._written.items() if chunk.name in keep}
        return [path.name for path in doomed]

    @staticmethod
    def names(reference: Mapping[str, Any]) -> set[str]:
        """Names of the files that ``reference`` needs; raises ``FileFormatError`` if it is none."""
        return {chunk.name for chunks in _chunks(reference).values() for chunk in chunks}

    # ---- writing --------------------------------------------------------------------------------------------------

    def _write(self, description: dict[str, Any], tables: Mapping[str, _Table]) -> Reference:
        with self._lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for table in tables.values():
                    while table.parts:
                        table.chunks.append(self._chunk(table, table.parts[0]))
                        # Lets go of the memory of latents that have been written to since.
                        del table.parts[0]
                _flush_folder(self.folder)
            except (OSError, FileFormatError) as error:
                raise CheckpointError(
                    f"The replay rows could not be written to {self.folder}: {error}. "
                    "What was saved before is as it was."
                ) from error
            reference = {
                "format": FORMAT,
                "version": VERSION,
                **description,
                "chunks": {
                    kind: {
                        "block_rows": table.block_rows,
                        "files": [{"first": c.first, "rows": c.rows, "sha256": c.sha256} for c in table.chunks],
                    }
                    for kind, table in tables.items()
                },
            }
            self._newest = self.names(reference)
        return reference

    def _chunk(self, table: _Table, part: Part) -> Chunk:
        """The file that holds ``part``, written if it is not there."""
        mapped = part.block.chunk if isinstance(part.block, MappedBlock) else None
        known = self._written.get(part.stamp, mapped)
        if known and known.first <= part.first and known.first + known.rows == part.first + part.rows:
            path, layout = self.folder / known.name, Layout(table.kind, table.columns, known.first, known.rows)
            if path.is_file() and path.stat().st_size == layout.size:
                return known
        chunk = write_chunk(self.folder, table.kind, table.columns, part, {"flags": GIVEN})
        self._written[part.stamp] = chunk
        return chunk

    # ---- reading --------------------------------------------------------------------------------------------------

    def _load(self, reference: Mapping[str, Any]) -> ReplayBuffer:
        chunks = _chunks(reference)
        buffer, schema, first, count = ReplayBuffer._described(reference)
        if schema is None:
            if chunks[ROWS] or chunks[LATENTS]:
                raise FileFormatError("The replay of a checkpoint has files but no rows.")
            buffer._rows = Rows({}, first=first)
            return buffer
        columns = {ROWS: schema.columns, LATENTS: buffer._latent_columns()}
        tables = {}
        for kind, files in chunks.items():
            # Everything before memory is taken for anything.
            _check_tiling(files, reference["chunks"][kind]["block_rows"], columns[kind], first, first + count)
            for chunk in files:
                check_size(self.folder / chunk.name, Layout(kind, columns[kind], chunk.first, chunk.rows).size)
        for kind, files in chunks.items():
            tables[kind] = self._table(files, columns[kind], reference["chunks"][kind]["block_rows"], first, schema)
        if not columns[LATENTS]:
            tables[LATENTS].extend(count)
        with self._lock:
            for kind, files in chunks.items():
                parts = zip(tables[kind].parts(), files, strict=bool(columns[kind]))
                self._written |= {part.stamp: chunk for part, chunk in parts}
            self._newest = self.names(reference)
        # Mapped files cannot be written to: their blocks are copied first.
        tables[LATENTS].freeze()
        buffer._take_over(schema, tables[ROWS], tables[LATENTS])
        return buffer

    def _table(
        self, files: list[Chunk], columns: Mapping[str, Column], block_rows: int, first: int, schema: Schema
    ) -> Rows:
        table = Rows(columns, first=files[0].first if files else first, block_rows=block_rows)
        for chunk in files:
            if chunk.rows == block_rows:
                table.attach(self._mapped(chunk, columns, schema))
            else:
                self._read(chunk, table, schema)
        table.drop_before(first)
        return table

    def _mapped(self, chunk: Chunk, columns: Mapping[str, Column], schema: Schema) -> MappedBlock:
        # Flags change when a crashed episode is closed.
        held = {name: np.zeros(chunk.rows, column.dtype) for name, column in columns.items() if name == "flags"}

        def look(name: str, start: int, values: np.ndarray) -> None:
            door.check_stored(schema, name, values)
            if name in held:
                held[name][start : start + len(values)] = values

        read_chunk(self.folder, chunk, columns, look)
        return MappedBlock(self.folder, chunk, columns, held)

    def _read(self, chunk: Chunk, table: Rows, schema: Schema) -> None:
        ids = table.extend(chunk.rows)

        def look(name: str, start: int, values: np.ndarray) -> None:
            door.check_stored(schema, name, values)
            table.put(name, ids[start : start + len(values)], values)

        read_chunk(self.folder, chunk, table.columns, look)


class Pending:
    """The content of a buffer at one moment, yet to be written; see :meth:`ReplayStore.snapshot`."""

    def __init__(self, store: ReplayStore, description: dict[str, Any], tables: Mapping[str, _Table]):
        self._store, self._tables = store, tables
        # As it will be read back, and nobody else's.
        self._description = json.loads(json.dumps(description))

    def write(self) -> Reference:
        """Write what is not on disk yet, in any thread, and return the reference.

        Raises ``CheckpointError`` if it cannot be written; everything written before stays as it is, and what this call
        has written is not written again by the next.
        """
        return self._store._write(self._description, self._tables)


class _Table:
    """What is to be written of a table."""

    def __init__(self, kind: str, rows: Rows):
        self.kind, self.columns, self.block_rows = kind, dict(rows.columns), rows.block_rows
        self.parts = rows.parts() if rows.columns else []
        self.chunks: list[Chunk] = []


def _chunks(reference: Mapping[str, Any]) -> dict[str, list[Chunk]]:
    """The files that a reference names, by kind, in order of their rows; raises ``FileFormatError``."""
    try:
        if reference["format"] != FORMAT or reference["version"] != VERSION:
            raise FileFormatError(f"The replay of a checkpoint is not in the format {FORMAT}, version {VERSION}.")
        chunks = {
            kind: [
                Chunk(kind, file["first"], file["rows"], file["sha256"]) for file in reference["chunks"][kind]["files"]
            ]
            for kind in (ROWS, LATENTS)
        }
    except (LookupError, TypeError) as error:
        raise FileFormatError(f"What a checkpoint says of its replay makes no sense: {repr(error)[:300]}.") from error
    for chunk in (chunk for found in chunks.values() for chunk in found):
        counts = (chunk.first, chunk.rows)
        plain = all(is_integer(count) and 0 <= count < 1 << 62 for count in counts) and isinstance(chunk.sha256, str)
        if not plain or not CHUNK_NAME.fullmatch(chunk.name) or len(chunk.sha256) != 64:
            raise FileFormatError(f"What a checkpoint says of its replay makes no sense: {str(chunk)[:200]}.")
    return chunks


def _check_tiling(files: list[Chunk], block_rows: Any, columns: Mapping[str, Column], first: int, end: int) -> None:
    """Raise ``FileFormatError`` unless the files hold rows ``first … end - 1``, one for each block."""
    if not is_integer(block_rows) or not 1 <= block_rows <= MAX_BLOCK_ROWS or block_rows & (block_rows - 1):
        raise FileFormatError(f"The replay of a checkpoint has blocks of {block_rows!r} rows.")
    width = sum(column.nbytes for column in columns.values())
    if width * (block_rows if any(file.rows < block_rows for file in files) else 1) > MAX_BLOCK_BYTES:
        raise FileFormatError(f"The replay of a checkpoint has blocks of {block_rows} rows of {width} bytes.")
    if not columns:
        if files:
            raise FileFormatError("The replay of a checkpoint has files of latents but no latents.")
        return
    position = files[0].first if files else end
    for number, file in enumerate(files):
        last = number == len(files) - 1
        whole = file.rows > 0 and file.first // block_rows == (file.first + file.rows - 1) // block_rows
        if file.first != position or not whole or ((file.first + file.rows) % block_rows and not last):
            raise FileFormatError(f"The replay of a checkpoint has no rows {position}, or has some twice.")
        position += file.rows
    if not files or not files[0].first <= first < files[0].first + files[0].rows or position != end:
        raise FileFormatError(f"The replay of a checkpoint lacks some of the rows {first} … {end - 1}.")


def _ours(path: Path) -> bool:
    written = CHUNK_NAME.fullmatch(path.name) or path.name.endswith(PARTIAL)
    return bool(written) and path.name.startswith((ROWS, LATENTS)) and path.is_file()


def _flush_folder(folder: Path) -> None:
    """Make new names as durable as what they name, where the system knows how."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
