"""Where rows live: blocks of columns, appended at one end and dropped at the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 32 << 20
"""Aim for the size of one block. Large enough that a batch touches few, small enough to free or write to disk."""

MAX_BLOCK_ROWS = 1 << 20

Block = Mapping[str, np.ndarray]
"""One array ``[block_rows, ...]`` per column."""

_stamps = itertools.count(1)


class Column(NamedTuple):
    """Shape and dtype of one row's entry in a column."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Part(NamedTuple):
    """The rows held of one block.

    Attributes:
      first: number of the first of them.
      rows: how many.
      block: the arrays they are in.
      offset: where they begin there.
      stamp: a number of its own in this process for every state of a block in which its rows are the same.
    """

    first: int
    rows: int
    block: Block
    offset: int
    stamp: int

    def column(self, name: str) -> np.ndarray:
        """Their entries of one column, a view."""
        return self.block[name][self.offset : self.offset + self.rows]


class Rows:
    """A table of rows numbered 0, 1, 2 … as they arrive; the oldest can be dropped, numbers are never reused.

    Row ``i`` lies in block ``i // block_rows``. A block holds one array ``[block_rows, ...]`` per column and is
    allocated when its first row arrives, so an almost empty table with a huge capacity costs nothing and growth
    copies nothing. A block whose last row is dropped is freed.

    Args:
      columns: column name → :class:`Column`.
      first: number of the first row to come.
      block_rows: see below.

    Attributes:
      first: number of the oldest row held.
      end: number the next row will get; rows ``first … end - 1`` are held.
      block_rows: rows per block, a power of two that follows from the width of a row unless given.
    """

    def __init__(self, columns: Mapping[str, Column], *, first: int = 0, block_rows: int | None = None):
        self.columns = dict(columns)
        self.first = self.end = first
        fitting = min(MAX_BLOCK_ROWS, max(1, BLOCK_BYTES // max(1, self.width)))
        self.block_rows = block_rows or 1 << (fitting.bit_length() - 1)
        self._blocks: dict[int, Block] = {}
        self._stamps: dict[int, int] = {}
        self._frozen: set[int] = set()

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return sum(column.nbytes for column in self.columns.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held (blocks may reserve a little more)."""
        return len(self) * self.width

    def reserve(self, count: int) -> None:
        """Take the memory that appending ``count`` rows needs."""
        for index in range(self.end // self.block_rows, -(-(self.end + count) // self.block_rows)):
            if index in self._blocks:
                self._writable(index)
            else:
                # Zeroed lazily by the operating system: pages that no row has reached cost no memory.
                self._set(index, {n: np.zeros((self.block_rows, *c.shape), c.dtype) for n, c in self.columns.items()})

    def extend(self, count: int) -> np.ndarray:
        """Add ``count`` rows, unfilled, and return their numbers. Without memory for them the table stays as it was."""
        self.reserve(count)
        self.end += count
        return np.arange(self.end - count, self.end)

    def append(self, values: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Add ``count`` rows, arrays ``[count, ...]`` of every column, and return their numbers, int64 [count]."""
        ids = self.extend(count)
        for name in self.columns:
            self.put(name, ids, values[name])
        return ids

    def attach(self, block: Block) -> None:
        """Append ``block_rows`` rows at once: a whole block, which is kept as it is."""
        index, rest = divmod(self.end, self.block_rows)
        assert rest == 0
        self._set(index, block)
        self.end += self.block_rows

    def put(self, name: str, ids: np.ndarray, values: np.ndarray) -> None:
        """Overwrite entries of one column: ``ids`` [N] of rows held, ``values`` [N, ...]; a later duplicate wins."""
        for index, offsets, span in self._spans(ids):
            self._writable(index)[name][offsets] = values[span]

    def take(self, names: list[str], ids: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows ``ids`` [N], all of them held: column name → [N, ...]."""
        out = {name: np.empty((len(ids), *self.columns[name].shape), self.columns[name].dtype) for name in names}
        for index, offsets, span in self._spans(ids):
            block = self._blocks[index]
            for name in names:
                # mode="clip" lets NumPy copy straight into `out`; with "raise" it goes through a second buffer.
                block[name].take(offsets, axis=0, out=out[name][span], mode="clip")
        return out

    def parts(self) -> list[Part]:
        """The rows held, block by block, in order."""
        size, parts = self.block_rows, []
        for index in range(self.first // size, -(-self.end // size)) if len(self) else ():
            first, end = max(self.first, index * size), min(self.end, (index + 1) * size)
            offset = first - index * size
            parts.append(Part(first, end - first, self._blocks[index], offset, self._stamps[index]))
        return parts

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """All entries of one column in order, block by block, without copying."""
        for part in self.parts():
            yield part.column(name)

    def freeze(self) -> None:
        """Leave the blocks to whoever has :meth:`parts` of them: each is copied before it is next changed."""
        self._frozen.update(self._blocks)

    def drop_before(self, first: int) -> None:
        """Drop all rows numbered below ``first``."""
        self.first = max(self.first, first)
        for index in [i for i in self._blocks if (i + 1) * self.block_rows <= self.first]:
            self._delete(index)

    def truncate(self, end: int) -> None:
        """Drop all rows numbered ``end`` and above; the next row gets the number ``end``."""
        cut, rest = divmod(end, self.block_rows)
        if rest and end < self.end:
            # Someone may still be writing the rows dropped to disk.
            self._frozen.add(cut)
            self._writable(cut)
        self.end = end
        for index in [i for i in self._blocks if i * self.block_rows >= end]:
            self._delete(index)

    def _writable(self, index: int) -> Block:
        if index in self._frozen:
            self._set(index, {name: self._blocks[index][name].copy() for name in self.columns})
        return self._blocks[index]

    def _set(self, index: int, block: Block) -> None:
        self._blocks[index], self._stamps[index] = block, next(_stamps)
        self._frozen.discard(index)

    def _delete(self, index: int) -> None:
        del self._blocks[index], self._stamps[index]
        self._frozen.discard(index)

    def _spans(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, slice]]:
        """Cut ``ids`` wherever the block changes: (block, offsets in it, slice of ``ids``)."""
        blocks, offsets = np.divmod(ids, self.block_rows)
        cuts = (np.flatnonzero(np.diff(blocks)) + 1).tolist()
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            if start < stop:
                yield int(blocks[start]), offsets[start:stop], slice(start, stop)
