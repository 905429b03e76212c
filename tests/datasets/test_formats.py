"""Every format is read to the rows that a buffer of the same episodes holds."""

import logging

import numpy as np
import pytest
from dataset_writers import (
    flat,
    multitask_arrays,
    recorded,
    write_dreamer_chunks,
    write_hdf5,
    write_lerobot,
    write_minari,
    write_npz_folder,
    write_pt,
)
from trees import assert_same

import worldloom.data
from worldloom.replay import ReplayBuffer, ReplayStore


def buffer_of(episodes, tasks=None):
    buffer = ReplayBuffer()
    for number, e in enumerate(episodes):
        task = None if tasks is None else tasks[number]
        buffer.add_episode(e.obs, e.actions, e.rewards, terminated=e.terminated, task=task)
    return buffer


def assert_same_batches(dataset, buffer):
    """The same shapes, episodes, and batches drawn with the same seed."""
    assert (dataset.obs_shape, dataset.action_dim) == (buffer.obs_shape, buffer.action_dim)
    assert (dataset.action_type, dataset.has_terminals) == (buffer.action_type, buffer.has_terminals)
    assert len(dataset) == len(buffer)
    np.testing.assert_array_equal(dataset.episode_lengths, buffer.episode_lengths)
    for one, other in zip(dataset.episodes(), buffer.episodes(), strict=True):
        one.pop("row_ids"), other.pop("row_ids")
        assert_same(one, other)
    for cross in (False, True):
        for update in range(3):
            drawn = [each.sample(16, 4, seed=1, update=update, cross_episodes=cross) for each in (dataset, buffer)]
            assert_same(*drawn)


@pytest.mark.parametrize("options", [{}, {"chunks": (5,), "compression": "gzip"}])
def test_hdf5_of_d4rl_is_read_contiguous_or_in_chunks(tmp_path, options):
    pytest.importorskip("h5py")
    episodes = recorded()
    if options:
        options = {"compression": "gzip", "chunks": True}
    path = write_hdf5(tmp_path / "hopper.hdf5", episodes, **options)
    assert_same_batches(worldloom.data.open(path), buffer_of(episodes))


def test_hdf5_without_next_observations_loses_the_last_step_of_each_episode(tmp_path, caplog):
    pytest.importorskip("h5py")
    episodes = recorded()
    path = write_hdf5(tmp_path / "hopper.hdf5", episodes, next_obs=False)
    with caplog.at_level(logging.WARNING, "worldloom"):
        dataset = worldloom.data.open(path)
    assert "the last action of each of 6 episodes is left out" in caplog.text
    shorter = [e._replace(obs=e.obs[:-1], actions=e.actions[:-1], rewards=e.rewards[:-1], terminated=False)
               for e in episodes]  # fmt: skip
    assert_same_batches(dataset, buffer_of(shorter))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_folder_of_npz_files_is_read_mapped_or_compressed(tmp_path, compressed):
    episodes = recorded()
    folder = write_npz_folder(tmp_path / "episodes", episodes, compressed=compressed)
    dataset = worldloom.data.open(folder)
    assert (dataset.kind, len(dataset.parts)) == ("npz", 3)
    assert_same_batches(dataset, buffer_of(episodes))


def test_discrete_actions_are_counted_or_declared(tmp_path):
    episodes = recorded(discrete=True)
    folder = write_npz_folder(tmp_path / "episodes", episodes)
    dataset = worldloom.data.open(folder)
    assert_same_batches(dataset, buffer_of(episodes))
    declared = worldloom.data.open(folder, action_dim=6)
    assert (declared.action_dim, declared.sample(2, 3)["actions"].shape) == (6, (2, 3, 6))


def test_rewards_and_flags_of_one_column_are_read_too(tmp_path):
    episodes = recorded()
    arrays = flat(episodes)
    for name in ("rewards", "terminals", "timeouts"):
        arrays[name] = arrays[name][:, None].astype(np.float64)
    np.savez(tmp_path / "x.npz", **arrays)
    assert_same_batches(worldloom.data.open(tmp_path / "x.npz"), buffer_of(episodes))


