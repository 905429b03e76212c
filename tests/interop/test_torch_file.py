"""The reader of PyTorch's zip format: PyTorch's own files come back equal, made-up ones are refused."""

import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from worldloom.errors import FileFormatError
from worldloom.interop.pickle_machine import Opaque
from worldloom.interop.torch_file import read_torch

DATA = Path(__file__).resolve().parents[1] / "data"


def test_every_kind_of_tensor_reads_as_pytorch_reads_it(golden):
    """``torch-tensors.pt`` was written by PyTorch 2.13, the values beside it through ``Tensor.numpy()``."""
    content = read_torch(DATA / "torch-tensors.pt")
    arrays = content["tensors"] | {f"state_dict.{name}": value for name, value in content["state_dict"].items()}
    expected = golden("torch-tensors")
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        kind = ml_dtypes.bfloat16 if name in ("bfloat16", "parameter") else expected[name].dtype
        assert (array.dtype, array.shape) == (kind, expected[name].shape), name
        np.testing.assert_array_equal(array.astype(expected[name].dtype), expected[name], err_msg=name)


def test_other_values_of_that_file():
    content = read_torch(str(DATA / "torch-tensors.pt"))
    base, plain = content["nested"]["list"]
    assert np.shares_memory(base, content["tensors"]["base"])
    assert plain == (1, 2.5, None, True, "häß", b"bytes")
    assert content["nested"][7] == {"a": -1}
    assert (content["size"], content["device"], content["set"]) == ((5, 2), "cuda:1", {1, 2})
    np.testing.assert_array_equal(content["array"], np.arange(6.0).reshape(2, 3))
    assert isinstance(content["meta"], Opaque)
    assert content["dtype"].class_name == "torch.float32"


def test_tensors_that_share_storage_share_memory():
    tensors = read_torch(DATA / "torch-tensors.pt")["tensors"]
    assert np.shares_memory(tensors["base"], tensors["scalar_of_shared"])
    assert not tensors["base"].flags.writeable
    assert all(array.flags.c_contiguous for array in tensors.values())


@pytest.mark.parametrize("name", ["tdmpc2-single-s0", "tdmpc2-episodic-s0"])
def test_tdmpc2_files_hold_the_recorded_parameters(golden, name):
    expected = {key.removeprefix("params/"): value for key, value in golden(name).items() if key.startswith("params/")}
    current = read_torch(DATA / f"{name}-current.pt")["model"]
    for key, value in expected.items():
        assert current[key].dtype == value.dtype
        np.testing.assert_array_equal(current[key], value, err_msg=key)
    assert all("_detach_Qs_params" in key for key in current.keys() - expected.keys())

    old = read_torch(DATA / f"{name}-2023.pt")["model"]
    for key, value in old.items():
        prefix, _, number = key.partition("_Qs.params.")
        if number:  # flat-numbered: 4 entries a layer
            layer, entry = divmod(int(number), 4)
            part = ("weight", "bias", "ln.weight", "ln.bias")[entry]
            key = f"_target_Qs_params.{layer}.{part}" if prefix else f"_Qs.params.{layer}.{part}"
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    assert len(old) == len(expected) - 2  # log_std_min and log_std_dif came later


def test_config_objects_are_refused_or_stubbed():
    """As in TD-MPC2's multitask files: an OmegaConf config and a path beside the weights."""
    with pytest.raises(FileFormatError, match=r"omegaconf\.dictconfig\.DictConfig"):
        read_torch(DATA / "torch-omegaconf.pt")
    content = read_torch(DATA / "torch-omegaconf.pt", stub_unknown=True)
    assert content["model"]["weight"].shape == (3, 2)
    assert content["cfg"].class_name == "omegaconf.dictconfig.DictConfig"
    assert content["work_dir"].class_name == "pathlib.PosixPath"
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch-legacy", "before version 1.6.*torch.save"),
        ("torch-script", "TorchScript"),
        ("torch-module", r"torch\.nn\.modules\.container\.Sequential"),
        ("tdmpc2-single-s0", "zip archive, but not one that torch.save wrote"),
    ],
)
def test_other_formats_are_named(name, message):
    path = DATA / f"{name}.pt"
    with pytest.raises(FileFormatError, match=message):
        read_torch(path if path.exists() else path.with_suffix(".npz"))


