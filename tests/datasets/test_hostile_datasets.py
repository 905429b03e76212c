"""Damaged, hostile and unfit files are refused with a sentence, before much is read."""

import contextlib
import io
import json
import os
import pickle
import resource

import numpy as np
import pytest
from dataset_writers import (
    flat,
    multitask_arrays,
    recorded,
    write_dreamer_chunks,
    write_hdf5,
    write_lerobot,
    write_npz_folder,
    write_pt,
    write_sparse_pt,
)

import worldloom.data
from worldloom.errors import ConfigError, DataError, FileFormatError, WorldloomError
from worldloom.replay import ReplayBuffer, ReplayStore


def npz(path, **changes):
    arrays = {**flat(recorded()), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def pt(path, **changes):
    episodes = recorded(lengths=[8])
    return write_pt(path, {**multitask_arrays(episodes, [0] * 6), **changes})


def saved_replay(path):
    buffer = ReplayBuffer()
    for e in recorded():
        buffer.add_episode(e.obs, e.actions, e.rewards, terminated=e.terminated)
    ReplayStore(path / "replay").write(buffer)
    return path / "replay"


def every_format(path):
    """One file or folder of each format whose reader is installed, and a file in it."""
    made = [npz(path / "flat.npz"), pt(path / "chunk.pt"), write_npz_folder(path / "npz", recorded(), compressed=True)]
    made += [write_dreamer_chunks(path / "dreamer", recorded()), saved_replay(path)]
    for module, make in (
        ("h5py", lambda: write_hdf5(path / "flat.hdf5", recorded())),
        ("pyarrow", lambda: write_lerobot(path / "lerobot", recorded())),
    ):
        try:
            __import__(module)
        except ImportError:
            continue
        made.append(make())
    for place in made:
        files = [place] if place.is_file() else sorted(each for each in place.rglob("*") if each.is_file())
        for file in files[-2:]:
            yield place, file


def read_everything(place):
    dataset = worldloom.data.open(place)
    for episode in dataset.episodes():
        assert np.isfinite(episode["rewards"]).all()


def test_truncated_files_of_every_format_are_refused(tmp_path):
    for place, file in every_format(tmp_path):
        whole = file.read_bytes()
        for keep in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:keep])
            with pytest.raises(WorldloomError) as caught:
                read_everything(place)
            assert len(str(caught.value)) < 1000, file
        file.write_bytes(whole)
        read_everything(place)


def test_flipped_bytes_never_raise_anything_but_our_errors(tmp_path):
    rng = np.random.default_rng(0)
    for place, file in every_format(tmp_path):
        whole = file.read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            for position in rng.integers(0, len(whole), 3):
                damaged[position] = rng.integers(0, 256)
            file.write_bytes(damaged)
            with contextlib.suppress(WorldloomError):
                read_everything(place)
        file.write_bytes(whole)
        read_everything(place)  # The file itself is still read.


def unfit():
    flags = flat(recorded())["terminals"]
    yield "missing", {"rewards": None}, FileFormatError, "has no rewards; it holds observations"
    yield "no ends", {"terminals": None, "timeouts": None}, DataError, "Nothing says where the episodes"
    yield "lengths", {"rewards": np.zeros(3)}, DataError, "different lengths"
    yield "texts", {"rewards": np.array(["a"] * len(flags))}, DataError, "rewards has dtype <U1"
    yield "numbers as flags", {"terminals": flags * 7}, DataError, "one boolean"
    yield "complex", {"actions": flat(recorded())["actions"] * 1j}, DataError, "complex"
    nan = flat(recorded())["observations"].copy()
    nan[20] = np.nan
    yield "nan", {"observations": nan}, DataError, r"Row \d+ of episode \d of .*NaN"
    yield "range", {"actions": flat(recorded())["actions"] * 3}, DataError, r"lie in \[-1, 1\]"
    yield "empty", {name: array[:0] for name, array in flat(recorded()).items()}, DataError, "holds no episode"
    yield "shapes", {"next_observations": np.zeros((len(flags), 2))}, (DataError, FileFormatError), "shape"


@pytest.mark.parametrize(("changes", "error", "message"), [case[1:] for case in unfit()], ids=[c[0] for c in unfit()])
def test_unfit_arrays_are_refused_with_their_place(tmp_path, changes, error, message):
    path = npz(tmp_path / "flat.npz", **changes)
    with pytest.raises(error, match=message) as caught:
        read_everything(path)
    assert "flat.npz" in str(caught.value)


