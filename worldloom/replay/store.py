"""Replay on disk: new rows are appended to chunk files at each checkpoint, and a resumed run memory-maps them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.config import is_integer
from worldloom.errors import CheckpointError, FileFormatError
from worldloom.files import fsync_folder, make_folder
from worldloom.replay.buffer import ReplayBuffer
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
from worldloom.replay.index import GIVEN_FLAGS
from worldloom.replay.schema import Schema
from worldloom.replay.serialization import BufferContent, BufferDescription
from worldloom.replay.table import MAX_BLOCK_ROWS, BlockSlice, Column, RowTable
from worldloom.replay.validation import check_stored_column

FORMAT, VERSION = "worldloom.replay.store", 1

MAX_BLOCK_BYTES = 1 << 28
"""Largest block that is allocated when reading, and largest row."""

ROWS, LATENTS = "rows", "latents"
Reference = dict[str, Any]


class ReplayStore:
    """A folder of chunk files that hold the content of one :class:`~worldloom.replay.ReplayBuffer`.

    Each block of 32 MiB of rows becomes one file, written once. A block that is not full yet, or whose latents have
    changed since, is written to a new file; the old file stays as long as a reference names it. So a checkpoint writes
    the rows added since the last one, plus at most one block, and all blocks of latents that training has changed:
    usually *all* of them, because windows are drawn from everywhere.

    A *reference* is a JSON-serialisable dict that names the files of one moment, with checksums. A checkpoint keeps it,
    and :meth:`load` returns the buffer of that moment, bit for bit.

    Args:
      folder: folder of the files, created by the first write. It belongs to one run.

    Files may be written and collected in another thread than the one that uses the buffer.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        # Block version → its file, so that an unchanged block is not written again.
        self._written: dict[int, Chunk] = {}
        self._newest: set[str] = set()
        self._lock = threading.Lock()

    def snapshot(self, buffer: ReplayBuffer) -> PendingWrite:
        """The content that ``buffer`` has now, to be written later; cheap.

        Nothing is copied yet: rows never change, and a block of latents is copied before it is next changed. Until
        :meth:`PendingWrite.write` is done, latents may therefore use up to twice their memory.
        """
        content = buffer.content()
        content.latents.freeze()
        return PendingWrite(self, content)

    def write(self, buffer: ReplayBuffer) -> Reference:
        """Write what is not on disk yet, and return the reference: ``snapshot(buffer).write()``."""
        return self.snapshot(buffer).write()

    def load(self, reference: Mapping[str, Any]) -> ReplayBuffer:
        """The buffer at the moment of ``reference``: the same rows with the same numbers, hence the same batches.

        Every file is read once, in small pieces, to verify its checksum and content. Full blocks then stay on disk and
        are memory-mapped; new rows and changed latents are kept in memory as usual. Files of later moments are not
        touched.

        Raises:
          FileFormatError: a file is missing or damaged, or ``reference`` is not one.
        """
        try:
            return self._load(reference)
        except FileFormatError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileFormatError(
                f"A checkpoint's description of the replay in {self.folder} makes no sense: {repr(error)[:300]}."
            ) from error

    def collect(self, references: Iterable[Mapping[str, Any]]) -> list[str]:
        """Delete the files named neither by ``references`` nor by the reference last written or loaded here.

        Returns:
          Names of the files deleted.

        Raises:
          FileFormatError: one of ``references`` is not a reference; then nothing is deleted.
        """
        keep = set().union(*(self.names(reference) for reference in references))
        with self._lock:
            keep |= self._newest
            found = [path for path in self.folder.iterdir() if _is_store_file(path)] if self.folder.is_dir() else []
            unreferenced = [path for path in found if path.name not in keep]
            for path in unreferenced:
                path.unlink(missing_ok=True)
            self._written = {version: chunk for version, chunk in self._written.items() if chunk.name in keep}
        return [path.name for path in unreferenced]

    @staticmethod
    def names(reference: Mapping[str, Any]) -> set[str]:
        """Names of the files that ``reference`` needs; raises ``FileFormatError`` if it is not one."""
        return {chunk.name for chunks in _referenced_chunks(reference).values() for chunk in chunks}

    # ---- writing --------------------------------------------------------------------------------------------------

    def _write(self, description: dict[str, Any], tables: Mapping[str, _PendingTable]) -> Reference:
        """Write the chunk files of ``tables`` that are not there yet; see :meth:`PendingWrite.write`."""
        with self._lock:
            try:
                make_folder(self.folder)
                for table in tables.values():
                    while table.slices:
                        table.chunks.append(self._chunk(table, table.slices[0]))
                        # Frees the old copy of latents that have been changed since the snapshot.
                        del table.slices[0]
                fsync_folder(self.folder)
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

    def holds(self, kind: str, columns: Mapping[str, Column], block_slice: BlockSlice) -> Chunk | None:
        """The file that holds ``block_slice``; None if there is none yet."""
        mapped = block_slice.block.chunk if isinstance(block_slice.block, MappedBlock) else None
        known = self._written.get(block_slice.version, mapped)
        end = block_slice.first + block_slice.rows
        # A file may begin with rows that have been dropped since.
        if known and known.first <= block_slice.first and known.first + known.rows == end:
            path, layout = self.folder / known.name, Layout(kind, columns, known.first, known.rows)
            if path.is_file() and path.stat().st_size == layout.size:
                return known
        return None

    def _chunk(self, table: _PendingTable, block_slice: BlockSlice) -> Chunk:
        """The file that holds ``block_slice``, written unless it is there already."""
        known = self.holds(table.kind, table.columns, block_slice)
        if known:
            return known
        chunk = write_chunk(self.folder, table.kind, table.columns, block_slice, {"flags": GIVEN_FLAGS})
        self._written[block_slice.version] = chunk
        return chunk

    # ---- reading --------------------------------------------------------------------------------------------------

    def _load(self, reference: Mapping[str, Any]) -> ReplayBuffer:
        chunks = _referenced_chunks(reference)
        description = BufferDescription.from_json(reference)
        schema, first, end = description.schema, description.first_row, description.next_row
        if schema is None:
            if chunks[ROWS] or chunks[LATENTS]:
                raise FileFormatError("The replay of a checkpoint has files but no rows.")
            return ReplayBuffer.from_content(BufferContent.empty(description))
        columns = {ROWS: description.row_columns, LATENTS: description.latent_columns}
        # All sizes are checked before any memory is allocated.
        for kind, files in chunks.items():
            _check_tiling(files, reference["chunks"][kind]["block_rows"], columns[kind], first, end)
            for chunk in files:
                check_size(self.folder / chunk.name, Layout(kind, columns[kind], chunk.first, chunk.rows).size)
        tables = {
            kind: self._read_table(files, columns[kind], reference["chunks"][kind]["block_rows"], first, schema)
            for kind, files in chunks.items()
        }
        if not columns[LATENTS]:
            tables[LATENTS].extend(description.num_rows)
        # Blocks that do not change need not be written again.
        with self._lock:
            for kind, files in chunks.items():
                slices = zip(tables[kind].block_slices(), files, strict=bool(columns[kind]))
                self._written |= {block_slice.version: chunk for block_slice, chunk in slices}
            self._newest = self.names(reference)
        # Memory-mapped blocks are read-only: they are copied before latents change.
        tables[LATENTS].freeze()
        return ReplayBuffer.from_content(BufferContent(description, tables[ROWS], tables[LATENTS]))

    def _read_table(
        self, files: list[Chunk], columns: Mapping[str, Column], block_rows: int, first: int, schema: Schema
    ) -> RowTable:
        """The rows of ``files`` from number ``first`` on, whole blocks memory-mapped."""
        table = RowTable(columns, first=files[0].first if files else first, block_rows=block_rows)
        for chunk in files:
            if chunk.rows == block_rows:
                table.append_block(self._map_block(chunk, columns, schema))
            else:
                self._read_rows(chunk, table, schema)
        table.drop_before(first)
        return table

    def _map_block(self, chunk: Chunk, columns: Mapping[str, Column], schema: Schema) -> MappedBlock:
        """A whole block, memory-mapped after its checksum and content have been verified."""
        # Flags are kept in memory, because they change when an episode is interrupted.
        in_memory = {name: np.zeros(chunk.rows, column.dtype) for name, column in columns.items() if name == "flags"}

        def on_piece(name: str, start: int, values: np.ndarray) -> None:
            check_stored_column(schema, name, values)
            if name in in_memory:
                in_memory[name][start : start + len(values)] = values

        read_chunk(self.folder, chunk, columns, on_piece)
        return MappedBlock(self.folder, chunk, columns, in_memory)

    def _read_rows(self, chunk: Chunk, table: RowTable, schema: Schema) -> None:
        """Append the rows of a file to ``table``, in memory."""
        ids = table.extend(chunk.rows)

        def on_piece(name: str, start: int, values: np.ndarray) -> None:
            check_stored_column(schema, name, values)
            table.put(name, ids[start : start + len(values)], values)

        read_chunk(self.folder, chunk, table.columns, on_piece)


