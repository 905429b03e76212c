"""Translation between Gymnasium spaces and the arrays of agents."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from worldloom.envs.actions import ActionSpec
from worldloom.envs.observations import ObservationSpec
from worldloom.errors import ConfigError, DataError

IGNORE_NONE = np.zeros(1, bool)


def to_env(space, action, ignore=IGNORE_NONE):
    spec = ActionSpec(space)
    return spec.to_env(spec.check(action, ignore))


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Box(-1, 1, (3,), np.float64), (3,), np.float32),
        (spaces.Box(-1, 1, (2, 3), np.float32), (6,), np.float32),
        (spaces.Box(-1, 1, (), np.float32), (1,), np.float32),
        (spaces.Box(0, 9, (4,), np.int64), (4,), np.float32),
        (spaces.Box(0, 255, (128,), np.uint8), (128,), np.float32),
        (spaces.Box(0, 255, (5, 6, 3), np.uint8), (5, 6, 3), np.uint8),
        (spaces.Box(0, 255, (5, 6), np.uint8), (5, 6, 1), np.uint8),
        (spaces.Box(0, 1, (5, 6), np.uint8), (30,), np.float32),
        (spaces.Box(0, 1, (5, 6, 2), np.float32), (5, 6, 2), np.float32),
        (spaces.Discrete(4, start=2), (4,), np.float32),
        (spaces.MultiDiscrete([2, 3]), (5,), np.float32),
        (spaces.MultiBinary(3), (3,), np.float32),
    ],
)
def test_observations_become_arrays_of_the_documented_shape_and_dtype(space, shape, dtype):
    spec = ObservationSpec(space)
    assert (spec.shape, spec.dtype) == (shape, dtype)
    space.seed(0)
    batch = [space.sample() for _ in range(5)]
    single = [spec.unwrap(spec.flatten(obs)) for obs in batch]
    stacked = spec.unwrap(spec.flatten(np.stack(batch), lead=(5,)))
    np.testing.assert_array_equal(np.stack(single), stacked)
    assert stacked.shape == (5, *shape)
    assert stacked.dtype == dtype


def test_discrete_observations_become_one_hots_and_boxes_are_flattened():
    one_hot = ObservationSpec(spaces.Discrete(4, start=2))
    np.testing.assert_array_equal(one_hot.flatten(np.int64(4))["obs"], [0, 0, 1, 0])
    pair = ObservationSpec(spaces.MultiDiscrete([2, 3]))
    np.testing.assert_array_equal(pair.flatten(np.array([1, 2]))["obs"], [0, 1, 0, 0, 1])
    vector = ObservationSpec(spaces.Box(-9, 9, (2, 2), np.float64))
    np.testing.assert_array_equal(vector.flatten(np.arange(4.0).reshape(2, 2))["obs"], [0, 1, 2, 3])


def test_names_in_nested_dicts_are_joined():
    space = spaces.Dict(
        z=spaces.Box(0, 255, (4, 4, 3), np.uint8), a=spaces.Dict(x=spaces.Discrete(2), b=spaces.Box(-1, 1, (3,)))
    )
    spec = ObservationSpec(space)
    assert list(spec.shape) == ["z", "a/x", "a/b"] or set(spec.shape) == {"z", "a/x", "a/b"}
    assert spec.shape == {"z": (4, 4, 3), "a/x": (2,), "a/b": (3,)}
    obs = space.sample()
    flat = spec.flatten(obs)
    np.testing.assert_array_equal(flat["z"], obs["z"])
    np.testing.assert_array_equal(flat["a/b"], obs["a"]["b"])


def test_observations_are_copies():
    image = np.zeros((4, 4, 3), np.uint8)
    flat = ObservationSpec(spaces.Box(0, 255, (4, 4, 3), np.uint8)).flatten(image)["obs"]
    image += 1
    assert not flat.any()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Dict(inner=spaces.Text(3)),
        spaces.Box(0, 300, (4, 4, 3), np.float32),
        spaces.Box(0, 255, (2, 4, 4, 3), np.uint8),
        spaces.Dict({}),
    ],
)
def test_unsupported_observations_are_refused(space):
    with pytest.raises(ConfigError, match=r"ObservationWrapper|at least one"):
        ObservationSpec(space)


def test_an_observation_of_the_wrong_shape_is_refused():
    spec = ObservationSpec(spaces.Box(-1, 1, (3,)))
    with pytest.raises(DataError, match=r"shape \(1, 3\); its space says \(3,\)"):
        spec.flatten(np.zeros((1, 3)))


bounds = st.floats(-(2**20), 2**20, width=32)


@given(low=bounds, span=st.floats(2**-10, 2**20, width=32), action=st.floats(-3, 3, width=32))
def test_continuous_actions_are_clipped_and_scaled_to_the_bounds(low, span, action):
    high = np.float32(low) + np.float32(span)
    space = spaces.Box(np.float32([low]), np.float32([high]))
    native = to_env(space, np.float32([[action]]))
    assert native.shape == (1, 1)
    assert native.dtype == np.float32
    assert space.contains(native[0])
    expected = low + (min(max(action, -1), 1) + 1) / 2 * (float(high) - low)
    np.testing.assert_allclose(native[0, 0], expected, rtol=1e-5, atol=1e-6 * (abs(low) + span))
    np.testing.assert_array_equal(to_env(space, [[-1.0]]), [space.low])
    np.testing.assert_array_equal(to_env(space, [[1.0]]), [space.high])


def test_dimensions_without_two_bounds_are_passed_through():
    largest = np.finfo(np.float32).max
    space = spaces.Box(np.float32([-np.inf, -2, 0, -largest]), np.float32([np.inf, 6, np.inf, largest]))
    np.testing.assert_array_equal(to_env(space, [[5.0, 0.5, -3.0, 7.0]]), np.float32([[5, 4, 0, 7]]))


def test_box_actions_keep_their_shape():
    native = to_env(spaces.Box(-2, 2, (2, 3)), np.linspace(-1, 1, 12).reshape(2, 6), np.zeros(2, bool))
    np.testing.assert_allclose(native, np.linspace(-2, 2, 12).reshape(2, 2, 3), rtol=1e-6)


def test_classes_and_one_hots_are_equivalent():
    space, ignore_none = spaces.Discrete(3, start=5), np.zeros(3, bool)
    for action in (np.array([2, 0, 1]), np.eye(3)[[2, 0, 1]], np.eye(3, dtype=np.float32)[[2, 0, 1]]):
        np.testing.assert_array_equal(to_env(space, action, ignore_none), [7, 5, 6])


def test_multi_discrete_and_dicts_have_a_key_per_dimension():
    spec = ActionSpec(spaces.MultiDiscrete([2, 3], start=[0, 1]))
    assert spec.dim == {"action0": 2, "action1": 3}
    assert spec.type == {"action0": "discrete", "action1": "discrete"}
    native = spec.to_env(spec.check({"action1": np.array([2]), "action0": np.eye(2)[[1]]}, IGNORE_NONE))
    np.testing.assert_array_equal(native, [[1, 3]])

    space = spaces.Dict(
        arm=spaces.Dict(push=spaces.Box(-2, 2, (2,)), grip=spaces.Discrete(2)), keys=spaces.MultiBinary(2)
    )
    spec = ActionSpec(space)
    assert spec.dim == {"arm/push": 2, "arm/grip": 2, "keys0": 2, "keys1": 2}
    assert spec.type["arm/push"] == "continuous"
    action = {"arm/push": [[1.0, -1.0]], "arm/grip": [1], "keys0": [0], "keys1": [1]}
    native = spec.to_env(spec.check({name: np.array(value) for name, value in action.items()}, IGNORE_NONE))
    single = {"arm": {"push": native["arm"]["push"][0], "grip": native["arm"]["grip"][0]}, "keys": native["keys"][0]}
    assert space.contains(single)
    np.testing.assert_array_equal(single["arm"]["push"], [2, -2])
    np.testing.assert_array_equal(single["keys"], [0, 1])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 3, (2,)),
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict(a=spaces.Box(-1, 3, (2,)), b=spaces.Discrete(3)),
    ],
)
def test_random_actions_are_valid_and_ignored_ones_may_be_anything(space):
    spec = ActionSpec(space)
    rng = np.random.default_rng(0)
    actions = spec.sample(rng, 3)
    spec.check(actions, np.zeros(3, bool))
    for action in actions.values() if isinstance(actions, dict) else [actions]:
        action[1] = np.nan if action.dtype == np.float32 else 99
    with pytest.raises(DataError):
        spec.check(actions, np.zeros(3, bool))
    spec.check(actions, np.array([False, True, False]))


@pytest.mark.parametrize(
    ("space", "action", "words"),
    [
        (spaces.Box(-1, 1, (2,)), [0.0, 0.0], r"shape \(2,\); expected \(1, 2\) for 1 environments"),
        (spaces.Box(-1, 1, (1,)), [[np.inf]], "NaN or infinite for environments \\[0\\]"),
        (spaces.Discrete(3), [3], "class 3; there are 0 to 2"),
        (spaces.Discrete(3), [-1], "class -1"),
        (spaces.Discrete(3), [1.0], "dtype float64"),
        (spaces.Discrete(3), [[0, 0, 0]], "one-hot"),
        (spaces.Discrete(3), [[0, 0.5, 0.5]], "one-hot"),
        (spaces.MultiDiscrete([2, 3]), {"action0": [1]}, "keys \\['action0', 'action1'\\]"),
        (spaces.MultiDiscrete([2, 3]), [1, 2], "must be a dict"),
    ],
)
def test_invalid_actions_are_refused(space, action, words):
    with pytest.raises(DataError, match=words):
        to_env(space, action)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Box(0, 9, (2,), np.int64),
        spaces.Dict({}),
        spaces.Dict({"keys": spaces.MultiBinary(2), "keys0": spaces.Discrete(2)}),
    ],
)
def test_unsupported_actions_are_refused(space):
    with pytest.raises(ConfigError, match=r"wrapper|Wrapper|at least one"):
        ActionSpec(space)
