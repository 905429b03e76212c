"""``.npz`` files written atomically, and read without trusting them.

A ``.npz`` is a zip of ``.npy`` members. NumPy's own reader allocates whatever a header asks for; here every size in a
header is compared with the bytes really in the file before anything is allocated, and pickled members are refused.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from worldloom.errors import FileFormatError
from worldloom.replay.rows import Column


class Member(NamedTuple):
    """One array to write: its name, length of the first axis, type of a row, and pieces ``[k, ...]`` in order."""

    name: str
    length: int
    column: Column
    pieces: Iterable[np.ndarray]


def write_npz(path: Path, members: Iterable[Member]) -> None:
    """Write an uncompressed ``.npz`` that ``numpy.load`` reads too; on any failure ``path`` is what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for member in members:
                    # A fixed date: equal contents give equal bytes.
                    info = zipfile.ZipInfo(f"{member.name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                    with archive.open(info, "w", force_zip64=True) as out:
                        _write_npy(out, member)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_npy(out: IO[bytes], member: Member) -> None:
    shape, dtype = (member.length, *member.column.shape), member.column.dtype
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(out, header)  # type: ignore[arg-type]
    for piece in member.pieces:
        out.write(np.ascontiguousarray(piece).data)


class NpzFile:
    """An open ``.npz`` whose members' true sizes are known. Use as made by :func:`open_npz`."""

    def __init__(self, file: IO[bytes]):
        self._archive = zipfile.ZipFile(file)
        self._file_bytes = os.fstat(file.fileno()).st_size
        infos = self._archive.infolist()
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) != len(infos):
            raise FileFormatError("it holds two members of the same name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
            raise FileFormatError("it holds compressed members, which save() does not write")
        if sum(info.file_size for info in infos) > self._file_bytes:
            raise FileFormatError("its directory promises more bytes than the file has")

    @property
    def names(self) -> set[str]:
        """Names of all members, without ``.npy``."""
        return set(self._infos)

    def check(self, name: str, length: int, column: Column) -> None:
        """Refuse the member ``name`` unless it holds exactly ``[length, *column.shape]`` of that dtype."""
        with self._open(name) as stream:
            self._read_header(stream, name, length, column)

    def pieces(self, name: str, length: int, column: Column, rows: int) -> Iterator[np.ndarray]:
        """Read the member in pieces of at most ``rows`` rows; zipfile verifies its checksum with the last."""
        with self._open(name) as stream:
            self._read_header(stream, name, length, column)
            for start in range(0, length, rows):
                shape = (min(rows, length - start), *column.shape)
                data = stream.read(shape[0] * column.nbytes)
                yield np.frombuffer(data, column.dtype).reshape(shape)

    def small(self, name: str, max_bytes: int) -> bytes:
        """The member ``name``, a one-dimensional uint8 array of at most ``max_bytes``, as bytes."""
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
        # A ZipExtFile knows its position only among uncompressed bytes, which is what counts here.
        if stream.tell() + length * column.nbytes != self._infos[name].file_size:
            raise FileFormatError(f"its member '{name}' has another size than its header says")

    @staticmethod
    def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = npy.read_magic(stream)
        if version != (1, 0):
            raise FileFormatError(f"it has arrays of format {version}, which save() does not write")
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise FileFormatError("it holds pickled objects, which are never loaded")
        return shape, fortran, dtype


@contextlib.contextmanager
def open_npz(path: Path, kind: str) -> Iterator[NpzFile]:
    """Open ``path`` for reading. Whatever is wrong inside leaves as ``FileFormatError`` naming the file.

    An absent or unreadable path raises the ``OSError`` it is.
    """
    with path.open("rb") as file:
        try:
            yield NpzFile(file)
        except MemoryError:
            raise
        except FileFormatError as error:
            raise FileFormatError(f"{path} is not a {kind} that can be read: {error}.") from error
        except Exception as error:
            # zipfile and NumPy answer damaged bytes with a dozen kinds of exception; all mean the same here.
            raise FileFormatError(
                f"{path} is not a {kind}, or it is damaged: {type(error).__name__}: {str(error)[:300]}."
            ) from error