def test_unfit_tensors_are_refused(tmp_path):
    cases = {
        "holds no obs, action, reward": {"obs": None},
        "which are not of the same episodes": {"reward": np.zeros((6, 7), np.float32)},
        r"episodes \[E, T, …\] are expected": {"obs": np.zeros((6, 9), np.float32)},
        "must lie in|lie in": {"action": np.full((6, 9, 2), 2, np.float32)},
        "task holds": {"task": np.full((6, 9), -1, np.int32)},
        "NaN": {"reward": np.full((6, 9), np.nan, np.float32)},
    }
    for message, changes in cases.items():
        episodes = multitask_arrays(recorded(lengths=[8]), [0] * 6) | changes
        path = write_pt(tmp_path / "x.pt", {name: value for name, value in episodes.items() if value is not None})
        with pytest.raises((DataError, FileFormatError), match=message):
            read_everything(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("where", ["npz", "pt", "pt as numpy"])
def test_pickles_that_run_code_run_nothing(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    if where == "npz":
        path = npz(tmp_path / "x.npz", rewards=np.array([Evil()] * 3, object))
    else:
        out = io.BytesIO()
        pickle.dump({"obs": Evil()} if where == "pt" else Evil(), out, protocol=2)
        path = write_pt(tmp_path / "x.pt", multitask_arrays(recorded(lengths=[8]), [0] * 6), data_pkl=out.getvalue())
    with pytest.raises(FileFormatError):
        read_everything(path)
    assert not (tmp_path / "ran").exists()


def test_links_out_of_an_hdf5_file_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    other = write_hdf5(tmp_path / "other.hdf5", recorded())
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["observations"] = h5py.ExternalLink(str(other), "observations")
    with pytest.raises(FileFormatError, match="link to another file"):
        worldloom.data.open(tmp_path / "x.hdf5")
    with h5py.File(tmp_path / "y.hdf5", "w") as file:
        file["loop"] = h5py.SoftLink("/")
        file.create_dataset("observations", (4, 3), external=[(str(other), 0, 96)], dtype="f8")
    with pytest.raises(FileFormatError, match="stored in other files"):
        worldloom.data.open(tmp_path / "y.hdf5")


def test_arrays_larger_than_their_file_cost_nothing(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = write_sparse_pt(tmp_path / "big.pt", 4_000, 501, 24, 6, 30)
    with path.open("r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(FileFormatError):
        worldloom.data.open(path)
    path = tmp_path / "x.npz"
    np.savez(path, **flat(recorded()))
    raw = path.read_bytes().replace(b"'shape': (", b"'shape': (9", 1)
    path.write_bytes(raw)
    with pytest.raises(FileFormatError):
        worldloom.data.open(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_lerobot_of_other_versions_and_without_statistics_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    folder = write_lerobot(tmp_path / "x", recorded())
    (folder / "meta" / "stats.json").unlink()
    with pytest.raises(DataError, match="action_bounds"):
        worldloom.data.open(folder)
    assert worldloom.data.open(folder, action_bounds=(-1, 1)).action_dim == 2
    info = json.loads((folder / "meta" / "info.json").read_text())
    (folder / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(FileFormatError, match=r"v2\.0 to v3\.0"):
        worldloom.data.open(folder)


def test_what_is_no_dataset_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    cases = [
        (tmp_path / "missing", DataError, "does not exist"),
        (tmp_path, DataError, "not a dataset of a known format; it holds notes.txt"),
        (tmp_path / "notes.txt", DataError, "of no format that is read"),
        ("npzz:x", ConfigError, "There is no format 'npzz'. Did you mean 'npz'"),
        ("npz:", ConfigError, "names no path"),
        (f"npz:{tmp_path}", DataError, "holds no .npz files"),
        (f"replay:{tmp_path}", DataError, "holds no replay"),
        (f"dreamerv3:{tmp_path}", DataError, "holds no episode"),
    ]
    for spec, error, message in cases:
        with pytest.raises(error, match=message):
            worldloom.data.open(spec)
    with pytest.raises(ConfigError, match=r"action_bounds is not for \.npz files"):
        worldloom.data.open(npz(tmp_path / "x.npz"), action_bounds=(-1, 1))
    with pytest.raises(DataError, match="have shape"):
        worldloom.data.open(tmp_path / "x.npz", obs_shape=(4,))


def test_windows_longer_than_every_episode_are_refused(tmp_path):
    dataset = worldloom.data.open(npz(tmp_path / "x.npz"))
    with pytest.raises(DataError, match="A window needs 50 rows"):
        dataset.sample(2, 50)
