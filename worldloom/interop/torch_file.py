"""A reader of PyTorch's ``.pt`` files without PyTorch: tensors and plain containers; all else is refused by name.

Layout, from ``_save`` in ``torch/serialization.py`` and from ``torch/_utils.py``: since PyTorch 1.6 ``torch.save``
writes a zip archive of uncompressed entries,

- ``NAME/data.pkl``: a pickle whose tensors refer to storages by persistent ids ``("storage", torch.FloatStorage, key,
  location, elements)``. A tensor is a storage, an offset, a shape and strides, all counted in elements;
- ``NAME/data/KEY``: the bytes of each storage;
- ``NAME/byteorder``: ``little`` or ``big``.

:mod:`worldloom.interop.pickle_machine` interprets the pickle, :mod:`worldloom.interop.archive` reads the zip archive:
nothing that the file names is imported or called, and memory stays proportional to its size.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from worldloom.errors import FileFormatError
from worldloom.files import absolute_path
from worldloom.interop.archive import (
    MAX_BYTES,
    Archive,
    array_from_bytes,
    check_values,
    file_size,
    open_archive,
    shorten,
)
from worldloom.interop.mapped_file import MappedFile
from worldloom.interop.pickle_machine import Call, Global, Opaque, PickleReader
from worldloom.interop.pickles import PLAIN_CALLS, PLAIN_NAMES

_DTYPES: Mapping[str, np.dtype] = {
    **{f"torch.{name}": np.dtype(name) for name in ("bool", "uint8", "uint16", "uint32", "uint64")},
    **{
        f"torch.{name}": np.dtype(name) for name in ("int8", "int16", "int32", "int64", "float16", "float32", "float64")
    },
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORAGES: Mapping[str, np.dtype | None] = {
    "torch.BFloat16Storage": _DTYPES["torch.bfloat16"],
    "torch.BoolStorage": _DTYPES["torch.bool"],
    "torch.ByteStorage": _DTYPES["torch.uint8"],
    "torch.CharStorage": _DTYPES["torch.int8"],
    "torch.DoubleStorage": _DTYPES["torch.float64"],
    "torch.FloatStorage": _DTYPES["torch.float32"],
    "torch.HalfStorage": _DTYPES["torch.float16"],
    "torch.IntStorage": _DTYPES["torch.int32"],
    "torch.LongStorage": _DTYPES["torch.int64"],
    "torch.ShortStorage": _DTYPES["torch.int16"],
    "torch.storage.UntypedStorage": None,  # bytes; the dtype comes with the tensor (_rebuild_tensor_v3)
}
_RESAVE = "Load it in PyTorch with weights_only=True and save it again: torch.save(state_dict, path)."


_TENSORDICTS = frozenset(
    {
        "tensordict.tensordict.TensorDict",
        "tensordict._td.TensorDict",
        "tensordict.utils._StringOnlyDict",
        "tensordict._td._StringOnlyDict",
    }
)
"""Classes of tensordict, of its versions of 2023 and of today; read as dicts of their attributes."""


def read_torch(
    path: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    stub_unknown: bool = False,
    mapped: MappedFile | None = None,
) -> Any:
    """Read a file of ``torch.save``: nested dicts, lists and tuples, whose tensors become numpy arrays.

    Arrays are read-only, keep their dtype (bfloat16 is that of ``ml_dtypes``), and share memory where tensors share
    storage. ``torch.Size`` becomes a tuple and a device its string. Tensors on the meta device, which have no data, and
    dtypes become :class:`~.pickle_machine.Opaque`.

    Args:
      path: the file.
      max_bytes: largest size of the file, and of its contents.
      stub_unknown: objects of other classes become :class:`~.pickle_machine.Opaque` too, instead of an error: for files
        that hold more than weights, such as TD-MPC2's multitask checkpoints with their configuration. Globals of the
        standard library other than plain values, such as ``os.system`` or ``builtins.eval``, are refused even then.
      mapped: the same file, mapped: arrays then lie in it instead of in memory, and checksums are not verified. A
        ``TensorDict`` becomes a dict with its entries under ``_tensordict``.

    Raises:
      FileFormatError: the file or its contents exceed ``max_bytes``, the file is damaged, of the format before PyTorch
        1.6 or TorchScript, or it names any other global.
      FileNotFoundError: the file does not exist.
    """
    path = absolute_path(path)
    size = file_size(path, max_bytes)
    with path.open("rb") as file:
        _refuse_other_formats(path, file.read(512))
    with open_archive(path, max_bytes=max_bytes) as archive:
        storages = _Storages(archive, _folder(archive), mapped)
        data = storages.read("data.pkl")
        reader = PickleReader(
            io.BytesIO(data),
            len(data),
            source=str(path),
            calls=_CALLS,
            names=_NAMES,
            stub_unknown=stub_unknown,
            persistent_load=storages.load,
            budget=4 * size,
            records=_TENSORDICTS if mapped else frozenset(),
        )
        return reader.load()


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """Raise ``FileFormatError`` unless the first bytes of the file are those of a zip archive."""
    if start.startswith(b"PK\x03\x04"):
        return
    legacy_magic = (0x1950A86A20F9469CFC6C).to_bytes(
        10, "little"
    )  # MAGIC_NUMBER of torch/serialization.py; tar is older still
    if legacy_magic in start[:32] or start[257:262] == b"ustar":
        raise FileFormatError(f"{path} has the format that PyTorch wrote before version 1.6. {_RESAVE}")
    raise FileFormatError(f"{path} is not a PyTorch file (a zip archive with a data.pkl). {_RESAVE}")


def _folder(archive: Archive) -> str:
    """The top-level folder of all entries; refuses archives of another kind, byte order or compression."""
    folders = {name.split("/")[0] for name in archive.names}
    folder = folders.pop() if len(folders) == 1 else ""
    if f"{folder}/data.pkl" not in archive.names:
        raise FileFormatError(f"{archive.source} is a zip archive, but not one that torch.save wrote. {_RESAVE}")
    if f"{folder}/constants.pkl" in archive.names:
        raise FileFormatError(
            f"{archive.source} is a TorchScript program, not a file of weights; save its state_dict with torch.save."
        )
    if any(archive.is_compressed(name) for name in archive.names):
        raise FileFormatError(f"{archive.source} has compressed entries, which torch.save never writes. {_RESAVE}")
    order = archive.read(f"{folder}/byteorder") if f"{folder}/byteorder" in archive.names else b"little"
    if order != b"little":
        raise FileFormatError(f"{archive.source} has byte order {shorten(order)}; only little-endian files are read.")
    return folder


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """The bytes of a storage; ``dtype`` is None for untyped storages."""

    data: bytes | NDArray[np.uint8]
    dtype: np.dtype | None


class _Storages:
    """The storages of an archive, each read once, when a tensor first refers to it."""

    def __init__(self, archive: Archive, folder: str, mapped: MappedFile | None):
        self._archive = archive
        self._folder = folder
        self._mapped = mapped
        self._data: dict[str, bytes | NDArray[np.uint8]] = {}

    def read(self, name: str) -> bytes:
        return self._archive.read(f"{self._folder}/{name}")

    def load(self, persistent_id: Any) -> _Storage:
        """The storage that a persistent id of the pickle refers to."""
        match persistent_id:
            case (str("storage"), Global(name), str(key), str(), int(elements)) if len(key) < 64:
                pass
            case _:
                raise FileFormatError(f"{self._archive.source} refers to data in a way that torch.save does not.")
        if name not in _STORAGES:
            raise FileFormatError(f"{self._archive.source} has a storage of type '{name}', which is not read.")
        dtype = _STORAGES[name]
        entry = f"{self._folder}/data/{key}"
        nbytes = elements * (dtype.itemsize if dtype else 1)
        if entry not in self._archive.names or self._archive.size(entry) != nbytes:
            raise FileFormatError(
                f"{self._archive.source}: storage {shorten(key)} is missing or not of the declared {nbytes} bytes."
            )
        if key not in self._data and self._mapped is not None:
            self._data[key] = self._mapped.array(np.uint8, (nbytes,), self._archive.offset(entry), f"storage {key}")
        elif key not in self._data:
            self._data[key] = self.read(f"data/{key}")
        return _Storage(self._data[key], dtype)


def _tensor(reader: PickleReader, storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> NDArray:
    """The read-only array of ``shape`` whose element [i, j, …] is at ``offset + i·strides[0] + j·strides[1] + …``."""
    reader.check(type(shape) is type(strides) is tuple and len(shape) == len(strides) <= 32, "tensor")
    reader.check(all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *shape, *strides)), "tensor")
    reader.check(len(storage.data) % dtype.itemsize == 0, "tensor")
    if math.prod(shape) == 0:
        return array_from_bytes(b"", dtype, shape, source=reader.source)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    reader.check(last < len(storage.data) // dtype.itemsize, "tensor (it reaches beyond its storage)")
    reader.charge(math.prod(shape) * dtype.itemsize)  # strides of 0 repeat elements, so the storage bounds nothing
    flat = np.frombuffer(storage.data, dtype)[offset:]
    view = np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides], writeable=False)
    if isinstance(storage.data, np.ndarray) and not view.flags.c_contiguous:
        reader.refuse("has tensors whose rows do not lie one after another; save them as .contiguous()")
    array = view if view.flags.c_contiguous else view.copy(order="C")
    check_values(array, reader.source)
    array.flags.writeable = False
    return array


def _call_tensor_v2(reader: PickleReader, arguments: tuple[Any, ...]) -> NDArray:
    """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])``."""
    reader.check(len(arguments) in (6, 7) and isinstance(arguments[0], _Storage), "tensor")
    storage, offset, shape, strides = arguments[:4]
    reader.check(storage.dtype is not None, "tensor")
    _refuse_metadata(reader, arguments[6:])
    return _tensor(reader, storage, storage.dtype, offset, shape, strides)


def _call_tensor_v3(reader: PickleReader, arguments: tuple[Any, ...]) -> NDArray:
    """``_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])``."""
    reader.check(len(arguments) in (7, 8) and isinstance(arguments[0], _Storage), "tensor")
    storage, offset, shape, strides = arguments[:4]
    reader.check(isinstance(arguments[6], Global) and arguments[6].name in _DTYPES, "tensor")
    _refuse_metadata(reader, arguments[7:])
    return _tensor(reader, storage, _DTYPES[arguments[6].name], offset, shape, strides)


def _refuse_metadata(reader: PickleReader, metadata: tuple[Any, ...]) -> None:
    # The entries "conj" and "neg" mean that the tensor is the conjugate or negative of the stored numbers.
    if metadata and not (type(metadata[0]) is dict and not metadata[0]):
        reader.refuse("has a tensor with a pending conjugation or negation; save it after resolve_conj().resolve_neg()")


def _call_parameter(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    """``_rebuild_parameter(tensor, requires_grad, hooks)``."""
    reader.check(len(arguments) == 3 and isinstance(arguments[0], np.ndarray | Opaque), "parameter")
    return arguments[0]


def _call_meta_tensor(reader: PickleReader, arguments: tuple[Any, ...]) -> Opaque:
    """``_rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)``: a shape without data."""
    reader.check(len(arguments) == 4, "tensor")
    return Opaque("torch.Tensor on the meta device")


def _call_size(reader: PickleReader, arguments: tuple[Any, ...]) -> object:
    reader.check(len(arguments) == 1 and type(arguments[0]) is tuple and len(arguments[0]) <= 32, "size")
    reader.check(all(type(n) is int for n in arguments[0]), "size")
    return arguments[0]


def _call_device(reader: PickleReader, arguments: tuple[Any, ...]) -> str:
    reader.check(1 <= len(arguments) <= 2 and all(type(part) in (str, int) for part in arguments), "device")
    return ":".join(str(part) for part in arguments)


_CALLS: Mapping[str, Call] = {
    **PLAIN_CALLS,
    "torch.Size": _call_size,
    "torch.device": _call_device,
    "torch._utils._rebuild_meta_tensor_no_storage": _call_meta_tensor,
    "torch._utils._rebuild_parameter": _call_parameter,
    "torch._utils._rebuild_tensor_v2": _call_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _call_tensor_v3,
}
_NAMES = PLAIN_NAMES | _DTYPES.keys() | _STORAGES.keys()
