"""Flat arrays of many episodes, in ``.npz`` and HDF5 files: read where they lie, or in pieces if compressed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldloom.config import nearest
from worldloom.data.file_rows import FileRows, forget_open_file
from worldloom.data.parts import CACHE, Columns, Part, Pieces, take_rows, whole
from worldloom.errors import DataError, FileFormatError
from worldloom.interop.archive import Archive, NpyHeader, array_from_bytes, open_archive, read_npy_header
from worldloom.replay.datasets import import_extra
from worldloom.replay.sources import FLAT_NAMES

_log = logging.getLogger("worldloom")

MAX_MAPPED_BYTES = 1 << 44
"""Limit of the size of files of which only rows are read."""
MAX_PIECE_BYTES = 1 << 30
"""Limit of what has to be held in memory at once: one compressed array, one HDF5 chunk."""
_HDF5_BLOCK_BYTES = 1 << 20
_ROW_FLAGS = ("is_first", "is_last", "is_terminal")
_NOT_DATA = {"obs_shape", "action_dim", "capacity"}


class LazyArray(NamedTuple):
    """An array that is read as a whole when one of its rows is, and kept in the cache.

    Attributes:
      shape: its shape.
      dtype: its element type.
      key: identifies it in the cache.
      read: function () → the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    key: Any
    read: Callable[[], np.ndarray]

    def take_rows(self, index: np.ndarray) -> np.ndarray:
        """Rows ``index`` [N]."""
        return take_rows(CACHE.get(self.key, self.read), index)

    def whole(self) -> np.ndarray:
        """The array, not kept in the cache."""
        return self.read()


# ---- files ----------------------------------------------------------------------------------------------------------


