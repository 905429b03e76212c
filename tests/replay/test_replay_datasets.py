"""Readers of recorded datasets, on datasets small enough to write down."""

import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from worldloom.errors import DataError, FileFormatError, MissingDependencyError
from worldloom.replay import from_hdf5, from_minari
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.datasets import flat_episodes


def minari_dataset(space, actions):
    episode = SimpleNamespace(
        observations=np.arange(6.0).reshape(3, 2),
        actions=np.asarray(actions),
        rewards=np.array([1.0, 2.0]),
        terminations=np.array([False, False]),
        truncations=np.array([False, True]),
    )
    return SimpleNamespace(action_space=space, iterate_episodes=lambda: iter([episode, episode]))


def test_minari_scales_bounded_actions():
    space = gymnasium.spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)
    buffer = from_minari(minari_dataset(space, [[2.0, 0.25], [-1.0, 1.0]]))
    assert (buffer.num_episodes, len(buffer), buffer.capacity) == (2, 6, 6)
    first = next(buffer.episodes())
    np.testing.assert_allclose(first["actions"], [[1, -0.5], [-0.5, 1], [0, 0]])
    assert first["rewards"].tolist() == [0, 1, 2]
    assert not first["is_terminal"].any()


def test_minari_counts_discrete_actions_from_zero():
    buffer = from_minari(minari_dataset(gymnasium.spaces.Discrete(4, start=1), [1, 3]), capacity=100)
    assert (buffer.action_dim, buffer.capacity) == (4, 100)
    assert next(buffer.episodes())["actions"].argmax(axis=1)[:2].tolist() == [0, 2]


def test_minari_refuses_actions_it_cannot_scale():
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    assert len(from_minari(minari_dataset(box, [[0.5], [0.5]]))) == 6
    with pytest.raises(DataError, match="Scale"):
        from_minari(minari_dataset(box, [[3.0], [0.5]]))
    with pytest.raises(DataError, match="space"):
        from_minari(minari_dataset(gymnasium.spaces.MultiDiscrete([2, 2]), [[0, 0], [1, 1]]))


def flat(**more):
    return {
        "observations": np.arange(7.0)[:, None],
        "actions": np.linspace(-1, 1, 7)[:, None],
        "rewards": np.arange(10.0, 17.0),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 0, 1, 0, 0], bool),
        **more,
    }


def test_d4rl_with_next_observations_loses_nothing():
    file = flat(next_observations=np.arange(7.0)[:, None] + 0.5)
    first, second, third = ReplayBuffer.from_episodes(flat_episodes(file, "x")).episodes()
    assert first["obs"].ravel().tolist() == [0, 1, 2, 2.5]
    assert first["rewards"].tolist() == [0, 10, 11, 12]
    assert first["is_terminal"].tolist() == [False, False, False, True]
    assert second["obs"].ravel().tolist() == [3, 4, 4.5]
    assert not second["is_terminal"].any()
    assert third["obs"].ravel().tolist() == [5, 6, 6.5]


def test_d4rl_without_next_observations_leaves_out_the_last_step():
    first, second, third = ReplayBuffer.from_episodes(flat_episodes(flat(), "x")).episodes()
    assert first["obs"].ravel().tolist() == [0, 1, 2]
    assert first["rewards"].tolist() == [0, 10, 11]
    assert not first["is_terminal"].any()
    assert [len(second["obs"]), len(third["obs"])] == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"), [({"timeouts": None}, "no timeouts"), ({"rewards": np.zeros(3)}, "lengths")]
)
def test_d4rl_files_with_another_layout_are_refused(change, message):
    file = {k: v for k, v in flat(**change).items() if v is not None}
    with pytest.raises(FileFormatError, match=message):
        list(flat_episodes(file, "x"))


@pytest.mark.parametrize(("module", "read"), [("minari", from_minari), ("h5py", from_hdf5)])
def test_a_missing_package_names_its_extra(module, read, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"worldloom\[minari\]"):
        read("name")


def test_hdf5_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in flat().items():
            file[key] = value
    assert from_hdf5(path).num_episodes == 3
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match=r"x\.hdf5"):
        from_hdf5(path)
    with pytest.raises(FileNotFoundError):
        from_hdf5(tmp_path / "absent.hdf5")
