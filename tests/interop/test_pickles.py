"""The restricted pickle reader: allowed values come back equal, and nothing else runs, hangs or takes memory."""

import builtins
import collections
import os
import pickle
import shutil
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from worldloom.errors import FileFormatError
from worldloom.interop.pickles import read_dreamerv3_checkpoint, read_pickle

VALUES = {
    "bfloat16": np.ones((2, 3), ml_dtypes.bfloat16) / 3,
    "bfloat16 scalar": ml_dtypes.bfloat16(2),
    "float32 scalar": np.float32(3),
    "no axes": np.array(3.0),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    "strided": np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2],
    "big-endian": np.arange(4, dtype=">f8"),
    "empty": np.zeros((0, 4), np.int16),
    "bools": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "containers": [1, 2.5, None, True, False, (), (1, 2, 3, 4, (5,)), [], {}, {1, 2}, frozenset("ab"), set()],
    "integers": [0, 255, 65535, -1, 2**31, -(2**63), 2**500],
    "text": ["", "häß", "x" * 1000],
    "bytes": [b"", b"a", bytes(range(256)) * 5],
    "ordered": collections.OrderedDict(b=1, a=2),
    3: 4,
    None: None,
    -1.5: b"",
}


def same(got, expected) -> bool:
    if isinstance(expected, dict):
        return list(got) == list(expected) and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, np.ndarray | np.generic):
        alike = (
            type(got) is type(expected)
            and got.shape == expected.shape
            and got.dtype == expected.dtype.newbyteorder("=")
        )
        return alike and bool(np.all(got == expected))
    return type(got) is type(expected) and got == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_allowed_values_come_back_equal(name, protocol):
    assert same(read_pickle(pickle.dumps({name: VALUES[name]}, protocol)), {name: VALUES[name]})


def test_shared_values_and_module_names_of_numpy_1(tmp_path):
    array = np.arange(3.0)
    data = pickle.dumps({"a": array, "b": [array, array]}, 4)
    old = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray").replace(
        struct.pack("<BQ", 0x95, len(data) - 11), struct.pack("<BQ", 0x95, len(data) - 12)
    )
    assert old != data
    (tmp_path / "old.pkl").write_bytes(old)
    got = read_pickle(tmp_path / "old.pkl")
    assert np.array_equal(got["a"], array)
    assert got["b"][0] is got["a"]


def test_bytearrays_of_protocol_5_come_as_bytes():
    assert read_pickle(pickle.dumps(bytearray(b"abc"), 5)) == b"abc"


# Hostile pickles. `Call(f, x)` pickles as an instruction to call f(x), as an attacker would write it.


class Call:
    def __repr__(self):
        return "call"  # no address: every worker process must give a test the same name

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"params": {"w": x}}, lambda x: [(x,), x]])
def test_no_command_is_run(tmp_path, protocol, wrap):
    marker = tmp_path / "ran"
    data = pickle.dumps(wrap(Call(os.system, f"touch {marker}")), protocol)
    with pytest.raises(FileFormatError, match=r"(posix|nt)\.system" if protocol >= 2 else "protocol 2 to 5"):
        read_pickle(data)
    assert not marker.exists()
    pickle.loads(data)  # the same bytes do run elsewhere
    assert marker.exists()


def test_no_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_for_reader.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for data in (b"\x80\x02ctrap_for_reader\nthing\n.", b"\x80\x04\x8c\x0ftrap_for_reader\x8c\x05thing\x93."):
        with pytest.raises(FileFormatError, match=r"trap_for_reader\.thing"):
            read_pickle(data)
        with pytest.raises(SystemExit, match="imported"):
            pickle.loads(data)


