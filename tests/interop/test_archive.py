"""The hardened reader of ``.npz`` files: equal to numpy on what numpy writes, bounded on everything else."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from worldloom.errors import FileFormatError
from worldloom.interop.archive import open_archive, read_npz

ARRAYS = {
    "float": np.arange(6.0).reshape(2, 3),
    "no_axes": np.array(3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "text": np.array(["häß", "☃"]),
    "bytes": np.array([b"x", b"yz"]),
    "empty": np.zeros((0, 5), np.float16),
    "bool": np.array([[True], [False]]),
    "big_endian": np.arange(3, dtype=">i4"),
    "complex": np.array(1 + 2j),
    "nested/name": np.zeros(1, np.uint8),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    save(tmp_path / "arrays.npz", **ARRAYS)
    got = read_npz(tmp_path / "arrays.npz")
    assert list(got) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        assert (got[name].shape, got[name].dtype) == (expected.shape, expected.dtype.newbyteorder("="))
        np.testing.assert_array_equal(got[name], expected)
        assert not got[name].flags.writeable


@pytest.fixture
def npz(tmp_path):
    """Writes an archive of one ``.npy`` entry with the given header text and data."""

    def write(header: str, data: bytes = b"", *, version: int = 1, compress=zipfile.ZIP_STORED, name="a.npy"):
        length = struct.pack("<H" if version == 1 else "<I", len(header))
        content = b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin-1") + data
        with zipfile.ZipFile(tmp_path / "made.npz", "w", compress) as file:
            file.writestr(name, content)
        return tmp_path / "made.npz"

    return write


def header(descr: str = "'<f4'", shape: str = "(2,)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_header_made_by_hand_is_read(npz, version):
    np.testing.assert_array_equal(read_npz(npz(header(), b"\0" * 8, version=version))["a"], np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "text",
    [
        header(shape="(3,)"),
        header(shape="(1152921504606846976,)"),
        header(shape="(4294967296, 4294967296)"),
        header(shape="(-2,)"),
        header(shape="(4611686018427387904, 4611686018427387904, 0)"),
        header(shape="(2, " + "1, " * 40 + ")"),
        header(shape="(1 1,)"),
        header(shape="(" + "9" * 5000 + ",)"),
        header(shape="2"),
        header(descr="'|O'"),
        header(descr="'<f3'"),
        header(descr="'<i16'"),
        header(descr="'<U0'"),
        header(descr="'|S999999999'"),
        header(descr="'|V8'"),
        header(descr="'<m8[s]'"),
        header(descr="[('a', '<f4'), ('b', '<f4')]"),
        header(fortran="None"),
        header(descr="__import__('os').system('true')"),
        "(" * 5000,
        "{" + "[" * 5000,
        "",
        "\0" * 60000,
    ],
    ids=lambda text: text[:50],
)
def test_a_header_that_contradicts_the_data_is_refused_before_allocation(npz, text):
    path = npz(text, b"\0" * 8)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError):
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_bit_patterns_that_numpy_never_writes_are_refused(npz):
    with pytest.raises(FileFormatError, match="bool"):
        read_npz(npz(header("'|b1'"), b"\1\2"))
    with pytest.raises(FileFormatError, match="Unicode"):
        read_npz(npz(header("'<U1'"), b"\xff" * 8))


def test_object_arrays_are_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    np.savez(tmp_path / "trap.npz", trap=np.array([Trap()], object))
    with pytest.raises(FileFormatError, match="object and structured arrays are not read"):
        read_npz(tmp_path / "trap.npz")
    assert not (tmp_path / "ran").exists()


def test_a_deflate_bomb_is_refused_by_its_declared_size(npz):
    path = npz(header(shape="(10000000,)"), b"\0" * 40_000_000, compress=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="more than max_bytes=1000000"):
            read_npz(path, max_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_deflate_bomb_with_a_false_size_is_read_up_to_that_size(npz):
    """The central directory declares 1000 bytes; inflating to the end of the input would give 20 MB."""
    path = npz(header(shape="(5000000,)"), b"\0" * 20_000_000, compress=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        declared = struct.pack("<I", file.infolist()[0].file_size)
    path.write_bytes(data.replace(declared, struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError):
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_overlapping_and_unreasonable_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "made.npz", "w") as file:
        file.writestr("a.npy", b"\0" * 100)
        info = file.infolist()[0]
        for number in range(3):
            copy = zipfile.ZipInfo(f"b{number}.npy")
            copy.header_offset, copy.CRC, copy.file_size, copy.compress_size = 0, info.CRC, 100, 100
            file.filelist.append(copy)
            file.NameToInfo[copy.filename] = copy
    with pytest.raises(FileFormatError, match=r"overlap|intact"):
        read_npz(tmp_path / "made.npz")
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as file:
        for number in range(12_000):
            file.writestr(f"{number:050d}.npy", b"")
    with pytest.raises(FileFormatError, match="table of contents"):
        read_npz(tmp_path / "many.npz")


@pytest.mark.parametrize("name", ["../a.npy", "/a.npy", "a/../../b.npy", "C:a.npy", "a.txt"])
def test_names_that_point_out_of_the_archive_are_refused(npz, name):
    with pytest.raises(FileFormatError, match=r"leads out|not an array"):
        read_npz(npz(header(), b"\0" * 8, name=name))


def test_size_and_kind_of_file_are_checked_first(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(1000))
    with pytest.raises(FileFormatError, match="max_bytes=4000"):
        read_npz(tmp_path / "arrays.npz", max_bytes=4000)
    np.savez_compressed(tmp_path / "small.npz", a=np.zeros(1000))
    with pytest.raises(FileFormatError, match="unpacks to 8128 bytes"):
        read_npz(tmp_path / "small.npz", max_bytes=4000)
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(FileFormatError, match="not a regular file"):
            read_npz(path)
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "missing.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(FileFormatError, match="not an intact zip archive"):
        read_npz(tmp_path / "single.npy")


def test_other_compressions_and_encryption_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "made.npz", "w", method) as file:
            file.writestr("a.npy", buffer.getvalue())
        with pytest.raises(FileFormatError, match="deflate"):
            read_npz(tmp_path / "made.npz")


def test_an_archive_gives_sizes_before_reading(tmp_path):
    np.savez_compressed(tmp_path / "arrays.npz", a=np.zeros(1000))
    with open_archive(tmp_path / "arrays.npz") as archive:
        assert list(archive.names) == ["a.npy"]
        assert archive.size("a.npy") == 8128
        assert archive.is_compressed("a.npy")
        assert len(archive.read("a.npy")) == 8128
