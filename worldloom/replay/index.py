"""Which rows follow each other in time: the streams, and the episodes in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

FIRST, LAST, TERMINAL, INTERRUPTED = 1, 2, 4, 8
"""Bits of the ``flags`` column. ``INTERRUPTED``: not marked last, but the next row of its stream begins an episode."""

GIVEN_FLAGS = np.uint8(FIRST | LAST | TERMINAL)
"""The flags given with a row, which are stored in files; ``INTERRUPTED`` is derived from the rows after it."""


class Stream:
    """The rows of one environment, in order.

    A row's *position* counts the rows of its stream from the beginning, dropped ones included.

    Attributes:
      rows: row numbers still held, ascending.
      starts: position of each episode's first held row, ascending.
      dropped: number of rows dropped at the old end, so that ``rows[0]`` has position ``dropped``.
      in_progress: whether the last row was not an episode's last.
    """

    def __init__(self) -> None:
        self.rows = IntDeque()
        self.starts = IntDeque()
        self.dropped = 0
        self.in_progress = False

    @property
    def newest(self) -> int:
        """Number of the newest row held; −1 for none."""
        return int(self.rows.values[-1]) if len(self.rows) else -1

    @property
    def length(self) -> int:
        """Rows from the beginning of the stream on, dropped ones included: the position of the next row."""
        return self.dropped + len(self.rows)

    def drop_before(self, first: int) -> None:
        """Drop the rows numbered below ``first``; of an episode cut in the middle, the rest stays."""
        count = int(self.rows.values.searchsorted(first))
        if count == 0:
            return
        self.rows.drop_left(count)
        self.dropped += count
        if len(self.rows) == 0:
            self.starts.drop_left(len(self.starts))
        else:
            # The last start at or before the oldest row belongs to the episode that the cut leaves in part.
            starts = self.starts.values
            last = int(starts.searchsorted(self.dropped, side="right")) - 1
            starts[last] = max(starts[last], self.dropped)
            self.starts.drop_left(last)

    def truncate(self, end: int) -> None:
        """Drop the rows numbered ``end`` and above. The caller, who has the flags, sets ``in_progress``."""
        self.rows.drop_right(len(self.rows) - int(np.searchsorted(self.rows.values, end)))
        self.starts.drop_right(len(self.starts) - int(np.searchsorted(self.starts.values, self.length)))

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Index into ``rows`` at which each episode begins, and its number of rows: two int64 [E]."""
        begin = self.starts.values - self.dropped
        return begin, np.diff(begin, append=len(self.rows))

    @property
    def finished(self) -> int:
        """Number of ``rows`` that belong to finished episodes: all but those of the one in progress."""
        return int(self.starts.values[-1]) - self.dropped if self.in_progress and len(self.rows) else len(self.rows)

    def windows_after(self, row: int, length: int) -> np.ndarray:
        """Of the windows of ``length`` rows that begin at multiples of ``length``, those that end after ``row``.

        Row numbers, int64 [W, length]; windows that are incomplete or no longer held are left out.
        """
        end = self.length
        first = self.dropped + int(np.searchsorted(self.rows.values, row, side="right"))  # position of a window's end
        windows = np.arange(max(first // length, -(-self.dropped // length)), end // length)
        return self.rows.values[windows[:, None] * length + np.arange(length) - self.dropped]


class EpisodeIndex:
    """All streams by number, and the episodes in them.

    Streams are always iterated in order of their numbers, so that what is drawn depends only on the rows held, not on
    the order in which streams appeared.
    """

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._episodes: Segments | None = None
        self._finished: Segments | None = None

    def add(self, ids: np.ndarray, streams: np.ndarray, flags: np.ndarray) -> np.ndarray:
        """Add the rows ``ids`` [N] of ``streams`` [N]; returns the rows [K] whose episode they interrupt."""
        self._episodes = self._finished = None
        # Stream by stream: those of the k-th are at begin[k] … end[k] - 1.
        order = np.argsort(streams, kind="stable")
        ids, streams, flags = ids[order], streams[order], flags[order]
        begin = np.concatenate([[0], np.flatnonzero(np.diff(streams)) + 1])
        end = np.append(begin[1:], len(ids))
        mine = [self._streams.setdefault(number, Stream()) for number in streams[begin].tolist()]
        is_first, is_open = flags & FIRST != 0, flags & LAST == 0
        # The row before each one in its stream (-1 for none), and whether its episode was in progress there.
        before, was_open = np.empty_like(ids), np.empty_like(is_open)
        before[1:], was_open[1:] = ids[:-1], is_open[:-1]
        before[begin] = [stream.newest for stream in mine]
        was_open[begin] = [stream.in_progress for stream in mine]
        # A stream of which all rows were dropped may go on in the middle of an episode; its rest counts as an episode.
        starts = np.flatnonzero(is_first | (before < 0))
        cuts = starts.searchsorted(np.append(begin, len(ids))).tolist()
        opened = is_open[end - 1].tolist()
        for k, (stream, a, b) in enumerate(zip(mine, begin.tolist(), end.tolist(), strict=True)):
            if cuts[k] < cuts[k + 1]:
                stream.starts.extend(starts[cuts[k] : cuts[k + 1]] + (stream.length - a))
            stream.rows.extend(ids[a:b])
            stream.in_progress = opened[k]
        return before[is_first & was_open & (before >= 0)]

    @property
    def dropped(self) -> dict[int, int]:
        """How many rows of each stream have been dropped, of those that have lost any."""
        return {number: stream.dropped for number, stream in sorted(self._streams.items()) if stream.dropped}

    @dropped.setter
    def dropped(self, counts: Mapping[int, int]) -> None:
        for number, count in counts.items():
            self._streams.setdefault(number, Stream()).dropped = count

    def drop_before(self, first: int) -> None:
        """Drop the rows numbered below ``first``."""
        self._episodes = self._finished = None
        for stream in self._streams.values():
            stream.drop_before(first)

    def truncate(self, end: int) -> np.ndarray:
        """Drop the rows numbered ``end`` and above.

        Returns:
          Number of the newest row left of each stream, int64 [S]; :meth:`reopen` needs their flags.
        """
        self._episodes = self._finished = None
        for stream in self._streams.values():
            stream.truncate(end)
        self._streams = {number: stream for number, stream in self._streams.items() if len(stream.rows)}
        return np.array([stream.rows.values[-1] for stream in self._streams.values()], np.int64)

    def reopen(self, flags: np.ndarray) -> None:
        """After :meth:`truncate`, with the flags [S] of the rows it returned: mark which episodes are in progress."""
        for stream, flag in zip(self._streams.values(), flags, strict=True):
            stream.in_progress = not flag & LAST

    def in_progress(self, number: int) -> bool:
        """Whether stream ``number`` has an episode in progress: its last row was not an episode's last."""
        return number in self._streams and self._streams[number].in_progress

    def episodes(self) -> Segments:
        """All episodes held, including those of which only a part is left."""
        if self._episodes is None:
            found = [(number, *self._streams[number].episodes()) for number in sorted(self._streams)]
            self._episodes = Segments(
                np.repeat([number for number, _, _ in found], [len(begin) for _, begin, _ in found]).astype(np.int64),
                np.concatenate([np.empty(0, np.int64), *(begin for _, begin, _ in found)]),
                np.concatenate([np.empty(0, np.int64), *(length for _, _, length in found)]),
            )
        return self._episodes

    def finished_episodes(self) -> Segments:
        """The episodes held that are over."""
        if self._finished is None:
            segments, numbers = self.episodes(), sorted(self._streams)
            ends = np.array([self._streams[number].finished for number in numbers], np.int64)
            over = segments.begin < ends[np.searchsorted(numbers, segments.stream)]
            self._finished = Segments(*(column[over] for column in segments))
        return self._finished

    def windows_after(self, row: int, length: int) -> np.ndarray:
        """Successive windows of the streams that end after ``row``, by their last row; see ``Stream.windows_after``.

        Recorded episodes (negative stream numbers) are left out.
        """
        streams = [stream for number, stream in self._streams.items() if number >= 0]
        found = [np.empty((0, length), np.int64), *(stream.windows_after(row, length) for stream in streams)]
        windows = np.concatenate(found)
        return windows[np.argsort(windows[:, -1], kind="stable")]

    def episode_rows(self) -> list[np.ndarray]:
        """Row numbers of each episode, int64 [n]."""
        return [
            self.rows(stream[None], begin[None], int(length))[0]
            for stream, begin, length in zip(*self.episodes(), strict=True)
        ]

    def streams(self, *, finished: bool = False) -> Segments:
        """Each stream as one segment, across all its episodes; with ``finished`` without the one in progress."""
        numbers = np.array([n for n in sorted(self._streams) if len(self._streams[n].rows)], np.int64)
        held = [self._streams[n] for n in numbers.tolist()]
        lengths = np.array([stream.finished if finished else len(stream.rows) for stream in held], np.int64)
        return Segments(numbers, np.zeros_like(numbers), lengths)

    def rows(self, streams: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
        """Row numbers [B, length] of the windows that begin at index ``begins`` [B] of ``streams`` [B]."""
        index = begins[:, None] + np.arange(length)
        ids = np.empty_like(index)
        for number in np.unique(streams).tolist():
            mine = streams == number
            ids[mine] = self._streams[number].rows.values[index[mine]]
        return ids


class Segments(NamedTuple):
    """Rows of a stream that follow each other in time, as three int64 arrays [R].

    Attributes:
      stream: number of the stream.
      begin: index among the rows that the stream still holds.
      length: number of rows.
    """

    stream: np.ndarray
    begin: np.ndarray
    length: np.ndarray


class IntDeque:
    """int64 numbers appended on the right, dropped on either side, and read as one array."""

    def __init__(self) -> None:
        self._data = np.empty(16, np.int64)
        self._head = self._tail = 0

    def __len__(self) -> int:
        return self._tail - self._head

    @property
    def values(self) -> np.ndarray:
        """The numbers, as a view that is valid until the next change."""
        return self._data[self._head : self._tail]

    def extend(self, values: np.ndarray) -> None:
        """Append ``values`` [N] on the right."""
        if self._tail + len(values) > len(self._data):
            held = self.values
            # Twice what is needed: amortised constant time, and the dropped left part is reclaimed.
            self._data = np.empty(2 * (len(held) + len(values)), np.int64)
            self._data[: len(held)] = held
            self._head, self._tail = 0, len(held)
        self._data[self._tail : self._tail + len(values)] = values
        self._tail += len(values)

    def drop_left(self, count: int) -> None:
        """Drop the ``count`` oldest numbers."""
        self._head += count

    def drop_right(self, count: int) -> None:
        """Drop the ``count`` newest numbers."""
        self._tail -= count
