"""This library's own replay as a dataset: the chunk files of a run, or a file of ``ReplayBuffer.save``."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.data.arrays import episodes_of_rows
from worldloom.data.file_rows import FileRows, forget_open_file
from worldloom.data.parts import Columns, Joined, Part
from worldloom.errors import DataError, FileFormatError
from worldloom.replay.chunks import CHUNK_NAME, Layout
from worldloom.replay.index import FIRST, LAST, TERMINAL
from worldloom.replay.table import Column

_log = logging.getLogger("worldloom")

_MAX_HEADER_BYTES = 1 << 16
_DTYPES = ("<f4", "<i4", "|u1", "<u1")


def replay_folder(path: Path) -> Path | None:
    """The folder of chunk files at ``path``: itself, or that of the run or checkpoints there; None without any."""
    for folder in (path, path / "replay", path / "checkpoints" / "replay"):
        if folder.is_dir() and any(CHUNK_NAME.fullmatch(each.name) for each in folder.iterdir()):
            return folder
    return None


def chunk_parts(folder: Path) -> list[Part]:
    """The episodes in the chunk files of rows in ``folder``, read row by row: one part for each environment.

    Files may overlap: the older checkpoints of a run name files that begin with rows evicted since. Checksums are not
    verified.

    Raises ``FileFormatError`` if a file is damaged, and ``DataError`` if the files do not hold the same columns.
    """
    files = [each for path in sorted(folder.iterdir()) if (each := _Rows.named(path))]
    files.sort(key=lambda each: (each.first, -each.rows))
    chosen: list[_Rows] = []
    end = 0
    for each in files:
        if not chosen or each.first + each.rows > end:
            each.skipped = max(0, end - each.first) if chosen else 0
            end = each.first + each.rows
            chosen.append(each)
    if not chosen:
        raise DataError(f"{folder} holds no chunk files of rows.")
    for each in chosen:
        each.open()
        if each.columns != chosen[0].columns:
            raise DataError(f"{each.path} does not hold the columns of {chosen[0].path}: {each.columns}.")
    return _parts(folder, chosen)


class _Rows:
    """A chunk file of rows, of which the first ``skipped`` are not read."""

    def __init__(self, path: Path, first: int, rows: int):
        self.path, self.first, self.rows, self.skipped = path, first, rows, 0
        self.columns: dict[str, tuple[tuple[int, ...], str]] = {}
        self.arrays: dict[str, FileRows] = {}

    @classmethod
    def named(cls, path: Path) -> _Rows | None:
        if not CHUNK_NAME.fullmatch(path.name) or not path.name.startswith("rows-"):
            return None
        _, first, rows, _ = path.name.split("-")
        return cls(path, int(first), int(rows))

    def open(self) -> None:
        """Read the header, and find the columns."""
        forget_open_file(self.path)
        with self.path.open("rb") as file:
            start = file.read(_MAX_HEADER_BYTES)
        try:
            described = json.loads(start[: start.index(b"\n")])
            self.columns = {
                str(name): (tuple(int(size) for size in shape), str(dtype))
                for name, shape, dtype in described["columns"]
            }
            if described["first_row"] != self.first or described["rows"] != self.rows:
                raise ValueError("other rows than the file's name says")
            if any(dtype not in _DTYPES or min(shape, default=1) < 1 for shape, dtype in self.columns.values()):
                raise ValueError("columns of unknown types")
            columns = {name: Column(shape, np.dtype(dtype)) for name, (shape, dtype) in self.columns.items()}
            layout = Layout("rows", columns, self.first, self.rows)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileFormatError(f"{self.path} is not a chunk file, or it is damaged: {str(error)[:200]}.") from error
        size = self.path.stat().st_size
        if layout.size != size:
            raise FileFormatError(f"{self.path} has {size} bytes where {layout.size} are expected; it is damaged.")
        for name, column in columns.items():
            shape = (self.rows - self.skipped, *column.shape)
            begin = layout.offsets[name] + self.skipped * column.dtype.itemsize * math.prod(column.shape)
            self.arrays[name] = FileRows(self.path, column.dtype, shape, begin, name)


def _parts(folder: Path, files: list[_Rows]) -> list[Part]:
    sizes, first = [each.rows - each.skipped for each in files], files[0]

    def column(name: str) -> Joined:
        return Joined([each.arrays[name] for each in files])

    names = list(first.columns)
    missing = [name for name in ("rewards", "flags", "stream") if name not in names]
    actions = [name for name in names if name == "actions" or name.startswith("actions/")]
    if missing or len(actions) != 1:
        raise DataError(f"{folder} holds the columns {', '.join(names)}; a dataset has one array of actions.")
    obs = {name.partition("/")[2]: column(name) for name in names if name == "obs" or name.startswith("obs/")}
    task = column("task") if "task" in names else None
    columns = Columns(obs, column(actions[0]), column("rewards"), task=task)
    flags, streams = column("flags").whole(), column("stream").whole()
    # A gap between files is where rows were evicted, or a file is missing: what follows is not the same episode.
    gaps = np.zeros(len(flags), bool)
    ends = np.cumsum(sizes)[:-1]
    gaps[ends] = [a.first + a.rows != b.first + b.skipped for a, b in itertools.pairwise(files)]
    generation = np.cumsum(gaps)
    found = []
    for number in np.unique(streams).tolist():
        order = np.flatnonzero(streams == number)
        mine = flags[order]
        begins = (mine & FIRST != 0) | (np.diff(generation[order], prepend=-1) != 0)
        begins[1:] |= mine[:-1] & LAST != 0
        place = f"{folder}, environment {number}" if number >= 0 else str(folder)
        begin, length, terminal = episodes_of_rows(begins, mine & TERMINAL != 0, place)
        found.append(Part(place, begin, length, terminal, lambda: columns, reward_offset=0, order=order, in_files=True))
    return found


def saved_parts(path: Path) -> list[Part]:
    """The episodes in a file of ``ReplayBuffer.save``, which is read into memory.

    Raises ``FileFormatError`` as ``ReplayBuffer.load`` does.
    """
    from worldloom.replay import ReplayBuffer

    buffer = ReplayBuffer.load(path)
    if len(buffer) == 0:
        raise DataError(f"{path} holds no rows.")
    return [_in_memory(episode, f"{path}, episode {number}") for number, episode in enumerate(buffer.episodes())]


def _in_memory(episode: dict[str, Any], place: str) -> Part:
    obs, actions = episode["obs"], episode["actions"]
    if isinstance(actions, dict):
        raise DataError(f"{place} has several arrays of actions; a dataset has one.")
    named = obs if isinstance(obs, dict) else {"": obs}
    count = len(episode["rewards"])
    task = np.full(count, episode["task"]) if "task" in episode else None
    columns = Columns(named, actions, episode["rewards"], task=task)
    terminal = np.array([bool(episode["is_terminal"][-1])])
    return Part(place, np.zeros(1, np.int64), np.array([count]), terminal, lambda: columns, reward_offset=0)