def test_observations_by_name_stay_by_name(tmp_path):
    episodes = recorded()
    arrays = flat(episodes)
    for key in ("observations", "next_observations"):
        vector = arrays.pop(key)
        arrays |= {f"{key}/pose": vector[:, :2], f"{key}/speed": vector[:, 2]}
    np.savez(tmp_path / "x.npz", **arrays)
    buffer = ReplayBuffer()
    for e in episodes:
        obs = {"pose": e.obs[:, :2], "speed": e.obs[:, 2:]}
        buffer.add_episode(obs, e.actions, e.rewards, terminated=e.terminated)
    dataset, batch = worldloom.data.open(tmp_path / "x.npz"), buffer.sample(8, 3)
    assert dataset.obs_shape == buffer.obs_shape
    assert_same(dataset.sample(8, 3)["obs"], batch["obs"])


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_minari_is_read_from_its_store_and_from_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = recorded()
    folder = write_minari(tmp_path, episodes)
    for spec in ("minari:test/made-v0", folder):
        assert_same_batches(worldloom.data.open(spec), buffer_of(episodes))


@pytest.mark.parametrize("plain", [False, True])
def test_mt30_files_are_read_without_pytorch(tmp_path, plain):
    episodes, tasks = recorded(lengths=[8]), [3, 0, 1, 2, 0, 3]
    episodes = [e._replace(terminated=False) for e in episodes]
    for half in range(2):
        mine = slice(3 * half, 3 * half + 3)
        write_pt(tmp_path / f"chunk_{half}.pt", multitask_arrays(episodes[mine], tasks[mine]), plain=plain)
    dataset = worldloom.data.open(tmp_path)
    assert (dataset.kind, dataset.has_task) == ("tdmpc2", True)
    assert_same_batches(dataset, buffer_of(episodes, tasks))


def test_chunks_of_dreamerv3_are_chained_by_their_names(tmp_path):
    episodes = recorded()
    dataset = worldloom.data.open(write_dreamer_chunks(tmp_path / "replay", episodes))
    assert (dataset.kind, len(dataset.parts)) == ("dreamerv3", 2)
    assert_same_batches(dataset, buffer_of([*episodes[::2], *episodes[1::2]]))


def test_a_lost_chunk_of_dreamerv3_cuts_the_episode_it_held(tmp_path):
    folder = write_dreamer_chunks(tmp_path / "replay", recorded(), streams=1)
    sorted(folder.iterdir())[2].unlink()
    dataset = worldloom.data.open(folder)
    assert len(dataset.parts) == 2
    assert all(np.isfinite(episode["rewards"]).all() for episode in dataset.episodes())


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_is_read_with_actions_scaled_by_its_statistics(tmp_path, version, caplog):
    pytest.importorskip("pyarrow")
    episodes = recorded()
    with caplog.at_level(logging.INFO, "worldloom"):
        dataset = worldloom.data.open(write_lerobot(tmp_path / "so100", episodes, version=version, scale=4.0))
    assert "observation.images.top" in caplog.text
    assert "scaled to [-1, 1]" in caplog.text
    shorter = [e._replace(obs=e.obs[:-1], actions=e.actions[:-1], rewards=e.rewards[:-1], terminated=False)
               for e in episodes]  # fmt: skip
    buffer = buffer_of(shorter)
    for one, other in zip(dataset.episodes(), buffer.episodes(), strict=True):
        np.testing.assert_array_equal(one["obs"], other["obs"])
        np.testing.assert_array_equal(one["rewards"], other["rewards"])
        np.testing.assert_allclose(one["actions"], other["actions"], atol=1e-6)


