"""Spaces as values: taken from environments and configs, to JSON and back."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from tiny_envs import Corridor, Steady, Walk, WalkPicture

from worldloom import get_config
from worldloom.envs import EnvSpaces, make_env
from worldloom.errors import ConfigError, DataError, FileFormatError
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.observations import ObservationSpec

SPACES = [
    spaces.Box(-np.inf, np.inf, (3,), np.float32),
    spaces.Box(np.float32([-0.1, -2, -np.inf]), np.float32([0.3, 1e-8, 7]), dtype=np.float32),
    spaces.Box(np.float64([0.1, -1 / 3]), np.float64([np.pi, np.inf]), dtype=np.float64),
    spaces.Box(0, 255, (64, 64, 3), np.uint8),
    spaces.Box(-(2**62) - 1, 2**62 + 1, (2,), np.int64),
    spaces.Box(-2, 4, (), np.float32),
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, 1]]),
    spaces.MultiBinary((2, 3)),
    spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Dict({"b": spaces.Box(0, 1, (2,))}))]),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_spaces_survive_json_exactly(space):
    text = json.dumps(EnvSpaces(space, spaces.Discrete(2)).to_json(), allow_nan=False)
    back = EnvSpaces.from_json(json.loads(text), "here")
    assert back.observation == space
    assert back.action == spaces.Discrete(2)
    if isinstance(space, spaces.Dict):
        assert list(back.observation.spaces) == list(space.spaces)
    if isinstance(space, spaces.Box):
        assert back.observation.low.tobytes() == space.low.tobytes()
        assert back.observation.dtype == space.dtype


@pytest.mark.parametrize("env", [Walk, WalkPicture, Corridor, Steady])
def test_environments_and_vectors_give_their_spaces(env):
    single = env()
    assert EnvSpaces.of_env(single) == (single.observation_space, single.action_space)
    with make_env(env, num_envs=2) as both:
        assert EnvSpaces.underneath(both) == (single.observation_space, single.action_space)
        seen = EnvSpaces.of_env(both)
        assert ObservationSpec(seen.observation).shape == both.obs_shape
        assert ObservationSpec(seen.observation).dtype == both.obs_dtype
        assert ActionSpec(seen.action).dim == both.action_dim
        assert ActionSpec(seen.action).type == both.action_type
        with pytest.raises(ConfigError, match="make_env returns"):
            EnvSpaces.of_env("Pendulum-v1")


def test_a_gymnasium_vector_gives_the_spaces_of_one_environment():
    vector = gym.vector.SyncVectorEnv([Steady] * 3)
    assert EnvSpaces.of_env(vector) == (Steady.observation_space, Steady.action_space)
    vector.close()


def test_a_config_gives_spaces_that_fit_it():
    shapes = {"b": (64, 64, 3), "a": (2,)}
    config = get_config("dreamerv3:tiny", obs_shape=shapes, action_dim={"x": 3, "y": 2}, action_type="discrete")
    own = EnvSpaces.of_config(config)
    own.check_fits(config)
    assert list(own.observation.spaces) == ["b", "a"]
    assert own.observation["b"].dtype == np.uint8
    assert EnvSpaces.of_config(config, float_images=True).observation["b"].dtype == np.float32
    other = get_config("tdmpc2:tiny", obs_shape=(3,), action_dim=2)
    assert EnvSpaces.of_config(other).action == spaces.Box(-1, 1, (2,), np.float32)
    with pytest.raises(ConfigError, match="obs_shape"):
        own.check_fits(other)


BOX = {"type": "Box", "shape": [2], "dtype": "float32", "low": -1, "high": 1}


@pytest.mark.parametrize(
    "value",
    [
        None, [], 3, {}, {"type": "Text"}, {"type": ["Box"]}, {**BOX, "shape": [10**6, 10**6]}, {**BOX, "shape": [-1]},
        {**BOX, "dtype": "object"}, {**BOX, "dtype": "U8"}, {**BOX, "dtype": 3}, {**BOX, "low": [1, 2, 3]},
        {**BOX, "low": []}, {**BOX, "low": None}, {**BOX, "low": "x"}, {**BOX, "low": {}}, {**BOX, "shape": "22"},
        {**BOX, "low": "nan"}, {"type": "Discrete", "n": 0, "start": 0}, {"type": "Discrete", "n": "5", "start": 0},
        {"type": "Discrete", "n": True, "start": 0}, {"type": "Discrete", "n": 1e400, "start": 0},
        {"type": "MultiDiscrete", "nvec": [0], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": "a", "start": [0], "dtype": "int64"},
        {"type": "MultiBinary", "shape": 1}, {"type": "Dict", "spaces": [["a"]]},
        {"type": "Dict", "spaces": [[1, BOX]]},
        {"type": "Dict", "spaces": BOX},
    ],
)  # fmt: skip
def test_values_that_describe_no_space_are_refused(value):
    with pytest.raises(FileFormatError, match=r"config\.json describes no observation and action space"):
        EnvSpaces.from_json({"observation": BOX, "action": value}, "config.json")


def test_dicts_nested_without_end_are_refused():
    value = BOX
    for _ in range(40):
        value = {"type": "Dict", "spaces": [["a", value]]}
    with pytest.raises(FileFormatError, match="nested"):
        EnvSpaces.from_json({"observation": value, "action": BOX}, "config.json")


def test_observations_with_missing_names_or_wrong_values_are_named():
    spec = ObservationSpec(WalkPicture.observation_space)
    good = WalkPicture()
    obs, _ = good.reset(seed=0)
    spec.check_finite(spec.flatten(obs))
    assert not spec.is_batch(obs)
    with pytest.raises(DataError, match=r"no 'body/position'.*\['parity'\]"):
        spec.flatten({**obs, "body": {"parity": 0}})
    with pytest.raises(DataError, match="dict"):
        ObservationSpec(Steady.observation_space).flatten(obs)
    for name, bad, message in [
        ("camera", obs["camera"] + 0.5, "integers from 0 to 255"),
        ("camera", obs["camera"].astype(int) + 256, "integers from 0 to 255"),
        ("body", {**obs["body"], "position": np.float32([np.nan, 0])}, "NaN"),
        ("body", {**obs["body"], "parity": 2}, "not in Discrete"),
        ("body", {**obs["body"], "parity": 0.5}, "not in Discrete"),
    ]:
        with pytest.raises(DataError, match=message):
            spec.check_finite(spec.flatten({**obs, name: bad}))
    # Whether floats mean 0–255 or 0–1 cannot be told from an image that is black: environments must return integers.
    floats = {**obs, "camera": obs["camera"].astype(np.float64)}
    with pytest.raises(DataError, match="integers from 0 to 255"):
        spec.flatten(floats)
    np.testing.assert_array_equal(spec.flatten(floats, any_dtype=True)["camera"], obs["camera"])
    np.testing.assert_array_equal(spec.flatten({**obs, "camera": obs["camera"].astype(int)})["camera"], obs["camera"])
