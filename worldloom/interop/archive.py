"""A reader of zip archives of arrays from untrusted sources: ``.npz`` files and the container of ``.pt`` files.

Every size that an archive declares is compared with the bytes that exist before memory is allocated for it, so a reader
never holds more than ``max_bytes``, and every damaged or malicious file raises one
:class:`~worldloom.errors.FileFormatError`. Nothing is unpacked to disk and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, KeysView, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from worldloom.errors import FileFormatError
from worldloom.files import absolute_path

MAX_BYTES = 1 << 34
"""Default limit of the readers in bytes: 16 GiB, three times the largest published checkpoint."""

_MAX_DIMS = 32
_MAX_DIRECTORY_BYTES = 1 << 20  # of a zip's central directory: about 10,000 entries
_MAX_DEFLATE_RATIO = 1032  # RFC 1951: at best 258 bytes in 2 bits; a larger declared ratio is false
_ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What :mod:`zipfile` raises on damaged input (NotImplementedError is a RuntimeError, decoding errors ValueErrors)."""


def file_size(path: Path, max_bytes: int) -> int:
    """Size in bytes of the regular file at ``path``.

    Raises ``FileFormatError`` for a folder, pipe or device and for a file of more than ``max_bytes``, and
    ``FileNotFoundError`` if nothing exists at ``path``.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileFormatError(f"{path} is not a regular file; the path of a file is expected.")
    if status.st_size > max_bytes:
        raise FileFormatError(
            f"{path} has {status.st_size} bytes, more than max_bytes={max_bytes}; raise max_bytes if you trust it."
        )
    return status.st_size


def array_from_bytes(
    data: bytes, dtype: DTypeLike, shape: Sequence[int], *, order: str = "C", offset: int = 0, source: str = "the file"
) -> NDArray:
    """A read-only array of ``shape`` over ``data[offset:]``, which must have exactly as many bytes.

    Nothing is copied unless the byte order is foreign. Raises ``FileFormatError`` if the sizes differ, a bool is
    neither 0 nor 1, or a character is not Unicode.
    """
    dtype = np.dtype(dtype)
    if len(shape) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise FileFormatError(f"{source} declares an array whose shape is not that of an array.")
    # Zeros count as one: numpy requires the product of the other axes to fit an integer too.
    fits = math.prod(max(n, 1) for n in shape) * max(dtype.itemsize, 1) < 1 << 62
    if not fits or math.prod(shape) * dtype.itemsize != len(data) - offset:
        raise FileFormatError(
            f"{source} declares an array of shape {shorten(tuple(shape))} and type {dtype}, "
            f"but holds {len(data) - offset} bytes for it."
        )
    flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=offset) if math.prod(shape) else np.empty(0, dtype)
    check_values(flat, source)
    if not dtype.isnative:
        flat = flat.astype(dtype.newbyteorder("="))
    flat.flags.writeable = False
    return flat.reshape(tuple(shape), order="F" if order == "F" else "C")


def check_values(array: NDArray, source: str) -> None:
    """Raise ``FileFormatError`` for bit patterns of bools or characters that numpy never writes, and misreads."""
    if array.size == 0:
        return
    if array.dtype.kind == "b" and array.view(np.uint8).max() > 1:
        raise FileFormatError(f"{source} holds a bool array with values other than 0 and 1; it is damaged.")
    if array.dtype.kind == "U" and array.view(array.dtype.str[0] + "u4").max() > 0x10FFFF:
        raise FileFormatError(f"{source} holds text that is not Unicode; it is damaged.")


def shorten(value: object, length: int = 100) -> str:
    """``repr`` of an untrusted value for a message, in printable ASCII and at most ``length`` characters."""
    text = ascii(value[: length + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= length else text[:length] + "…"


class Archive:
    """An open zip archive whose central directory has been checked; created by :func:`open_archive`."""

    def __init__(self, file: zipfile.ZipFile, source: str, size: int):
        self.source = source
        self._file, self._size = file, size
        self._entries = {info.filename: info for info in file.infolist()}

    @property
    def names(self) -> KeysView[str]:
        """Names of all entries in the order of the central directory."""
        return self._entries.keys()

    def size(self, name: str) -> int:
        """Declared unpacked size of entry ``name`` in bytes; :meth:`read` enforces it."""
        return self._entries[name].file_size

    def is_compressed(self, name: str) -> bool:
        """Whether entry ``name`` is deflated rather than stored."""
        return self._entries[name].compress_type != zipfile.ZIP_STORED

    def offset(self, name: str) -> int:
        """Where in the file the bytes of entry ``name``, which is not compressed, begin; for memory maps.

        Its checksum is not verified then.
        """
        entry, raw = self._entries[name], self._file.fp
        assert raw is not None
        with _zip_errors(self.source):
            raw.seek(entry.header_offset)
            signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", raw.read(30))
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        if signature != b"PK\x03\x04" or self.is_compressed(name) or start + entry.file_size > self._size:
            raise FileFormatError(f"{self.source}: entry {shorten(name)} is not where the table of contents says.")
        return start

    def read_start(self, name: str, size: int) -> bytes:
        """The first ``size`` bytes of entry ``name``, or all if there are fewer; its checksum is not verified."""
        with _zip_errors(self.source), self._file.open(self._entries[name]) as entry:
            return entry.read(size)

    def read(self, name: str) -> bytes:
        """The bytes of entry ``name``; their number is the declared one and their checksum is right."""
        size = self.size(name)
        with _zip_errors(self.source), self._file.open(self._entries[name]) as entry:
            # Not ZipFile.read: without a size it inflates up to 2 GiB before it compares the declared one.
            data = entry.read(size)
        if len(data) != size:
            raise FileFormatError(f"{self.source}: entry {shorten(name)} is truncated; fetch or save the file again.")
        return data


@contextlib.contextmanager
def open_archive(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Archive]:
    """Open a zip archive after checking its central directory.

    Raises ``FileFormatError`` if the file is not a zip archive, if the file or its unpacked entries together exceed
    ``max_bytes``, if entries overlap, are encrypted or repeat a name, or if a name leads out of the archive.
    """
    path = absolute_path(path)
    size = file_size(path, max_bytes)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(_LimitedReader(io.FileIO(path)))
        with _zip_errors(str(path)):
            file = stack.enter_context(zipfile.ZipFile(raw))
        raw.limit = size  # the central directory has been read
        _check_entries(file.infolist(), size, max_bytes, str(path))
        yield Archive(file, str(path), size)


class _LimitedReader(io.BufferedReader):
    """Refuses large reads: :mod:`zipfile` reads a central directory of any declared size at once."""

    limit = _MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size > self.limit:
            raise FileFormatError(f"{self.name} has a table of contents of more than {self.limit} bytes.")
        return super().read(size)


@contextlib.contextmanager
def _zip_errors(source: str) -> Iterator[None]:
    """Turn the exceptions of :mod:`zipfile` on damaged input into ``FileFormatError``."""
    try:
        yield
    except FileFormatError:
        raise
    except _ZIP_DAMAGE as error:
        reason = shorten(str(error), 200)
        raise FileFormatError(f"{source} is not an intact zip archive ({reason}); fetch or save it again.") from error


def _check_entries(entries: list[zipfile.ZipInfo], size: int, max_bytes: int, source: str) -> None:
    seen: set[str] = set()
    for entry in entries:
        name = shorten(entry.filename)
        parts = PurePosixPath(entry.filename).parts
        if not parts or parts[0] == "/" or ".." in parts or re.search(r"[\\:\0]", entry.filename):
            raise FileFormatError(f"{source}: the name of entry {name} leads out of the archive.")
        if entry.filename in seen:
            raise FileFormatError(f"{source} has two entries named {name}.")
        seen.add(entry.filename)
        if entry.flag_bits & 0x1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FileFormatError(f"{source}: entry {name} is encrypted, or compressed by another method than deflate.")
        ratio = 1 if entry.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO
        if entry.file_size > entry.compress_size * ratio:
            raise FileFormatError(f"{source}: entry {name} declares more bytes than its compressed data can hold.")
    if sum(entry.compress_size for entry in entries) > size:
        raise FileFormatError(f"{source}: its entries overlap or reach beyond the end of the file.")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max_bytes:
        raise FileFormatError(
            f"{source} unpacks to {unpacked} bytes, more than max_bytes={max_bytes}; raise max_bytes if you trust it."
        )


_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=])([biufcSU])(\d{1,9})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *\} *\n?"
)
_NPY_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}


def read_npz(path: str | Path, *, max_bytes: int = MAX_BYTES) -> dict[str, NDArray]:
    """Read all arrays of an ``.npz`` file (``numpy.savez``, compressed or not) as read-only arrays.

    Arrays of numbers, bools and fixed-length text are read; object arrays, which are pickles, and structured arrays are
    refused. The file, and all its arrays together, may have at most ``max_bytes``.

    Raises:
      FileFormatError: the file is damaged or too large, or holds anything else.
      FileNotFoundError: the file does not exist.
    """
    with open_archive(path, max_bytes=max_bytes) as archive:
        arrays = {}
        for name in archive.names:
            if not name.endswith(".npy"):
                raise FileFormatError(f"{path}: entry {shorten(name)} is not an array (.npy) as numpy.savez writes it.")
            arrays[name.removesuffix(".npy")] = _parse_npy(archive.read(name), f"{path}: array {shorten(name)}")
    return arrays


class NpyHeader(NamedTuple):
    """Element type, shape and order (``"C"`` or ``"F"``) of a ``.npy`` file, and the byte at which its data begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: str
    start: int


