"""``.npz`` files, written atomically and read as untrusted input.

A ``.npz`` is a zip of ``.npy`` members. NumPy's own reader allocates whatever a header declares; here every size in a
header is compared with the bytes in the file before anything is allocated, and pickled members are refused.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from worldloom.errors import FileFormatError
from worldloom.files import atomic_file
from worldloom.replay.table import Column

FLAT_HINT = "; flat arrays of episodes are read by ReplayBuffer.from_npz"
_MAX_DEFLATE_RATIO = 1032  # RFC 1951: at best 258 bytes in 2 bits


class Member(NamedTuple):
    """One array to write.

    Attributes:
      name: without ``.npy``.
      length: size of the first axis.
      column: shape and dtype of the other axes.
      pieces: arrays ``[k, ...]`` that follow each other along the first axis.
    """

    name: str
    length: int
    column: Column
    pieces: Iterable[np.ndarray]


def write_npz(path: Path, members: Iterable[Member]) -> None:
    """Write an uncompressed ``.npz``, which ``numpy.load`` can read too; on any failure ``path`` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for member in members:
            # A fixed date: equal contents give equal bytes.
            info = zipfile.ZipInfo(f"{member.name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as out:
                _write_npy(out, member)


def _write_npy(out: IO[bytes], member: Member) -> None:
    shape, dtype = (member.length, *member.column.shape), member.column.dtype
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(out, header)  # type: ignore[arg-type]
    for piece in member.pieces:
        out.write(np.ascontiguousarray(piece).data)


class NpzFile:
    """An open ``.npz`` file; :func:`open_npz` opens one.

    Raises ``FileFormatError``, or whatever :mod:`zipfile` and NumPy raise on damaged bytes.
    """

    def __init__(self, file: IO[bytes]):
        self._archive = zipfile.ZipFile(file)
        self._file_bytes = os.fstat(file.fileno()).st_size
        infos = self._archive.infolist()
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) != len(infos):
            raise FileFormatError("it holds two members of the same name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
            raise FileFormatError(f"it holds compressed members, which save() does not write{FLAT_HINT}")
        if sum(info.file_size for info in infos) > self._file_bytes:
            raise FileFormatError("its directory promises more bytes than the file has")

    @property
    def names(self) -> set[str]:
        """Names of all members, without ``.npy``."""
        return set(self._infos)

    def check(self, name: str, length: int, column: Column) -> None:
        """Raise ``FileFormatError`` unless the member ``name`` is exactly ``[length, *column.shape]`` of that dtype."""
        with self._open(name) as stream:
            self._read_header(stream, name, length, column)

    def pieces(self, name: str, length: int, column: Column, rows: int) -> Iterator[np.ndarray]:
        """Read a member in pieces of at most ``rows`` rows; zipfile verifies its checksum at the last one."""
        with self._open(name) as stream:
            self._read_header(stream, name, length, column)
            for start in range(0, length, rows):
                shape = (min(rows, length - start), *column.shape)
                data = stream.read(shape[0] * column.nbytes)
                yield np.frombuffer(data, column.dtype).reshape(shape)

    def read_bytes(self, name: str, max_bytes: int) -> bytes:
        """The bytes of a member that is a one-dimensional uint8 array of at most ``max_bytes``."""
        if name in self._infos and self._infos[name].file_size > max_bytes:
            raise FileFormatError(f"its member '{name}' is larger than {max_bytes} bytes")
        with self._open(name) as stream:
            shape, _, dtype = self._header(stream)
            if len(shape) != 1 or dtype != np.uint8:
                raise FileFormatError(f"its member '{name}' is not a byte string")
            return stream.read()

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._infos:
            raise FileFormatError(f"it has no member '{name}'")
        return self._archive.open(self._infos[name])

    def _read_header(self, stream: IO[bytes], name: str, length: int, column: Column) -> None:
        shape, fortran, dtype = self._header(stream)
        if shape != (length, *column.shape) or dtype != column.dtype or fortran:
            raise FileFormatError(
                f"its member '{name}' is {dtype} {shape}, where {column.dtype} {(length, *column.shape)} is expected"
            )
        # The position of a ZipExtFile counts uncompressed bytes, and so does file_size.
        if stream.tell() + length * column.nbytes != self._infos[name].file_size:
            raise FileFormatError(f"its member '{name}' has another size than its header declares")

    @staticmethod
    def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = npy.read_magic(stream)
        if version != (1, 0):
            raise FileFormatError(f"it has arrays of format {version}, which save() does not write")
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise FileFormatError("it holds pickled objects, which are never loaded")
        return shape, fortran, dtype


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file of ``numpy.savez``, compressed or not, read-only.

    Raises ``FileFormatError`` if the file is damaged or holds pickled objects, and ``OSError`` if it cannot be opened.
    """
    with _as_format_errors(path, ".npz file of arrays") as file, zipfile.ZipFile(file) as archive:
        arrays = {}
        for info in archive.infolist():
            if info.file_size > _MAX_DEFLATE_RATIO * max(info.compress_size, 1):
                raise FileFormatError("its directory promises more bytes than the file has")
            with archive.open(info) as stream:
                arrays[info.filename.removesuffix(".npy")] = _read_npy(stream, info)
    return arrays


def _read_npy(stream: IO[bytes], info: zipfile.ZipInfo) -> np.ndarray:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in readers:
        raise FileFormatError(f"it has arrays of format {version}, which are not read")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise FileFormatError("it holds pickled objects, which are never loaded")
    if stream.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        raise FileFormatError(f"its member '{info.filename}' has another size than its header declares")
    data = stream.read(info.file_size)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


@contextlib.contextmanager
def open_npz(path: Path, kind: str) -> Iterator[NpzFile]:
    """Open ``path``, a ``kind`` of file, for reading.

    Any exception inside the ``with`` block but ``MemoryError`` becomes a ``FileFormatError`` naming the file; a missing
    or unreadable path raises ``OSError`` as usual.
    """
    with _as_format_errors(path, kind) as file:
        yield NpzFile(file)


@contextlib.contextmanager
def _as_format_errors(path: Path, kind: str) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        try:
            yield file
        except MemoryError:
            raise
        except FileFormatError as error:
            raise FileFormatError(f"{path} is not a {kind} that can be read: {error}.") from error
        except Exception as error:
            # zipfile and NumPy raise a dozen kinds of exception on damaged bytes; here all mean the same.
            raise FileFormatError(
                f"{path} is not a {kind}, or it is damaged: {type(error).__name__}: {str(error)[:300]}."
            ) from error
