"""Arrays that lie in a file as they are: rows are read where they lie, and nothing else of the file."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.errors import FileFormatError

KEPT_BYTES = 192 << 20
"""Memory of a dataset for its smallest arrays, such as rewards, which are read once and kept."""
_SMALL_BYTES = 4096
"""Runs of rows of up to so many bytes are read into an object of their own, longer ones where they belong."""
_MAX_OPEN = 64
"""Files that are held open, of all datasets together; a process may usually open 1,024."""


class FileRows:
    """The array of ``shape`` at byte ``offset`` of a file, row after row, of which rows are read when they are needed.

    Memory maps would be simpler, but the system counts, and may keep, megabytes around every row as this process's
    memory.

    Args:
      path: the file.
      dtype: type of its elements.
      shape: its shape, [N, ...].
      offset: where it begins.
      what: name for messages.

    Attributes:
      kept: whether the whole array is read once and kept in memory.

    Raises:
      FileFormatError: the array would reach beyond the end of the file.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...], offset: int, what: str = "an array"):
        self.path, self.dtype, self.shape, self.offset = path, np.dtype(dtype), shape, offset
        self.kept = False
        self._whole: np.ndarray | None = None
        self._row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        self.nbytes = self._row_bytes * shape[0]
        size = path.stat().st_size
        if offset + self.nbytes > size:
            raise FileFormatError(
                f"{path} is truncated: {what} would end at byte {offset + self.nbytes}, and the file has {size}."
            )

    def take_rows(self, index: np.ndarray) -> np.ndarray:
        """Rows ``index`` [N]. Raises ``FileFormatError`` if the file has become shorter since it was opened."""
        if self.kept:
            if self._whole is None:
                self._whole = self.whole()
            return self._whole.take(index, axis=0)
        if len(index) == 0 or self._row_bytes == 0:
            return np.zeros((len(index), *self.shape[1:]), self.dtype)
        width = self._row_bytes
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)
        begins = (self.offset + index[starts] * width).tolist()
        edges = [*(starts * width).tolist(), len(index) * width]
        lengths = [stop - start for start, stop in itertools.pairwise(edges)]
        with _OPEN.file(self.path) as file:
            if edges[-1] <= _SMALL_BYTES * len(begins):
                # One call per run of rows is most of the work here, so as little as possible is done around it.
                data = bytearray(b"").join(map(os.pread, itertools.repeat(file), lengths, begins))
                read = len(data)
            else:
                data = bytearray(edges[-1])
                view = memoryview(data)
                parts = (view[start:stop] for start, stop in itertools.pairwise(edges))
                read = sum(os.preadv(file, [part], begin) for part, begin in zip(parts, begins, strict=True))
        if read != edges[-1]:
            raise FileFormatError(f"{self.path} has become shorter since it was opened.")
        return np.frombuffer(data, self.dtype).reshape(len(index), *self.shape[1:])

    def whole(self) -> np.ndarray:
        """The array in memory."""
        array = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset)
        if array.size != math.prod(self.shape):
            raise FileFormatError(f"{self.path} has become shorter since it was opened.")
        return array.reshape(self.shape)


def keep_smallest(arrays: Iterable[FileRows], budget: int = KEPT_BYTES) -> None:
    """Keep the smallest of a dataset's arrays in memory, as many as fit into ``budget`` bytes."""
    held = 0
    for array in sorted({id(each): each for each in arrays}.values(), key=lambda each: each.nbytes):
        held += array.nbytes
        array.kept = held <= budget


class _OpenFiles:
    """The files read last, open."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def file(self, path: Path) -> Any:
        """The descriptor of ``path``, valid inside the block."""
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                while len(self._files) > _MAX_OPEN:
                    os.close(self._files.popitem(last=False)[1])
            self._files.move_to_end(path)
            yield self._files[path]

    def close(self, path: Path) -> None:
        """Close ``path``, which may be another file by now."""
        with self._lock:
            if path in self._files:
                os.close(self._files.pop(path))


_OPEN = _OpenFiles()


def forget_open_file(path: Path) -> None:
    """Called when a file is opened anew: the file of that name may have been replaced."""
    _OPEN.close(path)