def test_lerobot_without_rewards_says_so(tmp_path, caplog):
    pytest.importorskip("pyarrow")
    with caplog.at_level(logging.WARNING, "worldloom"):
        dataset = worldloom.data.open(write_lerobot(tmp_path / "so100", recorded(), rewards=False))
    assert "records no rewards" in caplog.text
    assert not dataset.sample(4, 3)["rewards"].any()


def test_the_replay_of_a_run_is_read_from_its_chunk_files(tmp_path):
    buffer = ReplayBuffer()
    rng = np.random.default_rng(0)
    for step in range(40):
        first, last = np.array([step % 10 == 0] * 2), np.array([step % 10 == 9, step in (19, 39)])
        first[1] = step in (0, 20)
        rewards = np.where(first, 0, rng.normal(size=2))
        actions = np.where(last[:, None], 0, rng.uniform(-1, 1, (2, 1)))
        terminal = last & np.array([True, False])
        buffer.add_rows(rng.normal(size=(2, 3)), actions, rewards, first, last, terminal)
        if step in (12, 39):
            ReplayStore(tmp_path / "replay").write(buffer)
    dataset = worldloom.data.open(tmp_path)
    assert dataset.num_episodes == buffer.num_episodes
    for update in range(3):  # rows are numbered by episode here, in order of arrival there
        drawn = [each.sample(16, 4, update=update) for each in (dataset, buffer)]
        ids = [batch.pop("row_ids") for batch in drawn]
        assert ids[0].shape == ids[1].shape
        assert_same(*drawn)


def test_chunk_files_that_begin_with_evicted_rows_overlap(tmp_path):
    """A checkpoint writes the block in progress again, from the first row that is still held."""
    buffer, store = ReplayBuffer(60), ReplayStore(tmp_path / "replay")
    for number in range(10):
        rewards = np.arange(10.0) + 10 * number
        buffer.add_episode(np.zeros((11, 2)), np.zeros((10, 1)), rewards, truncated=True)
        if number in (4, 7, 9):
            store.write(buffer)
    dataset = worldloom.data.open(tmp_path)
    assert dataset.num_episodes == 10
    rewards = np.concatenate([episode["rewards"] for episode in dataset.episodes()])
    np.testing.assert_array_equal(np.sort(np.unique(rewards)), np.arange(100.0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8"])
def test_discrete_actions_of_any_integer_type_are_read(tmp_path, dtype):
    terminals = np.zeros(10, bool)
    terminals[[4, 9]] = True
    arrays = {"observations": np.zeros((10, 2), np.float32), "rewards": np.ones(10, np.float32)}
    arrays |= {"next_observations": arrays["observations"], "terminals": terminals}
    np.savez(tmp_path / "data.npz", actions=(np.arange(10) % 4).astype(dtype), **arrays)
    dataset = worldloom.data.open(tmp_path / "data.npz")
    assert sum(len(episode["rewards"]) for episode in dataset.episodes()) == len(dataset)
    assert dataset.action_dim == 4


def test_a_saved_buffer_is_read(tmp_path):
    buffer = buffer_of(recorded(), tasks=[0, 1, 0, 1, 0, 1])
    buffer.save(tmp_path / "saved.npz")
    dataset = worldloom.data.open(tmp_path / "saved.npz")
    assert dataset.kind == "replay"
    assert_same_batches(dataset, buffer)


def test_a_dataset_becomes_a_buffer_with_the_same_batches(tmp_path):
    episodes = recorded()
    dataset = worldloom.data.open(write_npz_folder(tmp_path / "episodes", episodes))
    assert_same_batches(dataset, dataset.to_buffer())


def test_a_split_holds_out_whole_episodes(tmp_path):
    episodes = recorded(count=10)
    dataset = worldloom.data.open(write_npz_folder(tmp_path / "episodes", episodes))
    training, held_out = dataset.split(0.3, seed=4)
    expected = buffer_of(episodes).split(0.3, seed=4)
    for part, same in zip((training, held_out), expected, strict=True):
        assert_same_batches(part, same)
    assert training.split(0.5)[1].num_episodes == 4