RECONSTRUCT = np.arange(1).__reduce__()[0]


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Call(builtins.eval, "1/0"), "builtins.eval"),
        (Call(builtins.exec, "1/0"), "builtins.exec"),
        (Call(builtins.__import__, "os"), "builtins.__import__"),
        (Call(os.remove, "x"), "remove"),
        (Call(np.load, "x.npy"), "numpy.load"),
        (Call(np.fromfile, "/etc/passwd"), "numpy.*fromfile"),
        (Call(np.zeros, 10), "numpy.*zeros"),
        (Call(RECONSTRUCT, np.matrix, (0,), b"b"), "numpy.matrix"),
        (Call(RECONSTRUCT, np.ndarray, (2**40,), b"b"), "malformed array"),
        (Call(RECONSTRUCT, np.ndarray, (0,), b"O"), "malformed array"),
        (Call(np.dtype, "O", False, True), "'O'"),
        (Call(np.dtype, "V1000000000", False, True), "'V1000000000'"),
        (Call(np.dtype, "(1000000,1000000)f4", False, True), "f4"),
        (Call(np.dtype, np.ndarray, False, True), "ndarray|Global"),
        (np.array([None, "objects"], object), "'O8'|'O'"),
        (np.zeros(2, [("field", "f4")]), "V4"),
        (collections.Counter("abc"), "collections.Counter"),
        (ValueError("an exception"), "ValueError"),
        (Call(collections.OrderedDict, [("a", 1)]), "malformed container"),
        (slice(1), "builtins.slice"),
        (print, "builtins.print"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_globals_are_refused_by_name(hostile, named, protocol):
    with pytest.raises(FileFormatError, match=named):
        read_pickle(pickle.dumps({"params": hostile}, protocol))


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"S'true'\n", "STRING"),
        (b"(X\x04\x00\x00\x00trueiposix\nsystem\n", "INST"),
        (
            b"cbuiltins\ngetattr\ncposix\n__dict__\nX\x06\x00\x00\x00system\x86RX\x04\x00\x00\x00true\x85R",
            "builtins.getattr",
        ),
        (b"(cposix\nsystem\n", "posix.system"),
        (b"(o", "OBJ"),
        (b"\x82\x01", "EXT1"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"Pname\n", "PERSID"),
        (b"NQ", "persistent id"),
        (b"N2", "DUP"),
        (b"\x97", "NEXT_BUFFER"),
        (b"\x8b\x01\x00\x00\x00\x01", "LONG4"),
        (b"NN\x85R", "calls a NoneType"),
        (b"NN\x85\x81", "instance of a NoneType"),
        (b"cnumpy\nndarray\n)\x81", "numpy.ndarray"),
        (b"cnumpy\nndarray\nK\x05\x85R", "numpy.ndarray"),
        (b"ccollections\nOrderedDict\nNR", "malformed call"),
        (b"N}b", "attributes of a NoneType"),
        (b"]}b", "attributes of a list"),
        (b"cnumpy\nndarray\n}b", "attributes of a Global"),
        (b"}(K\x01u", "malformed dict"),
        (b"}K\x01\x85Ns", "key, a tuple"),
        (b"}]Ns", "key, a list"),
        (b"\x8f(]\x90", "key, a list"),
        (b"}\x8a\x10" + b"\xff" * 15 + b"\x7fNs", "key, a int"),
        (b"NNa", "malformed list"),
        (b"t", "malformed stack"),
        (b"(", "does not end"),
        (b"NN", "does not end"),
        (b"h\x07", "malformed memo"),
        (b"cposix\nsys\xfftem\n", "UTF-8"),
        (b"X\x01\x00\x00\x00\xff", "UTF-8"),
        (b"c" + b"a" * 300 + b"\nb\n", "malformed global"),
        (b"ca\nb'; c\n", "malformed global"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", "malformed frame"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R", "malformed array"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R", "malformed array"),
    ],
)
def test_other_opcodes_and_shapes_are_refused(opcodes, message):
    with pytest.raises(FileFormatError, match=message):
        read_pickle(b"\x80\x04" + opcodes + b".")


# Bombs: small files that ask for much memory or time.


def refuse(data: bytes, *, peak_bytes: int, match: str | None = None) -> None:
    """``data`` is refused in under a second, with at most ``peak_bytes`` in use."""
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=match):
            read_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < peak_bytes
    finally:
        tracemalloc.stop()
    assert refusal_seconds(data) < 1 or refusal_seconds(data) < 1  # a machine that swaps is not a reader that hangs


def refusal_seconds(data: bytes) -> float:
    start = time.process_time()
    with pytest.raises(FileFormatError):
        read_pickle(data)
    return time.process_time() - start