class PendingWrite:
    """The content of a buffer at one moment, not written yet; see :meth:`ReplayStore.snapshot`."""

    def __init__(self, store: ReplayStore, content: BufferContent):
        self._store = store
        # A copy, in the form in which it is read back.
        self._description = json.loads(json.dumps(content.description.to_json()))
        self._tables = {ROWS: _PendingTable(ROWS, content.rows), LATENTS: _PendingTable(LATENTS, content.latents)}

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks of this moment, of which those that have been written before need not be again."""
        return sum(
            block_slice.rows * column.nbytes
            for table in self._tables.values()
            for block_slice in table.slices
            if not self._store.holds(table.kind, table.columns, block_slice)
            for column in table.columns.values()
        )

    def write(self) -> Reference:
        """Write what is not on disk yet, and return the reference; may be called in any thread.

        Raises ``CheckpointError`` if it cannot be written. Everything written before stays as it is, and the files
        written by this call are not written again by the next.
        """
        return self._store._write(self._description, self._tables)


class _PendingTable:
    """The rows of a table that are still to be written (``slices``), and the files already there (``chunks``)."""

    def __init__(self, kind: str, table: RowTable):
        self.kind, self.columns, self.block_rows = kind, dict(table.columns), table.block_rows
        self.slices = table.block_slices() if table.columns else []
        self.chunks: list[Chunk] = []


def _referenced_chunks(reference: Mapping[str, Any]) -> dict[str, list[Chunk]]:
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
        raise FileFormatError(
            f"A checkpoint's description of its replay makes no sense: {repr(error)[:300]}."
        ) from error
    for chunk in (chunk for found in chunks.values() for chunk in found):
        counts = (chunk.first, chunk.rows)
        plain = all(is_integer(count) and 0 <= count < 1 << 62 for count in counts) and isinstance(chunk.sha256, str)
        # The name is checked too, since it becomes a path.
        if not plain or not CHUNK_NAME.fullmatch(chunk.name) or len(chunk.sha256) != 64:
            raise FileFormatError(f"A checkpoint's description of its replay makes no sense: {str(chunk)[:200]}.")
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


def _is_store_file(path: Path) -> bool:
    """Whether ``path`` is a chunk file, or one that was never finished."""
    written = CHUNK_NAME.fullmatch(path.name) or path.name.endswith(PARTIAL)
    return bool(written) and path.name.startswith((ROWS, LATENTS)) and path.is_file()
