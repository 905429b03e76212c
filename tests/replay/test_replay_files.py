"""Saving and loading ``.npz`` files, and damaged or malicious ones."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from worldloom.errors import DataError, FileFormatError
from worldloom.replay import ReplayBuffer, ReplayStore
from worldloom.replay.sampling import uniform
from worldloom.replay.serialization import BufferDescription


def mixed_buffer(capacity=37):
    """Everything at once: dicts, images, discrete actions, tasks, latents, interleaved streams, a crash, eviction."""
    buffer = ReplayBuffer(capacity, action_type={"aim": "discrete", "move": "continuous"}, latents={"deter": (3,)})
    rng = np.random.default_rng(0)

    def data(n):
        obs = {"image": rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8), "vector": rng.normal(size=(n, 2))}
        return obs, {"aim": rng.integers(0, 3, n), "move": rng.uniform(-1, 1, (n, 2))}

    for n in range(3):
        obs, _ = data(8)
        buffer.add_episode(obs, data(7)[1], rng.normal(size=7), terminated=n == 1, task=n)
    for step in range(12):
        first = np.array([step == 0, step in (0, 6)])
        buffer.add_rows(
            *data(2), np.where(first, 0, step), first, [step == 11, False], [step == 11, False], task=[0, 1]
        )
    buffer.write_latents(np.arange(20, 48), {"deter": rng.normal(size=(28, 3))})
    return buffer


def flat(batch, prefix=""):
    for key, value in batch.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def assert_equal_content(left, right):
    assert repr(left) == repr(right)
    assert left.summary() == right.summary()
    for kwargs in ({}, {"cross_episodes": True}):
        for update in range(3):
            pairs = zip(
                *(flat(b.sample(8, 4, seed=5, update=update, latents=True, **kwargs)) for b in (left, right)),
                strict=True,
            )
            for (name, a), (other, b) in pairs:
                assert name == other
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    return mixed_buffer().save(tmp_path / "replay.npz")


def test_round_trip_keeps_content_order_and_batches(saved):
    before, after = mixed_buffer(), ReplayBuffer.load(saved)
    assert before.state_dict() == after.state_dict() == {"first_row": 11, "next_row": 48}
    assert_equal_content(before, after)
    for buffer in (before, after):
        obs = {"image": np.zeros((2, 4, 4, 3), np.uint8), "vector": np.zeros((2, 2))}
        actions = {"aim": [0, 0], "move": np.zeros((2, 2))}
        buffer.add_rows(obs, actions, [0, 1], [True, False], [False] * 2, [False] * 2, task=[0, 1])
        buffer.write_latents([48], {"deter": np.ones((1, 3))})
    assert_equal_content(before, after)


def test_saving_twice_gives_the_same_bytes_and_numpy_can_read_them(saved, tmp_path):
    again = ReplayBuffer.load(saved).save(tmp_path / "again.npz")
    assert saved.read_bytes() == again.read_bytes()
    with np.load(saved, allow_pickle=False) as arrays:
        assert arrays["obs/image"].shape == (37, 4, 4, 3)
        assert arrays["obs/image"].dtype == np.uint8


def test_the_block_size_does_not_change_the_content(saved, monkeypatch):
    expected = ReplayBuffer.load(saved)
    monkeypatch.setattr("worldloom.replay.table.BLOCK_BYTES", 1000)
    buffer = ReplayBuffer.load(saved)
    assert len(buffer.content().rows._blocks) > 3
    assert_equal_content(buffer, expected)
    assert buffer.save(saved.with_name("small.npz")).read_bytes() == saved.read_bytes()


def test_an_empty_buffer_keeps_what_was_declared(tmp_path):
    path = ReplayBuffer(7, obs_shape={"a": (2,)}, action_dim=3, latents={"deter": (2,)}).save(
        tmp_path / "sub" / "x.npz"
    )
    buffer = ReplayBuffer.load(path)
    assert (buffer.capacity, buffer.obs_shape, buffer.action_dim, buffer.latents, len(buffer)) == (
        7,
        {"a": (2,)},
        3,
        {"deter": (2,)},
        0,
    )


def test_a_failed_save_leaves_the_old_file_and_no_temporary_one(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worldloom.replay.npz._write_npy", full)
    with pytest.raises(OSError, match="No space"):
        mixed_buffer().save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["replay.npz"]


def test_a_missing_file_and_a_folder_raise_the_usual_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ReplayBuffer.load(tmp_path / "nothing.npz")
    with pytest.raises(OSError, match=r".*"):
        ReplayBuffer.load(tmp_path)


def one_array_buffer(obs=None, actions=None):
    """Three rows of a single observation and action array, or of dicts with one entry each."""
    buffer = ReplayBuffer(9)
    buffer.add_episode(np.arange(3.0)[:, None] if obs is None else obs, [0, 1] if actions is None else actions, [1, 2])
    return buffer


def test_a_dict_with_the_single_key_stays_a_dict(tmp_path):
    """Inside, a single array is named "obs" or "action"; a dict with this one key must not be taken for it."""
    single = one_array_buffer()
    mapping = one_array_buffer({"obs": np.arange(3.0)[:, None]}, {"action": [0, 1]})
    assert (single.obs_shape, single.action_dim, single.action_type) == ((1,), 2, "discrete")
    assert (mapping.obs_shape, mapping.action_dim) == ({"obs": (1,)}, {"action": 2})
    loaded = [ReplayBuffer.load(b.save(tmp_path / "x.npz")) for b in (single, mapping)]
    stored = [ReplayStore(tmp_path / "y").load(ReplayStore(tmp_path / "y").write(b)) for b in (single, mapping)]
    for one, other in ((single, mapping), loaded, stored):
        assert (repr(one), repr(other)) == (repr(single), repr(mapping))
        left, right = one.take(np.arange(3)), other.take(np.arange(3))
        np.testing.assert_array_equal(left["obs"], right["obs"]["obs"])
        np.testing.assert_array_equal(left["actions"], right["actions"]["action"])
        with pytest.raises(DataError, match="obs is one array; here it must be a dict of obs"):
            other.add_episode(np.zeros((3, 1)), {"action": [0, 1]}, [0, 0])
        with pytest.raises(DataError, match="actions is a dict of action; here it must be one array"):
            one.add_episode(np.zeros((3, 1)), {"action": [0, 1]}, [0, 0])


def test_a_single_array_has_no_key_in_files(tmp_path):
    """The format of all versions so far: column ``obs`` and key "" for a single array, ``obs/<key>`` for a dict."""
    path = one_array_buffer().save(tmp_path / "x.npz")
    with np.load(path) as arrays:
        assert set(arrays) == {"meta", "obs", "actions", "rewards", "flags", "stream"}
        assert json.loads(arrays["meta"].tobytes()) == {
            "format": "worldloom.replay",
            "version": 1,
            "capacity": 9,
            "first_row": 0,
            "next_row": 3,
            "declared": {"obs_shape": None, "action_dim": None, "action_type": None},
            "schema": {
                "obs": [["", [1], "float32"]],
                "actions": [["", "discrete", 2, False]],
                "has_task": False,
            },
            "latents": {},
        }
    with np.load(one_array_buffer({"obs": np.zeros((3, 1))}, {"action": [0, 1]}).save(path)) as arrays:
        assert {"obs/obs", "actions/action"} < set(arrays)
        schema = json.loads(arrays["meta"].tobytes())["schema"]
        assert schema["obs"] == [["obs", [1], "float32"]]
        assert schema["actions"] == [["action", "discrete", 2, False]]


def test_the_content_makes_an_equal_buffer():
    """The record that every file format writes and reads."""
    content = mixed_buffer().content()
    assert (content.description.first_row, content.description.num_rows) == (11, 37)
    assert content.rows.columns == content.description.row_columns
    assert content.latents.columns == content.description.latent_columns
    assert BufferDescription.from_json(json.loads(json.dumps(content.description.to_json()))) == content.description
    assert_equal_content(ReplayBuffer.from_content(content), mixed_buffer())


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewrite(path, changes, compression=zipfile.ZIP_STORED):
    """The same file with some members replaced (None removes one)."""
    contents = {**members(path), **changes}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            if data is not None:
                archive.writestr(name, data)


def npy(array, **kwargs):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), **kwargs)
    return out.getvalue()


def header_only(shape, descr="<f4"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def meta_with(path, **changes):
    meta = json.loads(np.load(io.BytesIO(members(path)["meta.npy"])).tobytes())
    return {"meta.npy": npy(np.frombuffer(json.dumps({**meta, **changes}).encode(), np.uint8))}


def changed(path, name, position, value):
    array = np.load(io.BytesIO(members(path)[f"{name}.npy"]))
    array[position] = value
    return {f"{name}.npy": npy(array)}


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


HOSTILE = {
    "pickled member": lambda p: {"rewards.npy": npy(np.array([Boom()] * 37, object), allow_pickle=True)},
    "header larger than the file": lambda p: {"rewards.npy": header_only((10**12,)) + bytes(160)},
    "overflowing shape": lambda p: {"rewards.npy": header_only((2**62, 2**62))},
    "negative shape": lambda p: {"rewards.npy": header_only((-1,))},
    "short member": lambda p: {"rewards.npy": header_only((37,)) + bytes(100)},
    "long member": lambda p: {"rewards.npy": header_only((37,)) + bytes(1000)},
    "wrong dtype": lambda p: {"rewards.npy": npy(np.zeros(37))},
    "big-endian": lambda p: {"rewards.npy": npy(np.zeros(37, ">f4"))},
    "later npy format": lambda p: {"rewards.npy": npy(np.zeros(37, np.float32), version=(2, 0))},
    "text": lambda p: {"rewards.npy": b"not an array"},
    "header of code": lambda p: {"rewards.npy": b"\x93NUMPY\x01\x00\x20\x00__import__('os').abort()      \n"},
    "missing member": lambda p: {"rewards.npy": None},
    "additional member": lambda p: {"../evil.npy": npy(np.zeros(3))},
    "missing meta": lambda p: {"meta.npy": None},
    "meta of floats": lambda p: {"meta.npy": npy(np.zeros(3))},
    "meta not json": lambda p: {"meta.npy": npy(np.frombuffer(b"{", np.uint8))},
    "meta nested": lambda p: {"meta.npy": npy(np.frombuffer(b"[" * 100_000, np.uint8))},
    "meta huge": lambda p: {"meta.npy": npy(np.zeros(2 << 20, np.uint8))},
    "another format": lambda p: meta_with(p, format="other"),
    "another version": lambda p: meta_with(p, version=2),
    "capacity below the rows": lambda p: meta_with(p, capacity=10),
    "capacity a text": lambda p: meta_with(p, capacity="10"),
    "more rows": lambda p: meta_with(p, next_row=10**15, capacity=10**15),
    "fewer rows": lambda p: meta_with(p, next_row=47),
    "rows but no schema": lambda p: meta_with(p, schema=None),
    "schema of text": lambda p: meta_with(p, schema="x"),
    "schema dtype": lambda p: meta_with(p, schema={"obs": [["", [2], "object"]], "actions": [], "has_task": False}),
    "schema huge": lambda p: meta_with(
        p, schema={"obs": [["", [2**60], "uint8"]], "actions": [["", "discrete", 2, True]], "has_task": False}
    ),
    "an array without a name beside others": lambda p: meta_with(
        p,
        schema={
            "obs": [["", [2], "uint8"], ["a", [2], "uint8"]],
            "actions": [["", "discrete", 2, True]],
            "has_task": False,
        },
    ),
    "huge latents": lambda p: meta_with(p, latents={"deter": [10**12]}),
    "nan reward": lambda p: changed(p, "rewards", 3, np.nan),
    "infinite obs": lambda p: changed(p, "obs/vector", (3, 1), np.inf),
    "nan latent": lambda p: changed(p, "latents/deter", (3, 1), np.nan),
    "action beyond 1": lambda p: changed(p, "actions/move", (3, 1), 2),
    "index beyond the actions": lambda p: changed(p, "actions/aim", 3, 9),
    "index below -1": lambda p: changed(p, "actions/aim", 3, -2),
    "impossible flags": lambda p: changed(p, "flags", 3, 255),
    "terminal but not last": lambda p: changed(p, "flags", 3, 4),
    "last in the middle": lambda p: changed(p, "flags", 3, 2),
    "negative task": lambda p: changed(p, "task", 3, -1),
    "negative stream": lambda p: changed(p, "stream", 3, -2),
}


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_without_allocating_memory(name, saved):
    rewrite(saved, HOSTILE[name](saved))
    size = saved.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=r"replay\.npz"):
            ReplayBuffer.load(saved)
        assert tracemalloc.get_traced_memory()[1] < 33 * 2**20 + 4 * size
    finally:
        tracemalloc.stop()


def test_compressed_files_are_refused(saved):
    rewrite(saved, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match="holds compressed"):
        ReplayBuffer.load(saved)


def test_a_directory_that_promises_more_than_the_file_has_allocates_nothing(tmp_path):
    path, rows = ReplayBuffer(10).save(tmp_path / "x.npz"), 10**10
    schema = {"obs": [["", [2], "uint8"]], "actions": [["", "discrete", 2, True]], "has_task": False}
    contents = {**members(path), **meta_with(path, capacity=rows, next_row=rows, schema=schema)}
    columns = {
        "obs": ("|u1", (2,)),
        "actions": ("<i4", ()),
        "rewards": ("<f4", ()),
        "flags": ("|u1", ()),
        "stream": ("<i4", ()),
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.npy", contents["meta.npy"])
        for name, (descr, shape) in columns.items():
            header = header_only((rows, *shape), descr)
            archive.writestr(f"{name}.npy", header)
            info = archive.getinfo(f"{name}.npy")
            info.file_size = info.compress_size = len(header) + rows * np.dtype(descr).itemsize * (shape or (1,))[0]
    tracemalloc.start()
    with pytest.raises(FileFormatError, match="promises more bytes"):
        ReplayBuffer.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(saved):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("rewards.npy", npy(np.zeros(37, np.float32)))
    with pytest.raises(FileFormatError, match="same name"):
        ReplayBuffer.load(saved)


@pytest.mark.parametrize("data", [b"", b"PK", b"\x80\x04K\x01.", bytes(1000), b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(data, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"x\.npz"):
        ReplayBuffer.load(path)


@pytest.mark.filterwarnings("default")
def test_damaged_files_are_refused_or_hold_what_was_saved(saved):
    """A flipped byte that no checksum covers (a date, padding) may go unnoticed, but then the content is the same."""
    good = saved.read_bytes()
    expected = ReplayBuffer.load(saved)
    unnoticed = 0
    for n, (where, what) in enumerate(zip(uniform(1, 0, (400,)), uniform(1, 1, (400,)), strict=True)):
        data = bytearray(good)
        place = int(where * len(data))
        if n % 4 == 0:
            del data[place:]
        elif n % 4 == 1:
            data[place : place + 8] = b"\xff" * 8
        else:
            data[place] ^= 1 + int(what * 255)
        if bytes(data) == good:
            continue
        saved.write_bytes(bytes(data))
        try:
            buffer = ReplayBuffer.load(saved)
        except FileFormatError:
            continue
        unnoticed += 1
        assert_equal_content(buffer, expected)
    assert unnoticed < 40