def open_npz(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` file by name; those that are not compressed stay in the file.

    Raises ``FileFormatError`` if the file is damaged, or holds pickled objects.
    """
    forget_open_file(path)
    with open_archive(path, max_bytes=MAX_MAPPED_BYTES) as archive:
        return dict(_npz_members(path, archive))


def _npz_members(path: Path, archive: Archive) -> Iterator[tuple[str, Any]]:
    for name in archive.names:
        source = f"{path}: array {name[:100]!r}"
        if not name.endswith(".npy"):
            raise FileFormatError(f"{path}: entry {name[:100]!r} is not an array (.npy) as numpy.savez writes it.")
        size = archive.size(name)
        if archive.is_compressed(name):
            if size > MAX_PIECE_BYTES:
                raise FileFormatError(
                    f"{source} is compressed and unpacks to {size} bytes; more than {MAX_PIECE_BYTES} must be saved "
                    "uncompressed (numpy.savez), or in several files."
                )
            header = read_npy_header(archive.read_start(name, 1 << 12), source)
            yield name.removesuffix(".npy"), _lazy_member(path, name, header, size, source)
            continue
        start = archive.offset(name)
        header = read_npy_header(archive.read_start(name, 1 << 14), source)
        if header.order != "C" and len(header.shape) > 1:
            raise FileFormatError(f"{source} is stored column by column; save numpy.ascontiguousarray of it.")
        _check_size(header, size, source)
        if not header.shape:
            yield name.removesuffix(".npy"), Unread((), header.dtype)
        else:
            yield name.removesuffix(".npy"), FileRows(path, header.dtype, header.shape, start + header.start, source)


def _lazy_member(path: Path, name: str, header: NpyHeader, size: int, source: str) -> LazyArray:
    _check_size(header, size, source)

    def read() -> np.ndarray:
        with open_archive(path, max_bytes=MAX_MAPPED_BYTES) as archive:
            if name not in archive.names or archive.size(name) != size:
                raise FileFormatError(f"{path} has changed since it was opened.")
            data = archive.read(name)
        return array_from_bytes(
            data, header.dtype, header.shape, order=header.order, offset=header.start, source=source
        )

    return LazyArray(header.shape, header.dtype, (str(path), name, path.stat().st_mtime_ns), read)


def _check_size(header: NpyHeader, size: int, source: str) -> None:
    if header.start + int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize != size:
        raise FileFormatError(f"{source} has another size than its header declares; it is damaged.")


def open_hdf5(path: Path) -> dict[str, Any]:
    """The arrays of an HDF5 file by name, ``/`` between the names of groups; contiguous ones stay in the file.

    Raises ``FileFormatError`` if the file is damaged, or refers to other files.
    """
    h5py = import_extra("h5py")
    forget_open_file(path)
    path.open("rb").close()  # The usual OSError for a missing file, which h5py would not tell from a damaged one.
    try:
        file = h5py.File(path, "r")
        return {name: _hdf5_array(file[name], name, path) for name in _hdf5_names(h5py, file, path)}
    except (OSError, RuntimeError, KeyError) as error:
        raise FileFormatError(f"{path} is not an HDF5 file, or it is damaged: {str(error)[:300]}.") from error


def _hdf5_names(h5py: Any, group: Any, path: Path, prefix: str = "", depth: int = 0) -> list[str]:
    """Names of the arrays in a group. Links to other files are refused, as reading them would open those."""
    found: list[str] = []
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise FileFormatError(f"{path}: {prefix}{name} is a link to another file, {link.filename!r:.100}.")
        entry = group.get(name)
        if isinstance(entry, h5py.Group):
            # Groups beside the data, such as metadata and infos, are not read; a soft link may lead in a circle.
            if depth < 1 and isinstance(link, h5py.HardLink):
                found += _hdf5_names(h5py, entry, path, f"{prefix}{name}/", depth + 1)
        elif isinstance(entry, h5py.Dataset):
            found.append(f"{prefix}{name}")
        if len(found) > 10_000:
            raise FileFormatError(f"{path} holds more than 10,000 arrays; files of flat arrays hold a dozen.")
    return found


def _hdf5_array(dataset: Any, name: str, path: Path) -> Any:
    if dataset.external or dataset.is_virtual:
        raise FileFormatError(f"{path}: {name} is stored in other files; save it as an ordinary array.")
    dtype, shape = dataset.dtype, dataset.shape
    if shape is None or not shape or dtype.kind not in "biuf":
        return Unread(shape or (), dtype)
    offset = dataset.id.get_offset()
    if offset is not None and dtype.isnative and dataset.id.get_storage_size() == dataset.nbytes:
        return FileRows(path, dtype, shape, offset, name)
    row_bytes = max(1, dataset.nbytes // max(1, shape[0]))
    chunk = dataset.chunks[0] if dataset.chunks else 1
    chunk_bytes = int(np.prod(dataset.chunks, dtype=object)) * dtype.itemsize if dataset.chunks else 0
    rows = -(-max(1, _HDF5_BLOCK_BYTES // row_bytes) // chunk) * chunk
    if max(rows * row_bytes, chunk_bytes) > MAX_PIECE_BYTES:
        raise FileFormatError(f"{path}: {name} has chunks of {max(rows * row_bytes, chunk_bytes)} bytes.")
    sizes = [min(rows, shape[0] - start) for start in range(0, shape[0], rows)]
    key = (str(path), name, path.stat().st_mtime_ns)

    def read(number: int) -> np.ndarray:
        def load() -> np.ndarray:
            try:
                return np.asarray(dataset[number * rows : number * rows + sizes[number]])
            except (OSError, RuntimeError) as error:
                raise FileFormatError(f"{path}: {name} is damaged: {str(error)[:200]}.") from error

        return CACHE.get((*key, number), load)

    return Blocks(sizes, read, shape, dtype)


class Unread(NamedTuple):
    """An array that holds no rows of numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Blocks(Pieces):
    """A column in pieces whose shape is known."""

    def __init__(self, sizes: Any, read: Any, shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(sizes, read)
        self.shape, self.dtype = shape, dtype

    def whole(self) -> np.ndarray:
        """The array, in memory."""
        return self.take_rows(np.arange(self.shape[0]))


# ---- flat arrays as episodes ----------------------------------------------------------------------------------------


def flat_part(place: str, arrays: Mapping[str, Any]) -> Part:
    """The episodes in flat arrays: steps with the names of D4RL, Gymnasium or Minari, or rows with ``is_first``.

    Raises ``FileFormatError`` if an array is missing, and ``DataError`` if lengths differ or nothing ends an episode.
    """
    known = {name: arrays[name] for name in arrays if name != "num_actions"}
    num_actions = _number(arrays.get("num_actions"))
    found = _find(known, place)
    length = _common_length(found, place)
    used = {"obs": found["obs"], "actions": found["actions"], "rewards": found["rewards"]}
    task = found.get("task")
    if "is_first" in found:
        begin, rows, terminal = _episodes_of_rows(found, length, place)
        columns = Columns(used["obs"], used["actions"], used["rewards"], task=task)
        return Part(place, begin, rows, terminal, lambda: columns, 0, 0, in_files=True, num_actions=num_actions)
    begin, steps, terminal = _episodes_of_steps(found, length, place)
    last_obs = found.get("next_obs")
    columns = Columns(used["obs"], used["actions"], used["rewards"], last_obs, task)
    if last_obs is not None:
        return Part(place, begin, steps + 1, terminal, lambda: columns, in_files=True)
    # Where the last action led is not recorded: with it go its reward and what kind of end it was.
    _log.warning("%s has no next observations: the last action of each of %d episodes is left out.", place, len(begin))
    whole = steps >= 2
    if not whole.all():
        _log.warning("%d episodes of %s of a single row are left out.", int((~whole).sum()), place)
    return Part(place, begin[whole], steps[whole], np.zeros(int(whole.sum()), bool), lambda: columns, in_files=True)


def _number(array: Any) -> int | None:
    """The number of discrete actions that a converted file names; None if it makes no sense, or there is none."""
    if not isinstance(array, FileRows) or array.dtype.kind != "i" or array.shape != (1,):
        return None
    number = int(array.whole()[0])
    return number if 0 < number < 1 << 20 else None


def _find(arrays: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The arrays by the names of ``FLAT_NAMES``, flags of rows and ``task``; observations as dicts of arrays."""
    found: dict[str, Any] = {}
    used: set[str] = set()
    names: Iterable[tuple[str, tuple[str, ...]]] = [*FLAT_NAMES.items(), *((name, (name,)) for name in _ROW_FLAGS)]
    for argument, candidates in [*names, ("task", ("task", "tasks"))]:
        for name in candidates:
            entries = [key for key in arrays if key == name or key.startswith(f"{name}/")]
            if not entries:
                continue
            used |= set(entries)
            if argument in ("obs", "next_obs"):
                found[argument] = {key.partition("/")[2]: arrays[key] for key in entries}
            elif len(entries) > 1 or entries[0] != name:
                raise DataError(f"{place}: {name} is a group of arrays; a dataset has one array of them.")
            else:
                found[argument] = arrays[name]
            break
    missing = [name for name in ("obs", "actions", "rewards") if name not in found]
    if missing:
        held = ", ".join(list(arrays)[:12]) or "no array"
        raise FileFormatError(f"{place} has no {', '.join(missing)}; it holds {held}.{nearest(missing[0], arrays)}")
    if "next_obs" in found and set(found["next_obs"]) != set(found["obs"]):
        raise DataError(f"{place}: next_obs must have the form of obs: one array, or a dict of the same arrays.")
    for name, array in found.get("next_obs", {}).items():
        shapes = array.shape, found["obs"][name].shape
        if shapes[0] != shapes[1]:
            raise DataError(f"{place}: next_obs {name} has shape {shapes[0]}, obs {shapes[1]}; they must be the same.")
    others = sorted(set(arrays) - used - _NOT_DATA)
    if others:
        _log.warning("These arrays of %s are not read: %s.", place, ", ".join(others[:20]))
    return found


def _common_length(found: Mapping[str, Any], place: str) -> int:
    flat = {k: v for k, v in found.items() if not isinstance(v, Mapping)}
    flat |= {f"{k}/{n}": v for k, each in found.items() if isinstance(each, Mapping) for n, v in each.items()}
    for name, array in flat.items():
        if array.dtype.kind not in "biuf" or not array.shape:
            raise DataError(f"{place}: {name} has dtype {array.dtype} and shape {array.shape}; numbers are needed.")
    lengths = {name: array.shape[0] for name, array in flat.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"The arrays of {place} have different lengths: {lengths}.")
    return int(next(iter(lengths.values())))


def _flags(found: Mapping[str, Any], name: str, length: int, place: str) -> np.ndarray:
    array = found[name]
    values = whole(array)
    values = values.reshape(-1) if values.size == length else values
    if values.shape != (length,) or not np.isin(values, (0, 1)).all():
        raise DataError(f"{place}: {name} must hold one boolean (or 0 and 1) for each row.")
    return values.astype(bool)


def _episodes_of_rows(found: Mapping[str, Any], length: int, place: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flags = {name: _flags(found, name, length, place) for name in _ROW_FLAGS if name in found}
    return episodes_of_rows(flags["is_first"], flags.get("is_terminal"), place)


def episodes_of_rows(
    first: np.ndarray, terminal: np.ndarray | None, place: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row, rows and terminal end of the episodes in rows that follow each other, from their flags [N].

    Rows before the first ``is_first`` are the rest of an episode. Episodes of one row are left out, with a message.
    """
    if len(first) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool)
    starts = np.flatnonzero(first)
    starts = starts if first[0] else np.concatenate([[0], starts])
    lengths = np.diff(starts, append=len(first))
    ends = starts + lengths - 1
    over = np.zeros(len(starts), bool) if terminal is None else terminal[ends]
    if terminal is not None and terminal.sum() > over.sum():
        inside = np.setdiff1d(np.flatnonzero(terminal), ends)[0]
        raise DataError(f"{place}: row {inside} is terminal, but its episode goes on after it.")
    whole = lengths >= 2
    if not whole.all():
        _log.warning("%d episodes of %s of a single row are left out.", int((~whole).sum()), place)
    return starts[whole], lengths[whole], over[whole]


def _episodes_of_steps(found: Mapping[str, Any], length: int, place: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First step, steps and terminal end of each episode; see ``replay.sources.split_episodes``."""
    ends = {name: _flags(found, name, length, place) for name in ("terminals", "timeouts", "dones") if name in found}
    if not ends:
        raise DataError(f"Nothing says where the episodes of {place} end: terminals, timeouts or dones.")
    ended = np.logical_or.reduce(list(ends.values()))
    terminal = ends.get("terminals", ended & ~ends["timeouts"] if "timeouts" in ends else ended)
    stops = np.flatnonzero(ended) + 1
    if not len(stops) and length:
        _log.warning("No row of %s ends an episode: all %d are taken as one.", place, length)
    begin = np.concatenate([[0], stops]).astype(np.int64)
    stops = np.concatenate([stops, [length]]).astype(np.int64)
    kept = stops > begin
    begin, stops = begin[kept], stops[kept]
    return begin, stops - begin, terminal[stops - 1] if length else np.empty(0, bool)