def _parse_npy(data: bytes, source: str) -> NDArray:
    """The array in the bytes of a ``.npy`` file."""
    header = read_npy_header(data, source)
    return array_from_bytes(data, header.dtype, header.shape, order=header.order, offset=header.start, source=source)


def read_npy_header(data: bytes, source: str) -> NpyHeader:
    """The header at the beginning of a ``.npy`` file, versions 1 to 3 of the format of ``numpy.lib.format``.

    ``data`` may end after the header. Raises ``FileFormatError`` for object and structured arrays and damaged headers.
    """
    # The header is a Python literal. Matching what numpy writes needs no evaluation, and no limit on nesting.
    width = {1: 2, 2: 4, 3: 4}.get(data[6], 0) if data[:6] == b"\x93NUMPY" and len(data) >= 12 else 0
    if not width:
        raise FileFormatError(f"{source} does not start like a .npy file of version 1 to 3.")
    start = 8 + width
    stop = start + int.from_bytes(data[8:start], "little")
    header = _NPY_HEADER.fullmatch(data, start, min(stop, start + 10_000, len(data)))
    if header is None:
        raise FileFormatError(
            f"{source} is truncated, or holds neither numbers nor text (object and structured arrays are not read)."
        )
    order, kind, size, fortran, shape = (part.decode() for part in header.groups())
    if int(size) not in _NPY_SIZES.get(kind, range(1 << 20)):
        raise FileFormatError(f"{source} has element type {kind}{size}, which is not read.")
    try:
        dims = tuple(int(n) for n in shape.split(",") if n.strip())
    except ValueError:
        raise FileFormatError(f"{source} has the malformed shape ({shorten(shape)}).") from None
    dtype = np.dtype(f"{order}{kind}{size}")
    if dtype.itemsize == 0:  # numpy's type of empty text has no bytes, so any length could be declared
        raise FileFormatError(f"{source} has elements of zero bytes.")
    return NpyHeader(dtype, dims, "F" if fortran == "True" else "C", stop)
