"""Replay on disk: the same buffer is loaded, only what changed is written, and damage is detected."""

import copy
import errno
import gc
import json
import os
import resource
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import CheckpointError, FileFormatError
from worldloom.replay import ReplayBuffer, ReplayStore
from worldloom.replay.sampling import uniform


def add(buffer, values, first=None, streams=None):
    """One row per stream, filled with its entry of ``values``: observations, reward, latent, and an index as action."""
    values = np.asarray(values)
    first = np.zeros(len(values), bool) if first is None else np.asarray(first)
    image = np.broadcast_to(values[:, None, None, None] % 251, (len(values), 3, 2, 1)).astype(np.uint8)
    obs = {"image": image, "vector": values[:, None] / 7}
    last = np.zeros(len(values), bool)
    latents = {"deter": np.repeat(values[:, None] / 3, 2, axis=1)} if buffer.latents else None
    rewards = np.where(first, 0, values / 5)
    return buffer.add_rows(obs, values % 3, rewards, first, last, last, streams=streams, latents=latents)


def filled(rows=60, *, capacity=45, block_bytes=256, episode=9):
    """Several blocks (of 8 rows, latents of 32), eviction inside one, unfinished blocks, an episode in progress."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldloom.replay.table.BLOCK_BYTES", block_bytes)
        buffer = ReplayBuffer(capacity, action_dim=3, latents={"deter": (2,)})
        for value in range(rows):
            add(buffer, [value], [value % episode == 0])
    return buffer


def content(buffer, folder):
    """Everything a buffer holds, as bytes."""
    return buffer.save(folder / "content.npz").read_bytes()


def files(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


def test_the_same_rows_are_loaded_and_the_run_continues(tmp_path):
    buffer = filled()
    reference = json.loads(json.dumps(ReplayStore(tmp_path / "store").write(buffer)))
    again = ReplayStore(tmp_path / "store").load(reference)
    for value in range(60, 90):
        assert repr(buffer) == repr(again)
        assert content(buffer, tmp_path) == content(again, tmp_path)
        for crossing in (True, False):
            one, other = (b.sample(4, 5, seed=3, update=value, cross_episodes=crossing) for b in (buffer, again))
            np.testing.assert_array_equal(one["row_ids"], other["row_ids"])
            np.testing.assert_array_equal(one["obs"]["image"], other["obs"]["image"])
        for b in (buffer, again):
            add(b, [value], [value % 9 == 0])
            b.write_latents(np.arange(value - 20, value), {"deter": np.full((20, 2), value)})


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_or_new_buffer_keeps_what_was_declared(rows, tmp_path):
    buffer = ReplayBuffer(7, obs_shape={"image": (3, 2, 1), "vector": (1,)}, action_type="discrete")
    for value in range(rows):
        add(buffer, [value], [True])
    again = ReplayStore(tmp_path).load(ReplayStore(tmp_path).write(buffer))
    assert repr(again) == repr(buffer)
    assert again.obs_shape == buffer.obs_shape
    add(again, [5], [True])


def test_an_existing_buffer_can_adopt_what_is_loaded(tmp_path):
    buffer, own = filled(), ReplayBuffer(3)
    own.adopt(ReplayStore(tmp_path / "store").load(ReplayStore(tmp_path / "store").write(buffer)))
    assert content(own, tmp_path) == content(buffer, tmp_path)
    assert add(own, [60], [True]).tolist() == [60]
    assert own.capacity == len(own) == 45


def test_row_numbers_continue_in_an_emptied_buffer(tmp_path):
    buffer = filled()
    buffer.load_state_dict({"first_row": 60, "next_row": 60})
    again = ReplayStore(tmp_path).load(ReplayStore(tmp_path).write(buffer))
    assert add(again, [0], [True]).tolist() == [60]


class RunModel:
    """A run that saves, restores and truncates at random, and keeps the content that each reference must restore."""

    def __init__(self, folder, data):
        self.folder, self.data, self.value = folder, data, 0
        self.store = ReplayStore(folder / "store")
        latents = {"deter": (2,)} if data.draw(st.booleans()) else None
        self.buffer = ReplayBuffer(data.draw(st.integers(4, 60)), action_dim=3, latents=latents)
        self.saved, self.pending = [], None

    def rows(self):
        """Add rows of some of two environments, with crashes."""
        for _ in range(self.data.draw(st.integers(1, 12))):
            streams = self.data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True))
            crash = self.data.draw(st.integers(0, 5)) == 0
            first = [crash or not self.buffer._storage.index.in_progress(stream) for stream in streams]
            add(self.buffer, [self.value + n for n in range(len(streams))], first, streams)
            self.value += len(streams)

    def latents(self):
        if len(self.buffer) and self.buffer.latents:
            first, length = self.data.draw(st.integers(0, len(self.buffer) - 1)), self.data.draw(st.integers(1, 6))
            state = self.buffer.state_dict()
            ids = np.arange(state["first_row"] + first, state["next_row"])[:length]
            self.buffer.write_latents(ids, {"deter": np.full((len(ids), 2), self.data.draw(st.integers(0, 9)))})

    def more_latents(self):
        self.buffer.ensure_latents({"deter": (2,), "stoch": (1, 2)})

    def save(self):
        self.finish()
        self.pending = self.store.snapshot(self.buffer), content(self.buffer, self.folder)

    def finish(self):
        """Write the pending snapshot only now, whatever has changed since."""
        if self.pending:
            pending, expected = self.pending
            self.saved.append((pending.write(), expected))
            self.pending = None

    def restore(self):
        self.finish()
        if self.saved:
            reference, expected = self.data.draw(st.sampled_from(self.saved))
            if self.data.draw(st.booleans()):
                self.store = ReplayStore(self.folder / "store")
            self.buffer = self.store.load(reference)
            assert content(self.buffer, self.folder) == expected

    def truncate(self):
        """Drop the newest rows, without reading anything."""
        state = self.buffer.state_dict()
        if state["next_row"] > state["first_row"]:
            end = self.data.draw(st.integers(state["first_row"], state["next_row"]))
            self.buffer.load_state_dict({**state, "next_row": end})

    def collect(self):
        self.finish()
        if self.saved:
            self.saved = self.data.draw(st.lists(st.sampled_from(self.saved), min_size=1, max_size=3))
            self.store.collect(reference for reference, _ in self.saved)


@given(data=st.data(), block=st.sampled_from([1, 60, 300, 10_000]))
@settings(max_examples=100, deadline=None)
def test_any_saved_moment_is_restored(data, block, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worldloom.replay.table.BLOCK_BYTES", block)
        patch.setattr("worldloom.replay.chunks.PIECE_BYTES", 64)
        patch.setattr(os, "fsync", lambda descriptor: None)
        run = RunModel(folder, data)
        what = ["rows", "rows", "latents", "latents", "more_latents", "save", "save", "restore", "truncate", "collect"]
        for action in data.draw(st.lists(st.sampled_from(what), max_size=25)):
            getattr(run, action)()
        run.finish()
        for reference, expected in run.saved:
            assert content(ReplayStore(folder / "store").load(reference), folder) == expected
    shutil.rmtree(folder)


def test_a_snapshot_keeps_its_content_whatever_changes_before_it_is_written(tmp_path):
    buffer, store = filled(), ReplayStore(tmp_path / "store")
    expected, pending = content(buffer, tmp_path), store.snapshot(buffer)
    buffer.write_latents(np.arange(15, 60), {"deter": np.ones((45, 2))})
    buffer.load_state_dict({"first_row": 20, "next_row": 50})
    for value in range(200, 260):
        add(buffer, [value], [value % 9 == 0])
    references = []
    thread = threading.Thread(target=lambda: references.append(pending.write()))
    thread.start()
    thread.join()
    assert content(store.load(references[0]), tmp_path) == expected


def test_only_what_changed_is_written(tmp_path):
    buffer, store = filled(rows=40, capacity=1000), ReplayStore(tmp_path)
    first = store.write(buffer)
    before = files(tmp_path)
    assert store.write(buffer) == first
    assert files(tmp_path) == before
    add(buffer, [40], [True])
    buffer.write_latents([3], {"deter": np.full((1, 2), 9)})
    store.write(buffer)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    new = sorted(name.rsplit("-", 1)[0] for name in after.keys() - before.keys())
    assert new == ["latents-000000000000-32", "latents-000000000032-9", "rows-000000000040-1"]


def test_after_loading_only_what_changed_is_written(tmp_path):
    ReplayStore(tmp_path).write(filled())
    store = ReplayStore(tmp_path)
    reference = ReplayStore(tmp_path).write(filled())
    before, buffer = files(tmp_path), store.load(reference)
    assert store.write(buffer) == reference
    assert files(tmp_path) == before
    buffer.write_latents([59], {"deter": np.ones((1, 2))})
    store.write(buffer)
    assert [name.rsplit("-", 1)[0] for name in files(tmp_path).keys() - before.keys()] == ["latents-000000000032-28"]


def test_an_episode_interrupted_later_changes_no_file(tmp_path):
    """That an episode was interrupted is derived from the rows, and not written with them."""
    buffer = filled(rows=40, capacity=1000)
    before = ReplayStore(tmp_path).write(buffer)
    add(buffer, [40], [True])
    after = ReplayStore(tmp_path).write(buffer)
    assert after["chunks"]["rows"]["files"][:5] == before["chunks"]["rows"]["files"]
    assert ReplayStore(tmp_path).load(after).take(np.array([39]))["is_last"].all()
    assert not ReplayStore(tmp_path).load(before).take(np.array([39]))["is_last"].any()


def test_existing_files_are_not_written_again_by_another_store(tmp_path):
    """As when a run is resumed from a folder: only blocks that are not full are written again."""
    buffer = ReplayStore(tmp_path / "a").load(ReplayStore(tmp_path / "a").write(filled()))
    before = files(tmp_path / "a")
    reference = ReplayStore(tmp_path / "a").write(buffer)
    after = files(tmp_path / "a")
    assert before.keys() == after.keys()
    full = [name for name in before if "-8-" in name]
    assert len(full) == 5
    assert {name: after[name] for name in full} == {name: before[name] for name in full}
    assert ReplayStore(tmp_path / "b").write(buffer) == reference
    shutil.rmtree(tmp_path / "a")
    assert content(ReplayStore(tmp_path / "b").load(reference), tmp_path) == content(filled(), tmp_path)


def test_a_file_that_went_missing_is_written_again(tmp_path):
    buffer, store = filled(), ReplayStore(tmp_path)
    reference = store.write(buffer)
    next(tmp_path.glob("rows-*32-8-*")).unlink()
    with pytest.raises(FileFormatError, match="No such file"):
        store.load(reference)
    assert store.write(buffer) == reference
    store.load(reference)


def test_files_are_deleted_when_nothing_refers_to_them(tmp_path):
    buffer, store = filled(), ReplayStore(tmp_path)
    references = [store.write(buffer)]
    (tmp_path / "rows-000000000008.partial").write_bytes(b"left by a kill")
    (tmp_path / "notes.txt").write_text("not ours")
    for value in range(60, 200):
        add(buffer, [value], [value % 9 == 0])
        if value % 50 == 0:
            references.append(store.write(buffer))
    assert store.collect(references) == ["rows-000000000008.partial"]
    for kept in references:
        ReplayStore(tmp_path).load(kept)
    gone = store.collect(references[-1:])
    assert gone
    assert (tmp_path / "notes.txt").exists()
    assert len(list(tmp_path.glob("*.chunk"))) == sum(len(t["files"]) for t in references[-1]["chunks"].values())
    assert content(ReplayStore(tmp_path).load(references[-1]), tmp_path / "x")
    with pytest.raises(FileFormatError):
        ReplayStore(tmp_path).load(references[0])
    # The newest reference is kept even if the caller does not list it.
    assert store.collect([]) == []
    before = files(tmp_path)
    with pytest.raises(FileFormatError):
        store.collect([references[-1], {"chunks": "damaged"}])
    assert files(tmp_path) == before
    assert ReplayStore(tmp_path / "none").collect([]) == []


def test_a_store_of_many_blocks_needs_little_memory_and_few_descriptors(tmp_path, monkeypatch):
    """12 MB in 192 files: loading and sampling use the memory of a few blocks, and 8 file descriptors."""
    monkeypatch.setattr("worldloom.replay.table.BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr("worldloom.replay.chunks.MAP_CACHE.max_open", 8)
    buffer, episode = ReplayBuffer(3072), np.zeros((256, 64, 21, 3), np.uint8)
    for number in range(12):
        episode[:] = number
        buffer.add_episode(episode, np.zeros((255, 1)), np.zeros(255), terminated=True)
    reference = ReplayStore(tmp_path).write(buffer)
    assert len(reference["chunks"]["rows"]["files"]) == 192
    descriptors = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        again = ReplayStore(tmp_path).load(reference)
        for update in range(200):
            batch = again.sample(2, 8, update=update)
            np.testing.assert_array_equal(batch["obs"][..., 0, 0, 0], batch["row_ids"] // 256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert len(os.listdir("/proc/self/fd")) == descriptors + 8
    del again
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


# ---- a full disk, damaged files, invalid references ------------------------------------------------------------------


def test_a_full_disk_is_reported_and_what_was_saved_stays(tmp_path, monkeypatch):
    buffer, store = filled(), ReplayStore(tmp_path / "store")
    reference, expected = store.write(buffer), content(buffer, tmp_path)
    add(buffer, np.arange(2), [True, True], [1, 2])
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    pending = store.snapshot(buffer)
    before = files(tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"could not be written to .*No space left.*as it was"):
        pending.write()
    assert len(files(tmp_path / "store").keys() - before.keys()) == 1
    assert content(ReplayStore(tmp_path / "store").load(reference), tmp_path) == expected
    # With space again, the remaining files are written, by the same snapshot or the next.
    later = pending.write()
    assert later == store.write(buffer)
    assert content(store.load(later), tmp_path) == content(buffer, tmp_path)


def test_a_file_size_limit_is_reported_too(tmp_path):
    buffer, store = filled(rows=300, capacity=300, block_bytes=20_000), ReplayStore(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            store.write(buffer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == {}


def damage(path, n, where, what):
    """Damage of kind ``n % 6`` at a random place."""
    data = bytearray(path.read_bytes())
    place = int(where * len(data))
    match n % 6:
        case 0:
            del data[place:]
        case 1:
            data[place : place + 8] = bytes(len(data[place : place + 8]))
        case 2:
            data += bytes(1 + int(what * 100))
        case 3:
            path.unlink()
            return
        case _:
            data[place] ^= 1 + int(what * 255)
    path.write_bytes(data)


def test_damaged_files_are_refused(tmp_path):
    store = ReplayStore(tmp_path / "store")
    reference = store.write(filled())
    paths = sorted((tmp_path / "store").iterdir())
    for n, (which, where, what) in enumerate(uniform(1, 0, (300, 3))):
        path = paths[int(which * len(paths))]
        good = path.read_bytes()
        damage(path, n, where, what)
        if path.exists() and path.read_bytes() == good:
            continue
        with pytest.raises(FileFormatError, match=path.name):
            store.load(reference)
        path.write_bytes(good)
    store.load(reference)


def test_two_swapped_files_are_refused(tmp_path):
    store = ReplayStore(tmp_path)
    reference = store.write(filled())
    one, other = sorted(tmp_path.glob("rows-*-8-*"))[:2]
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1])
    other.write_bytes(data[0])
    with pytest.raises(FileFormatError, match="checksum"):
        store.load(reference)


def set_in(path, value):
    def change(reference):
        *to, last = path
        inner = reference
        for key in to:
            inner = inner[key]
        if value is KeyError:
            del inner[last]
        else:
            inner[last] = value

    return change


ROWS, LATENTS = ("chunks", "rows", "files"), ("chunks", "latents", "files")
INVALID = {
    "another format": set_in(["format"], "x"),
    "another version": set_in(["version"], 2),
    "no chunks": set_in(["chunks"], KeyError),
    "chunks a text": set_in(["chunks"], "rows"),
    "files a number": set_in(ROWS, 3),
    "file a text": set_in([*ROWS, 0], "../../etc/passwd"),
    "checksum that leaves the folder": set_in([*ROWS, 0, "sha256"], "../" * 20 + "abcd"),
    "checksum too short": set_in([*ROWS, 0, "sha256"], "0" * 16),
    "checksum of another": set_in([*ROWS, 1, "sha256"], "0" * 64),
    "checksum a number": set_in([*ROWS, 0, "sha256"], 3),
    "row numbers of text": set_in([*ROWS, 0, "first"], "0/../.."),
    "negative rows": set_in([*ROWS, 0, "rows"], -8),
    "endless rows": set_in([*ROWS, 0, "rows"], 2**200),
    "rows True": set_in([*ROWS, 0, "rows"], True),
    "rows a float": set_in([*ROWS, 0, "rows"], 8.0),
    "a file twice": lambda r: r["chunks"]["rows"]["files"].insert(1, r["chunks"]["rows"]["files"][0]),
    "a file missing": lambda r: r["chunks"]["rows"]["files"].pop(2),
    "first file missing": lambda r: r["chunks"]["rows"]["files"].pop(0),
    "last file missing": lambda r: r["chunks"]["rows"]["files"].pop(),
    "no files": set_in(ROWS, []),
    "no latent files": set_in(LATENTS, []),
    "no latents": set_in(["latents"], {}),
    "files but no rows": set_in(["next_row"], 15),
    "block rows of three": set_in(["chunks", "rows", "block_rows"], 3),
    "block rows of nothing": set_in(["chunks", "rows", "block_rows"], 0),
    "block rows endless": set_in(["chunks", "rows", "block_rows"], 2**40),
    "block rows of text": set_in(["chunks", "latents", "block_rows"], "32"),
    "more rows": set_in(["next_row"], 10**15),
    "fewer rows": set_in(["next_row"], 59),
    "rows from before": set_in(["first_row"], 3),
    "capacity below the rows": set_in(["capacity"], 10),
    "capacity of text": set_in(["capacity"], "45"),
    "declared by position": set_in(["declared"], [1]),
    "declared too much": set_in(["declared", "capacity"], 45),
    "rows but no schema": set_in(["schema"], None),
    "schema of text": set_in(["schema"], "x"),
    "schema of objects": set_in(["schema", "obs", 0], ["image", [3, 2, 1], "object"]),
    "schema huge": set_in(["schema", "obs", 0], ["image", [2**39], "uint8"]),
    "schema narrower": set_in(["schema", "obs", 0], ["image", [3, 2, 2], "uint8"]),
    "schema of another kind": set_in(["schema", "obs", 0], ["image", [3, 2, 1], "float32"]),
    "action index out of range": set_in(["schema", "actions", 0], ["", "discrete", 1, True]),
    "latents huge": set_in(["latents", "deter"], [10**11]),
    "latents of text": set_in(["latents", "deter"], "22"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_references_are_refused_without_allocating_memory(name, tmp_path):
    store = ReplayStore(tmp_path)
    reference = copy.deepcopy(store.write(filled()))
    INVALID[name](reference)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="replay"):
            store.load(reference)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_invalid_rows_are_refused_even_if_their_checksum_is_right(tmp_path):
    """A chunk file whose writer did not validate its rows."""
    for column, value in (("rewards", np.nan), ("actions", 7), ("flags", 6), ("obs/vector", np.inf)):
        buffer = filled()
        buffer.content().rows.put(column, np.array([30]), np.array([value]))
        reference = ReplayStore(tmp_path).write(buffer)
        with pytest.raises(FileFormatError, match="makes no sense"):
            ReplayStore(tmp_path).load(reference)


def test_a_folder_or_pipe_in_place_of_a_file_is_refused_without_blocking(tmp_path):
    store = ReplayStore(tmp_path)
    reference = store.write(filled())
    for make in (Path.mkdir, os.mkfifo):
        path = next(tmp_path.glob("rows-*-8-*"))
        data = path.read_bytes()
        path.unlink()
        make(path)
        with pytest.raises(FileFormatError, match="damaged"):
            store.load(reference)
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(data)