def array_pickle(shape: tuple[int, ...], data: bytes = b"\0" * 16, dtype: str = "f4") -> bytes:
    """A pickle as numpy writes it, of an array whose declared shape need not fit its bytes."""

    class Array:
        def __reduce__(self):
            return RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, data)

    return pickle.dumps(Array(), 4)


def test_declared_sizes_are_compared_with_the_actual_bytes():
    assert read_pickle(array_pickle((2, 2))).shape == (2, 2)
    for shape in [
        (2**60,),
        (2**31, 2**31),
        (2**62, 4),
        (5,),
        (3,),
        (-1, -4),
        (0,),
        (2**40, 2**40, 0),
        (1,) * 60 + (4,),
    ]:
        refuse(array_pickle(shape), peak_bytes=100_000)
    refuse(array_pickle((2**62, 2**62, 0), b""), peak_bytes=100_000)
    refuse(array_pickle((16,), b"\1" * 15 + b"\2", "b1"), peak_bytes=100_000, match="bool")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x8e" + struct.pack("<Q", 2**60),  # BINBYTES8
        b"\x96" + struct.pack("<Q", 2**63),  # BYTEARRAY8
        b"\x8d" + struct.pack("<Q", 2**40),  # BINUNICODE8
        b"B" + struct.pack("<I", 2**32 - 1),
        b"X" + struct.pack("<I", 2**32 - 1),
        b"Nr\xff\xff\xff\x7fN",  # LONG_BINPUT: the C implementation would take 16 GiB for its memo
    ],
)
def test_lengths_are_compared_with_the_remaining_bytes(opcodes):
    refuse(b"\x80\x04" + opcodes + b".", peak_bytes=100_000)


def doubling(make_pair: bytes, levels: int = 60) -> bytes:
    """Each level refers to the one below twice: 2^levels leaves when expanded."""
    return b"\x80\x04" + b"N" + b"".join(b"\x94h%c" % level + make_pair for level in range(levels)) + b"."


def test_shared_references_expand_within_a_bound():
    refuse(doubling(b"\x86"), peak_bytes=1_000_000, match="unfolds")
    key = b"\x80\x04}" + doubling(b"\x86")[2:-1] + b"Ns."  # hash() of this tuple would take until the sun burns out
    refuse(key, peak_bytes=1_000_000, match="key, a tuple")
    refuse(b"\x80\x04]\x94h\x00a.", peak_bytes=1_000_000, match="levels")
    refuse(b"\x80\x04}\x94K\x01h\x00s.", peak_bytes=1_000_000, match="levels")


@pytest.mark.parametrize("nest", [b"\x85", b"(", b"]\x94", b"\x94]h\x00a"])
def test_deep_nesting_is_refused(nest):
    refuse(b"\x80\x04N" + nest * 50_000 + b".", peak_bytes=30_000_000)


def test_many_small_opcodes_are_bounded():
    for opcode in (b"}", b"\x8f", b"N\x94", b"K\x01"):
        refuse(b"\x80\x04" + opcode * 1_000_000 + b".", peak_bytes=60_000_000, match="more than 200000 pickle opcodes")


def test_copies_are_charged_to_a_budget_proportional_to_the_file():
    text = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
    encode = b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R0"
    copies = b"\x80\x04" + text + b"\x94" + b"c_codecs\nencode\n\x94" + encode.replace(b"0", b"") * 10_000 + b"."
    refuse(copies, peak_bytes=20_000_000, match="far more bytes")


def test_every_truncation_is_refused():
    for protocol in (2, 4, 5):
        data = pickle.dumps({"w": np.arange(4.0), "n": [1, (2, "three")], "s": {4}}, protocol)
        read_pickle(data)
        for length in range(len(data)):
            with pytest.raises(FileFormatError):
                read_pickle(data[:length])
        with pytest.raises(FileFormatError, match="does not end"):
            read_pickle(data + b"N.")


def test_file_is_checked_before_it_is_read(tmp_path):
    file = tmp_path / "data.pkl"
    file.write_bytes(pickle.dumps(np.zeros(1000)))
    with pytest.raises(FileFormatError, match="max_bytes=100"):
        read_pickle(file, max_bytes=100)
    with pytest.raises(FileFormatError, match="max_bytes=100"):
        read_pickle(file.read_bytes(), max_bytes=100)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(FileFormatError, match="not a regular file"):
            read_pickle(path)
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "missing.pkl")


