"""Where the rows of a recorded dataset lie: parts of files, and how an episode's rows are found in them."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from worldloom.data.file_rows import FileRows

CACHE_BYTES = 256 << 20
"""Memory for pieces that cannot be mapped (compressed files, HDF5 in chunks, Parquet), of all datasets together."""


class Columns(NamedTuple):
    """The arrays that the rows of some episodes lie in, each [N, ...], or something with a ``take_rows`` method.

    Attributes:
      obs: observations, by name; a single observation has the name ``""``.
      actions: actions.
      rewards: rewards.
      last_obs: observations *after* the action of their row, by name, for the last row of an episode; None if ``obs``
        holds those too.
      task: numbers of tasks, or None.
    """

    obs: Mapping[str, Any]
    actions: Any
    rewards: Any
    last_obs: Mapping[str, Any] | None = None
    task: Any = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Episodes whose rows lie in the same arrays.

    Attributes:
      place: where they are from, for messages.
      begin: int64 [E], index of each episode's first row in the arrays.
      length: int64 [E], rows of each episode: its observations.
      terminal: bool [E], whether it ended in a terminal state.
      columns: function () → the arrays; cheap if they are mapped or were just read.
      action_offset: an episode's row t has the action at index t + ``action_offset``: 0 if actions lie beside the
        observation that they were chosen at, 1 beside the one that they led to.
      reward_offset: likewise, 0 if rewards lie beside the observation they came with, −1 beside the action before.
      order: int64 [N] or None: index ``i`` of the episodes is row ``order[i]`` of the arrays.
      num_actions: number of discrete actions, where the file says it.
      in_files: whether the columns are always the same, and arrays in files among them.
    """

    place: str
    begin: np.ndarray
    length: np.ndarray
    terminal: np.ndarray
    columns: Callable[[], Columns]
    action_offset: int = 0
    reward_offset: int = -1
    order: np.ndarray | None = None
    num_actions: int | None = None
    in_files: bool = False

    def read(self, index: np.ndarray, first: np.ndarray, last: np.ndarray, *, observations: bool = True) -> Columns:
        """The rows at ``index`` int64 [N], of which those with ``first`` and ``last`` begin and end an episode.

        By the arrival rule: a first row has reward 0, and a last one the action 0. ``last_obs`` is None.
        """
        columns = self.columns()
        # What does not exist, such as the action at an episode's end, must not be looked up: it may lie beyond the
        # arrays. The row before is looked up instead, and what it holds replaced.
        at_actions = np.where(last, index - (self.action_offset == 0), index + self.action_offset)
        actions = take_rows(columns.actions, self._rows(at_actions))
        rewards = take_rows(columns.rewards, self._rows(np.where(first, index, index + self.reward_offset)))
        actions, rewards = _writable(actions), _writable(rewards)
        if last.any():
            actions[last] = 0
        if first.any():
            rewards[first] = 0
        at_tasks = index if columns.last_obs is None else index - last
        task = None if columns.task is None else take_rows(columns.task, self._rows(at_tasks))
        return Columns(self._read_obs(columns, index, last) if observations else {}, actions, rewards, task=task)

    def _read_obs(self, columns: Columns, index: np.ndarray, last: np.ndarray) -> dict[str, np.ndarray]:
        if columns.last_obs is None:
            return {name: take_rows(array, self._rows(index)) for name, array in columns.obs.items()}
        # The observation after an episode's last action lies beside that action.
        found = {}
        for name, array in columns.obs.items():
            values = np.array(take_rows(array, self._rows(np.where(last, index - 1, index))))
            if last.any():
                values[last] = take_rows(columns.last_obs[name], self._rows(index[last] - 1))
            found[name] = values
        return found

    def _rows(self, index: np.ndarray) -> np.ndarray:
        return index if self.order is None else self.order[index]


def _writable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else np.array(array)


def take_rows(array: Any, index: np.ndarray) -> np.ndarray:
    """Rows ``index`` [N] of an array [M, ...], or of a column that finds them itself."""
    if isinstance(array, np.ndarray):
        return array.take(index, axis=0)
    found: np.ndarray = array.take_rows(index)
    return found


class Pieces:
    """A column [N, ...] that consists of pieces, one after the other, each read when it is needed.

    Args:
      sizes: rows of each piece.
      read: function (number of the piece) → its array.
    """

    def __init__(self, sizes: Sequence[int], read: Callable[[int], np.ndarray]):
        self._starts = np.cumsum([0, *sizes]).tolist()
        self._read = read

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take_rows(self, index: np.ndarray) -> np.ndarray:
        """Rows ``index`` [N]."""
        if len(index) == 0:
            return np.asarray(self._read(0))[:0]
        out: np.ndarray | None = None
        numbers = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            rows = take_rows(self._read(number), index[mine] - self._starts[number])
            if out is None:
                out = np.empty((len(index), *rows.shape[1:]), rows.dtype)
            out[mine] = rows
        assert out is not None
        return out


class Joined(Pieces):
    """A column that consists of given columns, one after the other."""

    def __init__(self, columns: Sequence[Any]):
        super().__init__([column.shape[0] for column in columns], columns.__getitem__)
        self.columns = columns
        self.shape, self.dtype = (len(self), *columns[0].shape[1:]), columns[0].dtype

    def whole(self) -> np.ndarray:
        """The column, in memory."""
        return np.concatenate([whole(column) for column in self.columns])


def whole(column: Any) -> np.ndarray:
    """All rows of a column, in memory."""
    return column if isinstance(column, np.ndarray) else column.whole()


def files_of(columns: Columns) -> Iterator[FileRows]:
    """The arrays in files that the columns consist of."""
    named = [*columns.obs.values(), *(columns.last_obs or {}).values()]
    for column in (*named, columns.actions, columns.rewards, columns.task):
        for each in column.columns if isinstance(column, Joined) else (column,):
            if isinstance(each, FileRows):
                yield each


class PieceCache:
    """The pieces read last, up to ``max_bytes``; the newest is kept whatever its size."""

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self.max_bytes, self.nbytes = max_bytes, 0
        self._pieces: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        """The piece ``key``, read by ``read`` unless it is held."""
        with self._lock:
            if key in self._pieces:
                self._pieces.move_to_end(key)
                return self._pieces[key][0]
        piece = read()
        nbytes = _nbytes(piece)
        with self._lock:
            if key not in self._pieces:
                self._pieces[key] = piece, nbytes
                self.nbytes += nbytes
            while self.nbytes > self.max_bytes and len(self._pieces) > 1:
                self.nbytes -= self._pieces.popitem(last=False)[1][1]
        return piece


CACHE = PieceCache()
"""Shared by all datasets of the process."""


def _nbytes(piece: Any) -> int:
    if isinstance(piece, np.ndarray):
        return piece.nbytes
    if isinstance(piece, Mapping):
        return sum(map(_nbytes, piece.values()))
    return sum(map(_nbytes, piece)) if isinstance(piece, tuple | list) else 0
