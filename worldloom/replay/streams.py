"""Which rows follow each other: streams, and the episodes in them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FIRST, LAST, TERMINAL, CLOSED = 1, 2, 4, 8
"""Bits of the ``flags`` column. ``CLOSED``: not marked last by the environment, but an episode starts right after."""


class Stream:
    """The rows of one environment, in order.

    Positions count the rows of the stream from its beginning, dropped ones included.

    Attributes:
      rows: row numbers still held, ascending.
      starts: position of each episode's first held row, ascending.
      dropped: rows dropped at the old end, so that ``rows[0]`` has position ``dropped``.
      open: whether an episode is in progress: the last row was not an episode's last.
    """

    def __init__(self) -> None:
        self.rows = IntQueue()
        self.starts = IntQueue()
        self.dropped = 0
        self.open = False

    def extend(self, ids: np.ndarray, flags: np.ndarray) -> np.ndarray:
        """Append rows; returns the numbers of rows that an episode's start behind them closes."""
        first = (flags & FIRST) != 0
        starts = first.copy()
        starts[0] |= len(self.rows) == 0
        before = np.concatenate([self.rows.values[-1:], ids[:-1]]) if len(self.rows) else ids[:-1]
        unfinished = np.concatenate([[self.open], (flags[:-1] & LAST) == 0]) & first
        closed = before[unfinished[len(ids) - len(before) :]]
        self.starts.extend(np.flatnonzero(starts) + self.dropped + len(self.rows))
        self.rows.extend(ids)
        self.open = not flags[-1] & LAST
        return closed

    def drop_before(self, first: int) -> None:
        """Forget rows numbered below ``first``; an episode cut in its middle keeps its rest."""
        gone = int(np.searchsorted(self.rows.values, first))
        self.rows.drop_left(gone)
        self.dropped += gone
        if len(self.rows) == 0:
            self.starts.drop_left(len(self.starts))
        else:
            self.starts.drop_left(int(np.searchsorted(self.starts.values, self.dropped, side="right")) - 1)
            self.starts.values[0] = max(self.starts.values[0], self.dropped)

    def truncate(self, end: int) -> None:
        """Forget rows numbered ``end`` and above. ``open`` is left to the caller, who can read the flags."""
        self.rows.drop_right(len(self.rows) - int(np.searchsorted(self.rows.values, end)))
        stop = self.dropped + len(self.rows)
        self.starts.drop_right(len(self.starts) - int(np.searchsorted(self.starts.values, stop)))

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Begin of each episode as an index into ``rows``, and its number of rows: two int64 [E]."""
        begin = self.starts.values - self.dropped
        return begin, np.diff(begin, append=len(self.rows))


class Index:
    """All streams by number, and where windows may begin in them. Streams are always walked in order of their number,
    so that what is drawn depends on the rows held and not on how they came to be held.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._table: Runs | None = None

    def add(self, ids: np.ndarray, streams: np.ndarray, flags: np.ndarray) -> np.ndarray:
        """Enter new rows; returns the numbers of rows that a new episode behind them closes."""
        self._table = None
        closed = []
        for number in np.unique(streams).tolist():
            mine = streams == number
            closed.append(self._streams.setdefault(number, Stream()).extend(ids[mine], flags[mine]))
        return np.concatenate(closed)

    def drop_before(self, first: int) -> None:
        """Forget rows numbered below ``first``."""
        self._table = None
        for stream in self._streams.values():
            stream.drop_before(first)

    def truncate(self, end: int) -> np.ndarray:
        """Forget rows numbered ``end`` and above; returns the newest row left of each stream, to be looked at again."""
        self._table = None
        for stream in self._streams.values():
            stream.truncate(end)
        self._streams = {number: stream for number, stream in self._streams.items() if len(stream.rows)}
        return np.array([stream.rows.values[-1] for stream in self._streams.values()], np.int64)

    def reopen(self, flags: np.ndarray) -> None:
        """After :meth:`truncate`: the flags of the rows it returned say which episodes are in progress again."""
        for stream, flag in zip(self._streams.values(), flags, strict=True):
            stream.open = not flag & LAST

    def in_progress(self, number: int) -> bool:
        """Whether the stream's last row was not an episode's last."""
        return number in self._streams and self._streams[number].open

    def episodes(self) -> Runs:
        """Every episode held, also in part."""
        if self._table is None:
            found = [(number, *self._streams[number].episodes()) for number in sorted(self._streams)]
            self._table = Runs(
                np.repeat([number for number, _, _ in found], [len(begin) for _, begin, _ in found]).astype(np.int64),
                np.concatenate([np.empty(0, np.int64), *(begin for _, begin, _ in found)]),
                np.concatenate([np.empty(0, np.int64), *(length for _, _, length in found)]),
            )
        return self._table

    def streams(self) -> Runs:
        """Every stream as one run, over all its episodes."""
        numbers = np.array([n for n in sorted(self._streams) if len(self._streams[n].rows)], np.int64)
        lengths = np.array([len(self._streams[n].rows) for n in numbers.tolist()], np.int64)
        return Runs(numbers, np.zeros_like(numbers), lengths)

    def rows(self, streams: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
        """Row numbers [B, length] of the windows that begin at index ``begins`` [B] of ``streams`` [B]."""
        index = begins[:, None] + np.arange(length)
        ids = np.empty_like(index)
        for number in np.unique(streams).tolist():
            mine = streams == number
            ids[mine] = self._streams[number].rows.values[index[mine]]
        return ids


class Runs(NamedTuple):
    """Rows that follow each other in time, as three int64 arrays [R].

    Attributes:
      stream: number of the stream.
      begin: index among the rows the stream still holds.
      length: rows.
    """

    stream: np.ndarray
    begin: np.ndarray
    length: np.ndarray


class IntQueue:
    """int64 numbers appended on the right, dropped on either side, and read as one array."""

    def __init__(self) -> None:
        self._data = np.empty(16, np.int64)
        self._head = self._tail = 0

    def __len__(self) -> int:
        return self._tail - self._head

    @property
    def values(self) -> np.ndarray:
        """The numbers, as a view that later changes may invalidate."""
        return self._data[self._head : self._tail]

    def extend(self, values: np.ndarray) -> None:
        """Append ``values`` on the right."""
        if self._tail + len(values) > len(self._data):
            held = self.values
            # Twice what is needed: amortised constant time, and the dropped left part is reclaimed.
            self._data = np.empty(2 * (len(held) + len(values)), np.int64)
            self._data[: len(held)] = held
            self._head, self._tail = 0, len(held)
        self._data[self._tail : self._tail + len(values)] = values
        self._tail += len(values)

    def drop_left(self, count: int) -> None:
        """Forget the ``count`` oldest numbers."""
        self._head += count

    def drop_right(self, count: int) -> None:
        """Forget the ``count`` newest numbers."""
        self._tail -= count
