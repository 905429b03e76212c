"""Arrays in a file that is mapped into memory instead of being read."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from worldloom.errors import FileFormatError


class MappedFile:
    """A file mapped into memory for reading: arrays of it cost memory only where they are read.

    Args:
      path: a regular file.

    Raises:
      FileFormatError: the file is empty.
      OSError: it cannot be opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise FileFormatError(f"{self.path} is empty.")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int, what: str = "an array") -> NDArray:
        """The read-only array of ``shape`` at byte ``offset``, not read yet.

        Raises ``FileFormatError`` if it reaches beyond the file's end; ``what`` names it there.
        """
        dtype = np.dtype(dtype)
        end = offset + math.prod(shape) * dtype.itemsize
        if offset < 0 or min(shape, default=0) < 0 or end > self.size:
            raise FileFormatError(
                f"{self.path} is truncated: {what} would end at byte {end}, and the file has {self.size}."
            )
        array: NDArray = np.ndarray(shape, dtype, self._map, offset)
        return array

    def offset(self, array: NDArray) -> int:
        """At which byte an array of :meth:`array`, or a view of one, begins."""
        start = np.frombuffer(self._map, np.uint8, 1).__array_interface__["data"][0]
        return int(array.__array_interface__["data"][0] - start)