# The reference program's checkpoint folders.

PARAMS = {
    "dyn/dyngru/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "enc/mlp0/scale": np.ones(3, ml_dtypes.bfloat16),
    "opt/state/0/count": np.array(7, np.int32),
}


@pytest.fixture
def checkpoint(tmp_path):
    """``logdir/ckpt`` as elements.Checkpoint 3.22 writes it."""
    folder = tmp_path / "ckpt"
    save = folder / "20250601T120000F123456"
    save.mkdir(parents=True)
    counters = {"updates": 3, "batches": 4, "actions": 5}
    (save / "agent.pkl").write_bytes(pickle.dumps({"params": PARAMS, "counters": counters}))
    (save / "step.pkl").write_bytes(pickle.dumps(12))
    (save / "done").write_bytes(b"")
    (folder / "latest").write_text(save.name)
    return folder


def check_params(params) -> None:
    assert same(params, PARAMS)


def test_checkpoint_by_folder_save_or_file(checkpoint):
    check_params(read_dreamerv3_checkpoint(checkpoint))
    save = checkpoint / (checkpoint / "latest").read_text()
    check_params(read_dreamerv3_checkpoint(str(save)))
    check_params(read_dreamerv3_checkpoint(save / "agent.pkl"))
    (checkpoint / "latest").write_text(save.name + "\n")
    check_params(read_dreamerv3_checkpoint(checkpoint))


def test_checkpoint_in_shards(checkpoint):
    save = checkpoint / (checkpoint / "latest").read_text()
    (save / "agent.pkl").unlink()
    for shard, (name, value) in enumerate(PARAMS.items()):
        (save / f"agent-{shard:04d}.pkl").write_bytes(pickle.dumps({"params": {name: value}}))
    check_params(read_dreamerv3_checkpoint(checkpoint))
    with pytest.raises(FileFormatError, match="more than max_bytes"):
        read_dreamerv3_checkpoint(checkpoint, max_bytes=500)
    (save / "agent-0001.pkl").write_bytes((save / "agent-0000.pkl").read_bytes())
    with pytest.raises(FileFormatError, match="repeats the parameter 'dyn/dyngru/kernel'"):
        read_dreamerv3_checkpoint(checkpoint)
    (save / "agent-0001.pkl").unlink()
    with pytest.raises(FileFormatError, match="all its shards"):
        read_dreamerv3_checkpoint(checkpoint)


def test_unfinished_save_is_refused(checkpoint):
    (checkpoint / (checkpoint / "latest").read_text() / "done").unlink()
    with pytest.raises(FileFormatError, match="'done' is missing"):
        read_dreamerv3_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", ["../other", "/etc", "..", ".", "", "a/b", "a\\b", "a\nb", "x" * 5000, "a\0b", "missing"]
)
def test_latest_cannot_point_out_of_the_folder(checkpoint, tmp_path, name):
    shutil.copytree(checkpoint / (checkpoint / "latest").read_text(), tmp_path / "other")
    (checkpoint / "latest").write_text(name)
    with pytest.raises(FileFormatError, match=r"latest|done"):
        read_dreamerv3_checkpoint(checkpoint)


@pytest.mark.parametrize("what", ["save", "file"])
def test_links_out_of_the_folder_are_refused(checkpoint, tmp_path, what):
    save = checkpoint / (checkpoint / "latest").read_text()
    moved = save if what == "save" else save / "agent.pkl"
    moved.rename(tmp_path / "outside")
    moved.symlink_to(tmp_path / "outside")
    with pytest.raises(FileFormatError, match="leads out of"):
        read_dreamerv3_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "data",
    [12, {}, {"params": {}}, {"params": [1]}, {"params": {"w": 1}}, {"params": {1: np.zeros(2)}}, {"a": {"b": 1}}],
)
def test_a_pickle_without_parameters_is_refused(tmp_path, data):
    (tmp_path / "agent.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(FileFormatError, match=r"an array is expected|holds no parameters"):
        read_dreamerv3_checkpoint(tmp_path / "agent.pkl")
