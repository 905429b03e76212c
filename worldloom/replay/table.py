"""Row storage: blocks of columns, appended at the new end and dropped at the old one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 32 << 20
"""Target size of one block. Large enough that a batch touches few, small enough to free or write to disk."""

MAX_BLOCK_ROWS = 1 << 20

Block = Mapping[str, np.ndarray]
"""One array ``[block_rows, ...]`` per column."""

_block_versions = itertools.count(1)


class Column(NamedTuple):
    """Shape and dtype of one row's entry in a column."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.shape) * self.dtype.itemsize


class BlockSlice(NamedTuple):
    """The rows that a table holds of one block.

    Attributes:
      first: number of the first of these rows.
      rows: number of rows.
      block: the arrays of the whole block.
      offset: index of the first row in these arrays.
      version: identifies the content of the rows written so far: unique in this process, renewed whenever a frozen
        block is copied; rows appended later do not change it.
    """

    first: int
    rows: int
    block: Block
    offset: int
    version: int

    def column(self, name: str) -> np.ndarray:
        """One column of these rows, [rows, ...], as a view."""
        return self.block[name][self.offset : self.offset + self.rows]


class RowTable:
    """A table of rows numbered 0, 1, 2 … in order of arrival; the oldest can be dropped, numbers are never reused.

    Row ``i`` is in block ``i // block_rows``. A block holds one array ``[block_rows, ...]`` per column and is
    allocated when its first row arrives, so a nearly empty table costs nothing and growth copies nothing. A block is
    freed when its last row is dropped.

    Args:
      columns: column name → :class:`Column`.
      first: number of the first row to be added.
      block_rows: rows per block; computed from ``BLOCK_BYTES`` if None.

    Attributes:
      first: number of the oldest row held.
      end: number of the next row to be added; rows ``first … end - 1`` are held.
      block_rows: rows per block, a power of two.
    """

    def __init__(self, columns: Mapping[str, Column], *, first: int = 0, block_rows: int | None = None):
        self.columns = dict(columns)
        self.first = self.end = first
        fitting = min(MAX_BLOCK_ROWS, max(1, BLOCK_BYTES // max(1, self.row_bytes)))
        self.block_rows = block_rows or 1 << (fitting.bit_length() - 1)
        self._blocks: dict[int, Block] = {}
        self._versions: dict[int, int] = {}
        self._frozen: set[int] = set()

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(column.nbytes for column in self.columns.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held (blocks may reserve a little more)."""
        return len(self) * self.row_bytes

    # ---- adding rows ----------------------------------------------------------------------------------------------

    def reserve(self, count: int) -> None:
        """Allocate the memory for appending ``count`` rows."""
        for index in range(self.end // self.block_rows, -(-(self.end + count) // self.block_rows)):
            if index in self._blocks:
                self._writable(index)
            else:
                # The operating system zeroes pages lazily: pages that no row has reached cost no memory.
                self._set(index, {n: np.zeros((self.block_rows, *c.shape), c.dtype) for n, c in self.columns.items()})

    def extend(self, count: int) -> np.ndarray:
        """Add ``count`` rows, not filled yet; returns their numbers, int64 [count]. Without memory nothing changes."""
        self.reserve(count)
        self.end += count
        return np.arange(self.end - count, self.end)

    def append(self, values: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Add ``count`` rows, ``{column: [count, ...]}``; returns their numbers, int64 [count]."""
        ids = self.extend(count)
        done, size = 0, self.block_rows
        while done < count:
            index, offset = divmod(self.end - count + done, size)
            here = min(count - done, size - offset)
            for name, column in self._writable(index).items():
                column[offset : offset + here] = values[name][done : done + here]
            done += here
        return ids

    def append_block(self, block: Block) -> None:
        """Add a whole block of ``block_rows`` rows without copying it; the table must end at a block boundary."""
        index, rest = divmod(self.end, self.block_rows)
        assert rest == 0
        self._set(index, block)
        self.end += self.block_rows

    # ---- reading and writing --------------------------------------------------------------------------------------

    def put(self, name: str, ids: np.ndarray, values: np.ndarray) -> None:
        """Overwrite entries of one column: ``ids`` [N] of rows held, ``values`` [N, ...]; a later duplicate wins."""
        for index, offsets, span in self._split_by_block(ids):
            self._writable(index)[name][offsets] = values[span]

    def take(self, names: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows ``ids`` [N], all of which must be held: ``{column: [N, ...]}``."""
        out = {name: np.empty((len(ids), *self.columns[name].shape), self.columns[name].dtype) for name in names}
        for index, offsets, span in self._split_by_block(ids):
            block = self._blocks[index]
            for name in names:
                # mode="clip" lets NumPy copy straight into `out`; with "raise" it goes through a second buffer.
                block[name].take(offsets, axis=0, out=out[name][span], mode="clip")
        return out

    def block_slices(self) -> list[BlockSlice]:
        """The rows held, block by block, in order."""
        size, slices = self.block_rows, []
        for index in range(self.first // size, -(-self.end // size)) if len(self) else ():
            first, end = max(self.first, index * size), min(self.end, (index + 1) * size)
            offset = first - index * size
            slices.append(BlockSlice(first, end - first, self._blocks[index], offset, self._versions[index]))
        return slices

    def iter_column(self, name: str) -> Iterator[np.ndarray]:
        """One column of all rows held, in order, as one view [rows, ...] per block."""
        for block_slice in self.block_slices():
            yield block_slice.column(name)

    def with_columns(self, columns: Mapping[str, Column]) -> RowTable:
        """A new table with the same row numbers and ``columns``; those that this table lacks are zero."""
        table = RowTable(columns, first=self.first)
        ids = table.extend(len(self))
        for name in self.columns.keys() & columns.keys():
            table.put(name, ids, self.take([name], ids)[name])
        return table

    def freeze(self) -> None:
        """Make all blocks copy-on-write, so that :meth:`block_slices` obtained before keep their content."""
        self._frozen.update(self._blocks)

    # ---- dropping rows --------------------------------------------------------------------------------------------

    def drop_before(self, first: int) -> None:
        """Drop all rows numbered below ``first``."""
        self.first = max(self.first, first)
        for index in [i for i in self._blocks if (i + 1) * self.block_rows <= self.first]:
            self._delete(index)

    def truncate(self, end: int) -> None:
        """Drop all rows numbered ``end`` and above; the next row gets the number ``end``."""
        cut, rest = divmod(end, self.block_rows)
        if rest and end < self.end:
            # Another thread may still be writing the dropped rows to disk: new rows go to a copy of their block.
            self._frozen.add(cut)
            self._writable(cut)
        self.end = end
        for index in [i for i in self._blocks if i * self.block_rows >= end]:
            self._delete(index)

    # ---- blocks ---------------------------------------------------------------------------------------------------

    def _writable(self, index: int) -> Block:
        """The block ``index``, replaced by a copy first if it is frozen."""
        if index in self._frozen:
            self._set(index, {name: self._blocks[index][name].copy() for name in self.columns})
        return self._blocks[index]

    def _set(self, index: int, block: Block) -> None:
        self._blocks[index], self._versions[index] = block, next(_block_versions)
        self._frozen.discard(index)

    def _delete(self, index: int) -> None:
        del self._blocks[index], self._versions[index]
        self._frozen.discard(index)

    def _split_by_block(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, slice]]:
        """Split ``ids`` [N] wherever the block changes: (block, offsets in it, slice of ``ids``)."""
        blocks, offsets = np.divmod(ids, self.block_rows)
        cuts = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            if start < stop:
                yield int(blocks[start]), offsets[start:stop], slice(start, stop)