def test_other_files(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes((DATA / "torch-tensors.pt").read_bytes()[:-30])
    for name in ("text", "empty", "cut"):
        with pytest.raises(FileFormatError, match=r"not a PyTorch file|not an intact zip"):
            read_torch(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "missing.pt")
    with pytest.raises(FileFormatError, match="max_bytes=1000"):
        read_torch(DATA / "torch-tensors.pt", max_bytes=1000)


# Files made by hand. A small assembler of the opcodes that torch.save uses:


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def integers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(kind: str = "torch FloatStorage", key: str = "0", elements: int = 4) -> bytes:
    module, name = kind.split()
    return (
        b"(" + text("storage") + f"c{module}\n{name}\n".encode() + text(key) + text("cpu") + integer(elements) + b"tQ"
    )


def tensor(*, of: bytes | None = None, offset=0, shape=(4,), strides=(1,), rest: bytes = b"") -> bytes:
    of = storage() if of is None else of
    numbers = integer(offset) + integers(*shape) + integers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + numbers + b"\x89ccollections\nOrderedDict\n)R" + rest + b"tR"


@pytest.fixture
def archive(tmp_path):
    """Writes a ``.pt`` file with the given pickle opcodes and one storage, ``0``, of 16 bytes."""

    def write(opcodes: bytes, *, compress=zipfile.ZIP_STORED, entries=(), **changed: bytes) -> Path:
        path = tmp_path / "made.pt"
        contents = {"data.pkl": b"\x80\x02" + opcodes + b".", "byteorder": b"little", "data/0": bytes(range(16))}
        with zipfile.ZipFile(path, "w", compress) as file:
            for name, data in {**contents, **changed}.items():
                file.writestr(f"made/{name}", data)
            for name, data in entries:
                file.writestr(name, data)
        return path

    return write


FLOATS = np.frombuffer(bytes(range(16)), np.float32)


def test_the_assembler_writes_what_is_read(archive):
    np.testing.assert_array_equal(read_torch(archive(tensor())), FLOATS)
    np.testing.assert_array_equal(read_torch(archive(tensor(offset=1, shape=(2,), strides=(2,)))), FLOATS[1::2])
    np.testing.assert_array_equal(read_torch(archive(tensor(rest=b"}"))), FLOATS)
    np.testing.assert_array_equal(read_torch(archive(tensor(shape=(2, 4), strides=(0, 1)))), [FLOATS, FLOATS])
    assert read_torch(archive(tensor(shape=(0, 2**30), strides=(1, 1)))).shape == (0, 2**30)


@pytest.mark.parametrize(
    "made",
    [
        {"shape": (5,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**60},
        {"shape": (-4,), "strides": (-1,)},
        {"shape": (4,), "strides": (-1,), "offset": 3},
        {"shape": (2,), "strides": (4,)},
        {"shape": (2**60,)},
        {"shape": (2**40,), "strides": (0,)},
        {"shape": (2**40, 2**40, 2**40), "strides": (0, 0, 0)},
        {"shape": (2**62, 0), "strides": (0, 0)},
        {"shape": (2, 2), "strides": (1,)},
        {"shape": (1,) * 40, "strides": (1,) * 40},
        {"of": storage(elements=5)},
        {"of": storage(elements=2**60)},
        {"of": storage(elements=-4)},
        {"of": storage("torch DoubleStorage")},
        {"of": storage("torch.storage UntypedStorage", elements=16)},
        {"of": storage("torch QInt8Storage")},
        {"of": storage("collections OrderedDict")},
        {"of": storage(key="1")},
        {"of": storage(key="../data.pkl")},
        {"of": storage(key="0" * 1000)},
        {"of": storage("torch BoolStorage", elements=16), "shape": (16,)},
        {"of": b"N"},
        {"of": b"NQ"},
        {"of": text("storage") + b"\x85Q"},
        {"rest": b"}" + text("conj") + b"\x88s"},
        {"rest": b"NNN"},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_storage_are_refused(archive, made):
    path = archive(tensor(**made))
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError):
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opcodes", [storage(), b"ctorch._utils\n_rebuild_parameter\n(NNNtR", b"ctorch\nSize\nN\x85R"])
def test_other_shapes_of_calls_are_refused(archive, opcodes):
    with pytest.raises(FileFormatError, match=r"bare storage|malformed"):
        read_torch(archive(opcodes))


@pytest.mark.parametrize("stub_unknown", [False, True])
@pytest.mark.parametrize(
    "name", ["os system", "posix system", "__builtin__ eval", "subprocess Popen", "sys exit", "importlib import_module"]
)
def test_no_command_is_run_with_or_without_stubs(archive, tmp_path, name, stub_unknown):
    marker = tmp_path / "ran"
    module, attribute = name.split()
    call = f"c{module}\n{attribute}\n".encode() + text(f"touch {marker}") + b"\x85R"
    for opcodes in (call, b"}" + text("model") + call + b"s", tensor(of=call), b"cmy\nClass\n)R" + call + b"b"):
        with pytest.raises(FileFormatError, match=rf"{attribute}'|my\.Class"):
            read_torch(archive(opcodes), stub_unknown=stub_unknown)
    assert not marker.exists()


def test_the_same_attack_works_on_pickle_itself(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(b"\x80\x02cos\nsystem\n" + text(f"touch {marker}") + b"\x85R.")
    assert marker.exists()
    os.remove(marker)


def test_stubs_drop_the_contents_of_their_objects(archive):
    made = b"cmy.module\nClass\n)\x81}b" + text("k") + b"Ns" + b"N" + b"a" + b"(NNe" + b"(" + text("k") + b"Nu"
    got = read_torch(archive(made), stub_unknown=True)
    assert isinstance(got, Opaque)
    assert got.class_name == "my.module.Class"


# Archives made to mislead.


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("made/data/0", b"\0" * 16)], "two entries"),
        ([("made/../../evil", b"")], "leads out"),
        ([("/etc/made", b"")], "leads out"),
        ([("made\\..\\evil", b"")], "leads out"),
        ([("other/data/0", b"")], "not one that torch.save wrote"),
        ([("made/constants.pkl", b"")], "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_misplaced_or_missing_entries_are_refused(archive, entries, message):
    with pytest.raises(FileFormatError, match=message):
        read_torch(archive(tensor(), entries=entries))


def test_foreign_byte_order_and_compression_are_refused(archive):
    with pytest.raises(FileFormatError, match="byte order b'big'"):
        read_torch(archive(tensor(), byteorder=b"big"))
    with pytest.raises(FileFormatError, match="compressed"):
        read_torch(archive(tensor(), compress=zipfile.ZIP_DEFLATED))


def test_a_flipped_byte_of_a_storage_is_detected(archive):
    path = archive(tensor())
    data = path.read_bytes()
    assert data.count(bytes(range(16))) == 1
    path.write_bytes(data.replace(bytes(range(16)), bytes(range(15)) + b"\xff"))
    with pytest.raises(FileFormatError, match=r"CRC|intact"):
        read_torch(path)


def test_many_references_to_one_storage_stay_cheap(archive):
    """A thousand tensors over one storage, each expanded by a stride of 0 to 64 times its size."""
    expanded = tensor(shape=(64, 4), strides=(0, 1))
    assert read_torch(archive(expanded)).shape == (64, 4)
    with pytest.raises(FileFormatError, match="far more bytes"):
        read_torch(archive(b"](" + expanded * 1000 + b"e"))
    plain = read_torch(archive(b"](" + tensor() * 1000 + b"e"))
    assert all(array.base is not None and np.shares_memory(array, plain[0]) for array in plain)


def test_a_long_shape_used_often_stays_cheap(archive):
    """A memoized shape of 50,000 axes: scanning it at every use would take minutes."""
    shape = b"(" + b"K\x01" * 50_000 + b"t\x94"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + integer(0) + b"h\x00h\x00\x89}tR"
    start = time.process_time()
    with pytest.raises(FileFormatError, match="malformed tensor"):
        read_torch(archive(shape + call))
    assert time.process_time() - start < 1


def test_files_are_closed_after_success_and_refusal(archive):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    read_torch(archive(tensor()))
    for opcodes in (storage(), b"\xff"):
        with pytest.raises(FileFormatError):
            read_torch(archive(opcodes))
    assert before is None or len(os.listdir("/proc/self/fd")) == before
