"""Readers of recorded datasets, on datasets small enough to write down."""

import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.errors import ConfigError, DataError, FileFormatError, MissingDependencyError
from worldloom.replay import from_hdf5, from_minari
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.datasets import flat_episodes

PLANE = spaces.Box(-np.inf, np.inf, (2,), np.float64)


def minari_dataset(action_space, actions, observation_space=PLANE, observations=None):
    episode = SimpleNamespace(
        id=7,
        observations=np.arange(6.0).reshape(3, 2) if observations is None else observations,
        actions=np.asarray(actions) if isinstance(actions, list) else actions,
        rewards=np.array([1.0, 2.0]),
        terminations=np.array([False, False]),
        truncations=np.array([False, True]),
    )
    return SimpleNamespace(
        observation_space=observation_space,
        action_space=action_space,
        iterate_episodes=lambda: iter([episode, episode]),
    )


def test_minari_scales_bounded_actions():
    space = spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)
    buffer = from_minari(minari_dataset(space, [[2.0, 0.25], [-1.0, 1.0]]))
    assert (buffer.num_episodes, len(buffer), buffer.capacity) == (2, 6, 6)
    first = next(buffer.episodes())
    np.testing.assert_allclose(first["actions"], [[1, -0.5], [-0.5, 1], [0, 0]])
    assert first["rewards"].tolist() == [0, 1, 2]
    assert not first["is_terminal"].any()


def test_minari_counts_discrete_actions_from_zero():
    buffer = from_minari(minari_dataset(spaces.Discrete(4, start=1), [1, 3]), capacity=100)
    assert (buffer.action_dim, buffer.capacity) == (4, 100)
    assert next(buffer.episodes())["actions"].argmax(axis=1)[:2].tolist() == [0, 2]


def test_minari_needs_bounds_of_actions():
    box = spaces.Box(-np.inf, np.inf, (1,))
    with pytest.raises(ConfigError, match="action_bounds"):
        from_minari(minari_dataset(box, [[0.5], [0.5]]))
    buffer = from_minari(minari_dataset(box, [[0.5], [-4.0]]), action_bounds=(-4, 4))
    np.testing.assert_allclose(next(buffer.episodes())["actions"], [[0.125], [-1], [0]])
    with pytest.raises(DataError, match=r"Episode 7 .*'action'\[0, 0\] is 3; its space says \[-1, 1\]"):
        from_minari(minari_dataset(box, [[3.0], [0.5]]), action_bounds=(-1, 1))


def test_minari_gives_a_fixed_action_the_value_zero():
    space = spaces.Box(np.array([-1.0, 3.0]), np.array([1.0, 3.0]), dtype=np.float64)
    first = next(from_minari(minari_dataset(space, [[0.5, 3.0], [1.0, 3.0]])).episodes())
    np.testing.assert_allclose(first["actions"], [[0.5, 0], [1, 0], [0, 0]])


def test_minari_spaces_of_all_kinds_are_translated_as_those_of_environments():
    observation_space = spaces.Dict(
        cell=spaces.Discrete(4, start=1),
        arm=spaces.Dict(pose=spaces.Box(-1, 1, (2, 2)), say=spaces.Text(4)),
        pair=spaces.Tuple([spaces.MultiBinary(2), spaces.Box(0, 255, (4, 4, 3), np.uint8)]),
    )
    observations = {
        "cell": np.array([1, 4, 2]),
        "arm": {"pose": np.arange(12.0).reshape(3, 2, 2) / 12, "say": ["a", "b", "c"]},
        "pair": (np.array([[0, 1], [1, 1], [0, 0]], np.int8), np.full((3, 4, 4, 3), 9, np.uint8)),
    }
    action_space = spaces.Dict(push=spaces.Box(-2, 2, (1, 2)), keys=spaces.MultiDiscrete([2, 3], start=[0, 5]))
    actions = {"push": np.array([[[2.0, 0]], [[-1, 1]]]), "keys": np.array([[0, 7], [1, 5]])}
    dataset = minari_dataset(action_space, actions, observation_space, observations)
    with pytest.raises(ConfigError, match=r"'arm/say'.*drop_keys=\['arm/say'\]"):
        from_minari(dataset)
    buffer = from_minari(dataset, drop_keys=["arm/say"])
    assert buffer.obs_shape == {"arm/pose": (4,), "cell": (4,), "pair/0": (2,), "pair/1": (4, 4, 3)}
    assert buffer.action_dim == {"keys0": 2, "keys1": 3, "push": 2}
    rows = next(buffer.episodes())
    assert rows["obs"]["cell"].argmax(-1).tolist() == [0, 3, 1]
    assert rows["obs"]["pair/1"].dtype == np.uint8
    np.testing.assert_allclose(rows["obs"]["arm/pose"][2], np.arange(8.0, 12) / 12, rtol=1e-6)
    assert rows["actions"]["keys1"][:2].argmax(-1).tolist() == [2, 0]
    np.testing.assert_allclose(rows["actions"]["push"], [[1, 0], [-0.5, 0.5], [0, 0]])


def test_minari_actions_become_one_if_asked_to():
    dataset = minari_dataset(spaces.MultiDiscrete([2, 3], start=[0, 5]), [[0, 7], [1, 5]])
    buffer = from_minari(dataset, join_actions=True)
    assert (buffer.action_dim, buffer.action_type) == (6, "discrete")
    assert next(buffer.episodes())["actions"][:2].argmax(-1).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("observation_space", "observations", "words"),
    [
        (PLANE, np.zeros((2, 2)), "2 observations and as many rewards"),
        (PLANE, np.zeros((4, 2)), r"has shape \(4, 2\); its space says \(3, 2\)"),
        (spaces.Discrete(3), np.array([0, 1, 3]), "holds 3, which is not in Discrete"),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), np.zeros((3, 4, 4, 3)), "float64.*integers from 0 to 255"),
        (spaces.Dict(a=PLANE), {"b": np.zeros((3, 2))}, "no 'a'"),
    ],
)
def test_minari_episodes_that_are_not_as_declared_are_refused(observation_space, observations, words):
    dataset = minari_dataset(spaces.Discrete(2), [0, 1], observation_space, observations)
    with pytest.raises(DataError, match=f"Episode 7 of the dataset cannot be read. .*{words}"):
        from_minari(dataset)


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_recorded_by_minari_is_read(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    class Talking(gym.Env):
        observation_space = spaces.Dict(
            {
                "arm": spaces.Dict(pose=spaces.Box(-1, 1, (2, 3)), mode=spaces.Discrete(3, start=1)),
                "say": spaces.Text(8),
            }
        )
        action_space = spaces.Tuple([spaces.Discrete(3, start=1), spaces.Box(-2, 2, (2,))])

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action):
            self.steps += 1
            return self.observation_space.sample(), float(self.steps), False, self.steps == 4, {}

    collector = minari.DataCollector(Talking(), record_infos=False)
    for _ in range(3):
        collector.reset()
        while not collector.step(collector.action_space.sample())[3]:
            pass
    collector.create_dataset(
        "tiny/talking-v0", author="a", author_email="a@b.c", code_permalink="x", algorithm_name="r"
    )
    buffer = from_minari("tiny/talking-v0", download=False, drop_keys=["say"])
    assert (buffer.num_episodes, len(buffer)) == (3, 15)
    assert buffer.obs_shape == {"arm/mode": (3,), "arm/pose": (6,)}
    assert buffer.action_dim == {"0": 3, "1": 2}
    assert next(buffer.episodes())["rewards"].tolist() == [0, 1, 2, 3, 4]


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
