"""Where rows live: blocks of columns, appended at one end and dropped at the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 32 << 20
"""Aim for the size of one block. Large enough that a batch touches few, small enough to free or write to disk."""

MAX_BLOCK_ROWS = 1 << 20


class Column(NamedTuple):
    """Shape and dtype of one row's entry in a column."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Rows:
    """A table of rows numbered 0, 1, 2 … as they arrive; the oldest can be dropped, numbers are never reused.

    Row ``i`` lies in block ``i // block_rows``. A block holds one array ``[block_rows, ...]`` per column and is
    allocated when its first row arrives, so an almost empty table with a huge capacity costs nothing and growth
    copies nothing. A block whose last row is dropped is freed.

    Args:
      columns: column name → :class:`Column`.
      first: number of the first row to come.

    Attributes:
      first: number of the oldest row held.
      end: number the next row will get; rows ``first … end - 1`` are held.
      block_rows: rows per block, a power of two that follows from the width of a row.
    """

    def __init__(self, columns: Mapping[str, Column], *, first: int = 0):
        self.columns = dict(columns)
        self.first = self.end = first
        width = max(1, sum(column.nbytes for column in self.columns.values()))
        self.block_rows = 1 << (min(MAX_BLOCK_ROWS, max(1, BLOCK_BYTES // width)).bit_length() - 1)
        self._blocks: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held (blocks may reserve a little more)."""
        return len(self) * sum(column.nbytes for column in self.columns.values())

    def append(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Add ``n`` rows, arrays ``[n, ...]`` of every column, and return their numbers, int64 [n]."""
        count = len(next(iter(values.values())))
        ids = np.arange(self.end, self.end + count)
        self.extend(count)
        for name in self.columns:
            self.put(name, ids, values[name])
        return ids

    def extend(self, count: int) -> None:
        """Make room for ``count`` more rows, unfilled. Running out of memory leaves the table as it was."""
        for index in range(self.end // self.block_rows, -(-(self.end + count) // self.block_rows)):
            if index not in self._blocks:
                self._blocks[index] = {name: self._empty(column) for name, column in self.columns.items()}
        self.end += count

    def put(self, name: str, ids: np.ndarray, values: np.ndarray) -> None:
        """Overwrite entries of one column: ``ids`` [N] of rows held, ``values`` [N, ...]; a later duplicate wins."""
        for block, offsets, span in self._spans(ids):
            block[name][offsets] = values[span]

    def take(self, names: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows ``ids`` [N], all of them held: column name → [N, ...]."""
        out = {name: np.empty((len(ids), *self.columns[name].shape), self.columns[name].dtype) for name in names}
        for block, offsets, span in self._spans(ids):
            for name in names:
                # mode="clip" lets NumPy copy straight into `out`; with "raise" it goes through a second buffer.
                block[name].take(offsets, axis=0, out=out[name][span], mode="clip")
        return out

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """All entries of one column in order, block by block, without copying."""
        size = self.block_rows
        for index in range(self.first // size, -(-self.end // size)):
            start = index * size
            yield self._blocks[index][name][max(self.first - start, 0) : min(self.end - start, size)]

    def drop_before(self, first: int) -> None:
        """Drop all rows numbered below ``first``."""
        self.first = max(self.first, first)
        for index in [i for i in self._blocks if (i + 1) * self.block_rows <= self.first]:
            del self._blocks[index]

    def truncate(self, end: int) -> None:
        """Drop all rows numbered ``end`` and above; the next row gets the number ``end``."""
        self.end = end
        for index in [i for i in self._blocks if i * self.block_rows >= end]:
            del self._blocks[index]

    def add_column(self, name: str, column: Column) -> None:
        """A new column, zero in every row so far."""
        self.columns[name] = column
        for block in self._blocks.values():
            block[name] = self._empty(column)

    def _empty(self, column: Column) -> np.ndarray:
        # Zeroed lazily by the operating system: pages that no row has reached cost no memory.
        return np.zeros((self.block_rows, *column.shape), column.dtype)

    def _spans(self, ids: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, slice]]:
        """Cut ``ids`` wherever the block changes: (block, offsets in it, slice of ``ids``)."""
        blocks, offsets = np.divmod(ids, self.block_rows)
        cuts = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            if start < stop:
                yield self._blocks[int(blocks[start])], offsets[start:stop], slice(start, stop)
