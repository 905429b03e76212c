"""Pickles of arrays and plain containers, and checkpoint folders of DreamerV3's reference program.

Allowed are ``dict``, ``OrderedDict``, ``list``, ``tuple``, ``set``, ``frozenset``, ``str``, ``bytes``, ``int``,
``float``, ``bool``, ``None``, and numpy arrays and scalars of numbers (bfloat16 included) and bools, as protocols 2 to
5 write them. Anything else is refused by name; :mod:`worldloom.interop.pickle_machine` explains how.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import FileFormatError
from worldloom.files import absolute_path
from worldloom.interop.archive import MAX_BYTES, array_from_bytes, file_size, shorten
from worldloom.interop.pickle_machine import Call, Global, PickleReader, Unfinished, matches

_DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"})


class _Dtype(Unfinished):
    """``numpy.dtype(code, False, True)``, then BUILD with version, byte order, and fields of structured dtypes.

    Source: ``arraydescr_reduce`` in numpy's ``descriptor.c``.
    """

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype

    def finish(self, reader: PickleReader, state: Any) -> None:
        rest = (-1, -1, 0) if self._dtype.isbuiltin == 1 else (2, 2, 64)  # bfloat16 gives its size, alignment and flags
        order = next((o for o in "<>|=" if matches(state, (3, o, None, None, None, *rest))), None)
        reader.check(order is not None, "dtype")
        self.value = self._dtype.newbyteorder(order)  # type: ignore[arg-type]


class _Array(Unfinished):
    """``numpy._core.multiarray._reconstruct(ndarray, (0,), b"b")``, then BUILD with its state.

    The state is (version, shape, dtype, is Fortran order, data); source: ``array_reduce`` in numpy's ``methods.c``.
    """

    def finish(self, reader: PickleReader, state: Any) -> None:
        reader.check(type(state) is tuple and len(state) == 5 and matches(state[0], 1), "array")
        _, shape, dtype, fortran, data = state
        reader.check(type(fortran) is bool, "array")
        self.value = _array(reader, data, dtype, shape, "F" if fortran else "C")


def _array(reader: PickleReader, data: Any, dtype: Any, shape: Any, order: str) -> NDArray:
    # Object arrays have a list instead of bytes; their dtype was refused before.
    reader.check(type(data) is bytes and type(shape) is tuple and isinstance(dtype, _Dtype), "array")
    reader.check(dtype.value is not None, "dtype")
    reader.charge(len(data))
    return array_from_bytes(data, dtype.value, shape, order=order, source=reader.source)


def _call_dtype(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    reader.check(matches(arguments[1:], (False, True)) or matches(arguments[1:], (0, 1)), "dtype")
    code = arguments[0]
    if isinstance(code, Global) and code.name == "ml_dtypes.bfloat16":
        return _Dtype(np.dtype(ml_dtypes.bfloat16))
    if type(code) is not str or code not in _DTYPES:
        what = shorten(code) if type(code) is str else f"a {type(code).__name__}"
        return reader.refuse(f"has an array of type {what}; only arrays of numbers and bools are read")
    return _Dtype(np.dtype(code))


def _call_reconstruct(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    reader.check(matches(arguments[1:], ((0,), b"b")) and isinstance(arguments[0], Global), "array")
    reader.check(arguments[0].name == "numpy.ndarray", "array")
    return _Array()


def _call_frombuffer(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    """``_frombuffer(data, dtype, shape, order)``: how protocol 5 (PEP 574) writes contiguous arrays."""
    reader.check(len(arguments) == 4, "array")
    data, dtype, shape, order = arguments
    reader.check(matches(order, "C") or matches(order, "F"), "array")
    return _array(reader, data, dtype, shape, order)


def _call_scalar(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    """``scalar(dtype, data)``: a numpy scalar."""
    reader.check(len(arguments) == 2, "numpy scalar")
    return _array(reader, arguments[1], arguments[0], (), "C")[()]


def _call_encode(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    """``_codecs.encode(text, "latin1")``: how protocol 2 writes bytes."""
    reader.check(len(arguments) == 2 and type(arguments[0]) is str and matches(arguments[1], "latin1"), "byte string")
    reader.charge(len(arguments[0]))
    try:
        return arguments[0].encode("latin-1")
    except UnicodeEncodeError:
        return reader.refuse("has a malformed byte string; it is damaged")


def _call_empty(make: Callable[[], object], reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    reader.check(len(arguments) == 0, "container")
    return make()


def _call_set(make: Callable[[Any], object], reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    """``builtins.set([items])``: how protocols 2 and 3 write sets."""
    reader.check(len(arguments) == 1 and type(arguments[0]) is list, "set")
    reader.charge(64 * len(arguments[0]))  # about the bytes that a set takes per item
    return make(reader.key(item) for item in arguments[0])


PLAIN_CALLS: Mapping[str, Call] = {
    "_codecs.encode": _call_encode,
    "builtins.bytes": functools.partial(_call_empty, bytes),
    "builtins.frozenset": functools.partial(_call_set, frozenset),
    "builtins.set": functools.partial(_call_set, set),
    "collections.OrderedDict": functools.partial(_call_empty, dict),
    "numpy._core.multiarray._reconstruct": _call_reconstruct,
    "numpy._core.multiarray.scalar": _call_scalar,
    "numpy._core.numeric._frombuffer": _call_frombuffer,
    "numpy.dtype": _call_dtype,
}
"""Replacements of the callables that are allowed in every pickle."""

PLAIN_NAMES = frozenset({"numpy.ndarray", "ml_dtypes.bfloat16"})
"""Globals that are allowed in every pickle as arguments of those callables."""


def read_pickle(path_or_bytes: str | Path | bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """Read a pickle of plain containers and numpy arrays without importing or calling anything that it names.

    Arrays are read-only, byte arrays become ``bytes``, and ordered dicts ``dict``. Memory is proportional to the size
    of the file, which may be at most ``max_bytes``.

    Raises:
      FileFormatError: the file is too large or damaged, or holds something that this module does not allow.
      FileNotFoundError: the file does not exist.
    """
    if isinstance(path_or_bytes, bytes):
        if len(path_or_bytes) > max_bytes:
            raise FileFormatError(f"The pickle has {len(path_or_bytes)} bytes, more than max_bytes={max_bytes}.")
        return _read(io.BytesIO(path_or_bytes), len(path_or_bytes), "The pickle")
    path = absolute_path(path_or_bytes)
    size = file_size(path, max_bytes)
    with path.open("rb") as stream:
        return _read(stream, size, str(path))


def _read(stream: BinaryIO, size: int, source: str) -> Any:
    return PickleReader(stream, size, source=source, calls=PLAIN_CALLS, names=PLAIN_NAMES).load()


def read_dreamerv3_checkpoint(path: str | Path, *, max_bytes: int = MAX_BYTES) -> dict[str, NDArray]:
    """The flat parameters, ``{"dyn/dyngru/kernel": array, …}``, of a checkpoint of DreamerV3's reference program.

    All entries are returned, including the optimizer's state (``opt/…``), slow networks and statistics. Source of the
    format: ``elements.Checkpoint`` 3.x and ``embodied.jax.Agent.save``, which writes ``{"params", "counters"}``.

    Args:
      path: the checkpoint folder (``logdir/ckpt``, where the file ``latest`` names the newest save), one save in it
        (``20250601T120000F000000``, complete when it holds the file ``done``), or an ``agent.pkl``.
      max_bytes: largest total size of the files.

    Raises:
      FileFormatError: a save is incomplete or too large, points out of its folder (by ``latest`` or a symbolic link),
        or is refused by :func:`read_pickle`.
      FileNotFoundError: ``path`` does not exist.
    """
    params: dict[str, NDArray] = {}
    for file in _agent_files(absolute_path(path)):
        data = read_pickle(file, max_bytes=max_bytes)
        max_bytes -= file.stat().st_size
        found = data.get("params", data) if isinstance(data, dict) else None
        if not isinstance(found, dict) or not found:
            raise FileFormatError(f"{file} holds no parameters; a dict with the entry 'params' is expected.")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, np.ndarray | np.generic):
                raise FileFormatError(f"{file}: {shorten(name)} is a {type(value).__name__}; an array is expected.")
            if name in params:
                raise FileFormatError(f"{file} repeats the parameter {shorten(name)} of an earlier shard.")
            params[name] = np.asarray(value)
    return params


def _agent_files(path: Path) -> list[Path]:
    """The agent's pickle, or its shards in order, in ``path`` (see :func:`read_dreamerv3_checkpoint`)."""
    if not path.is_dir():
        return [path]
    latest = path / "latest"
    save = path / _single_name(latest) if latest.is_file() else path
    if not save.is_dir() or not (save / "done").is_file():
        raise FileFormatError(
            f"{save} is not a complete save: the file 'done' is missing. Give the folder that holds 'latest', "
            "or a complete save in it."
        )
    if (save / "agent.pkl").is_file():
        files = [save / "agent.pkl"]
    else:
        files = sorted(file for file in save.iterdir() if re.fullmatch(r"agent-\d{4,5}\.pkl", file.name))
    if not files or (
        len(files) > 1 and [int(file.stem.removeprefix("agent-")) for file in files] != [*range(len(files))]
    ):
        raise FileFormatError(f"{save} holds no agent.pkl, nor all its shards agent-0000.pkl, agent-0001.pkl, ….")
    for file in files:
        if not file.resolve().is_relative_to(path.resolve()):
            raise FileFormatError(
                f"{file} is a link that leads out of {path}; give the folder that the link points to."
            )
    return files


def _single_name(latest: Path) -> str:
    """The folder name in the file ``latest``; refuses names that could point elsewhere."""
    if file_size(latest, max_bytes=256) and re.fullmatch(rb"\w[\w.-]*\n?", content := latest.read_bytes()):
        return content.decode("ascii").strip()
    raise FileFormatError(f"{latest} does not hold the name of a folder next to it; give the path of a save instead.")
