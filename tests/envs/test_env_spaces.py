"""Translation between Gymnasium spaces and the arrays of agents."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.envs.backends.base import index_nested
from worldloom.errors import ConfigError, DataError
from worldloom.spaces import ACTION, named, unnamed
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.joined import JoinedActions
from worldloom.spaces.narrow import bound_actions, check_action_bounds, drop_entries, drop_observations
from worldloom.spaces.observations import ObservationSpec

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
        spaces.Text(3),
        spaces.Dict(inner=spaces.Text(3)),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Box(0, 1, (0,)),
        spaces.Box(0, 300, (4, 4, 3), np.float32),
        spaces.Box(0, 255, (2, 4, 4, 3), np.uint8),
        spaces.Dict({}),
    ],
)
def test_unsupported_observations_are_refused(space):
    with pytest.raises(ConfigError, match=r"ObservationWrapper|at least one|no number"):
        ObservationSpec(space)


def test_entries_of_tuples_are_named_by_their_numbers():
    space = spaces.Tuple([spaces.Box(-1, 1, (2, 2)), spaces.Dict(x=spaces.Tuple([spaces.Discrete(3)]))])
    spec = ObservationSpec(space)
    assert spec.shape == {"0": (4,), "1/x/0": (3,)}
    flat = spec.flatten((np.eye(2), {"x": (2,)}))
    np.testing.assert_array_equal(flat["0"], [1, 0, 0, 1])
    np.testing.assert_array_equal(flat["1/x/0"], [0, 0, 1])


def test_named_observations_are_left_out():
    space = spaces.Dict(
        arm=spaces.Dict(text=spaces.Text(9), pose=spaces.Box(-1, 1, (2,))),
        pair=spaces.Tuple([spaces.Text(3), spaces.Discrete(2)]),
        words=spaces.Dict(a=spaces.Text(3)),
    )
    with pytest.raises(ConfigError, match=r"Text \('arm/text'\).*--drop-keys arm/text"):
        ObservationSpec(space)
    keys = ("arm/text", "pair/0", "words")
    spec = ObservationSpec(drop_observations(space, keys))
    assert spec.shape == {"arm/pose": (2,), "pair/1": (2,)}
    obs = {"arm": {"text": "up", "pose": np.zeros(2)}, "pair": ("x", 1), "words": {"a": "b"}}
    left = drop_entries(obs, frozenset(keys))
    spec.check_keys(left)
    for observation in (left, obs):
        np.testing.assert_array_equal(spec.flatten(observation)["pair/1"], [0, 1])
    with pytest.raises(ConfigError, match=r"'arm/txet'.*Did you mean 'arm/text'"):
        drop_observations(space, ["arm/txet"])
    with pytest.raises(ConfigError, match="nothing"):
        drop_observations(space, ["arm", "pair", "words"])


@pytest.mark.parametrize(
    ("space", "value", "words"),
    [
        (spaces.Box(0, 255, (2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.float32), "float32.*integers from 0 to 255"),
        (spaces.Box(0, 255, (2, 2, 3), np.uint8), np.full((2, 2, 3), 300), "holds 300; .*integers from 0 to 255"),
        (spaces.Box(0, 255, (2, 2, 3), np.int32), np.full((2, 2, 3), -1), "holds -1; "),
        (spaces.Box(0, 1, (2, 2, 3)), np.full((2, 2, 3), 128.0), "holds 128; its space says floats from 0 to 1"),
        (spaces.Box(0, 255, (4,), np.uint8), np.full(4, 300), "holds 300"),
        (spaces.Box(0, 9, (4,), np.int64), np.full(4, 1.5), "holds 1.5; .*says integers"),
        (spaces.Discrete(4), 4, r"holds 4, which is not in Discrete\(4\)"),
        (spaces.Discrete(4), -1, "holds -1"),
        (spaces.Discrete(4), np.float64(1.5), "holds 1.5"),
        (spaces.Discrete(4), np.array([1]), r"shape \(1,\); its space says \(\)"),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 3]), "holds 3"),
        (spaces.MultiBinary(3), np.array([0, 5, 1]), "holds 5; its space says 0 or 1"),
        (spaces.MultiBinary(3), np.array([0, 0.5, 1]), "holds 0.5"),
        (spaces.Box(-1, 1, (2,)), ["a", "b"], "real numbers"),
        (spaces.Box(-1, 1, (2,)), [[1.0], [1.0, 2.0]], "no array of numbers"),
        (spaces.Box(-1, 1, (2,)), None, "None"),
        (spaces.Box(-1, 1, (2,)), np.zeros(2, complex), "complex"),
        (spaces.Tuple([spaces.Discrete(2)]), (), "no '0'"),
    ],
)
def test_values_that_would_be_translated_to_something_else_are_refused(space, value, words):
    with pytest.raises(DataError, match=words):
        ObservationSpec(space).flatten(value)


def test_entries_that_a_space_does_not_declare_are_named():
    spec = ObservationSpec(spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2)), c=spaces.Tuple([spaces.Discrete(2)])))
    spec.check_keys({"a": {"b": 0}, "c": (1,)})
    for obs, words in [
        ({"a": {"b": 0, "x": 1}, "c": (1,)}, "'a/x', which its space does not have"),
        ({"a": {"b": 0}, "c": (1, 2)}, "'c' is a tuple of 2 entries; its space is a tuple of 1"),
        ({"a": 3, "c": (1,)}, "'a' is 3"),
    ]:
        with pytest.raises(DataError, match=words):
            spec.check_keys(obs)


def test_an_observation_of_the_wrong_shape_is_refused():
    spec = ObservationSpec(spaces.Box(-1, 1, (3,)))
    with pytest.raises(DataError, match=r"shape \(1, 3\); its space says \(3,\)"):
        spec.flatten(np.zeros((1, 3)))


bounds = st.floats(-(2**18), 2**18, width=32)


@settings(deadline=None)
@given(low=bounds, span=st.floats(2**-10, 2**18, width=32), action=st.floats(-3, 3, width=32))
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


@pytest.mark.parametrize(
    ("low", "high"),
    [(-np.inf, np.inf), (5, np.inf), (-np.inf, 0), (-1e30, 1e30), (-1, 2e6), (-3.4028235e38, 3.4028235e38)],
)
def test_continuous_actions_without_two_usable_bounds_need_action_bounds(low, high):
    space = spaces.Dict(push=spaces.Box(np.float32([-1, low]), np.float32([1, high])))
    with pytest.raises(ConfigError, match=r"Entry 1 of the action 'push' .*--action-bounds -2 2"):
        ActionSpec(space)
    narrowed = bound_actions(space, (-4, 8))
    spec, ones = ActionSpec(narrowed), np.ones((1, 2))
    for sign, expected in ((-1, [-1, max(low, -4)]), (1, [1, min(high, 8)])):
        native = spec.to_env(spec.check({"push": sign * ones}, IGNORE_NONE))
        np.testing.assert_array_equal(native["push"][0], np.float32(expected))
        assert space.contains({"push": native["push"][0]})


def test_action_bounds_are_refused_where_they_mean_nothing():
    for bad in (3, (1, 1), (2, -2), (0, np.inf), (0, 1, 2), "ab", (None, 1), (True, 2)):
        with pytest.raises(ConfigError, match="action_bounds"):
            check_action_bounds(bad)
    assert check_action_bounds(np.array([-1, 2])) == (-1.0, 2.0)
    with pytest.raises(ConfigError, match="continuous actions"):
        bound_actions(spaces.Discrete(3), (-1, 1))
    with pytest.raises(ConfigError, match=r"nothing of the action 'a', which lies in \[5, 6\]"):
        bound_actions(spaces.Dict(a=spaces.Box(5, 6, (2,))), (-1, 1))


spaces_of_actions = st.sampled_from(
    [
        spaces.Box(np.float32([-2, 0, 3]), np.float32([4, 1e6, 3])),
        spaces.Box(-3, 9, (2, 2), np.int64),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Box(np.array([-1e-3, 2.0]), np.array([1e-3, 2.5]), dtype=np.float64),
        spaces.Discrete(4, start=-2),
        spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [5, 0]]),
        spaces.MultiBinary((2, 2)),
        spaces.Tuple([spaces.Box(-2, 1, (2,)), spaces.MultiDiscrete([2, 3]), spaces.Tuple([spaces.Discrete(2)])]),
        spaces.Dict(
            {
                "b/c": spaces.Discrete(3),
                "a": spaces.Tuple([spaces.Box(0, 5, (1,), np.int32)]),
                "7": spaces.MultiBinary(2),
            }
        ),
    ]
)


@settings(deadline=None)
@given(space=spaces_of_actions, seed=st.integers(0, 2**30), scale=st.floats(0.1, 5))
def test_what_is_checked_is_what_is_executed_and_read_back_from_recordings(space, seed, scale):
    spec, rng, ignore_none = ActionSpec(space), np.random.default_rng(seed), np.zeros(4, bool)
    wild = spec.sample(rng, 4)
    wild = {k: v * scale if v.dtype.kind == "f" else v for k, v in named(wild, ACTION).items()}
    executed = spec.check(unnamed(wild, spec.is_dict), ignore_none)
    native = spec.to_env(executed)
    for i in range(4):
        assert space.contains(index_nested(native, i))
    again = spec.check(spec.unwrap(executed), ignore_none)
    read = named(spec.from_env(native, 4), ACTION)
    for name, value in executed.items():
        np.testing.assert_array_equal(again[name], value)
        np.testing.assert_allclose(read[name], value, atol=2e-6)
        assert np.abs(value).max() <= 1 or value.dtype.kind == "i"


@settings(deadline=None)
@given(space=spaces_of_actions, seed=st.integers(0, 2**30))
def test_recorded_actions_are_taken_again_as_they_were(space, seed):
    spec = ActionSpec(space)
    space.seed(seed)
    recorded = _stack([space.sample() for _ in range(3)])
    read = spec.from_env(recorded, 3)
    native = spec.to_env(spec.check(read, np.zeros(3, bool)))
    for one, other in zip(_flat(native), _flat(recorded), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=0.1 if one.max(initial=0) > 1e4 else 1e-5)


def _stack(values):
    first = values[0]
    if isinstance(first, dict):
        return {key: _stack([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stack(list(entries)) for entries in zip(*values, strict=True))
    return np.stack([np.asarray(value) for value in values])


def _flat(value):
    if isinstance(value, dict | tuple):
        return [each for inner in (value.values() if isinstance(value, dict) else value) for each in _flat(inner)]
    return [value]


@settings(deadline=None)
@given(
    space=st.sampled_from(
        [
            spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [5, 0]]),
            spaces.MultiBinary((2, 2)),
            spaces.Dict(
                {"b": spaces.Discrete(3, start=-1), "a": spaces.Tuple([spaces.MultiBinary(2), spaces.Discrete(2)])}
            ),
            spaces.Tuple([spaces.Box(-2, 1, (2, 2)), spaces.Dict(x=spaces.Box(0, 9, (1,), np.float64))]),
            spaces.Tuple([spaces.Box(-2, 1, (2,), np.int32), spaces.Box(0, 9, (1,), np.uint8)]),
            spaces.Box(-2, 1, (2,)),
            spaces.Discrete(5, start=2),
        ]
    ),
    seed=st.integers(0, 2**30),
)
def test_several_actions_become_one_and_are_split_again(space, seed):
    joined = JoinedActions(space)
    spec = ActionSpec(joined.space)
    assert not spec.is_dict
    space.seed(seed)
    recorded = _stack([space.sample() for _ in range(5)])
    agent = joined.join(recorded, 5)
    executed = spec.check(agent, np.zeros(5, bool))
    again = joined.split(spec.to_env(executed))
    for one, other in zip(_flat(again), _flat(recorded), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert one.dtype == other.dtype


def test_actions_that_have_no_one_action_in_their_place_are_refused():
    for space in (
        spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(2)),
        spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(0, 9, (2,), np.int64)),
        spaces.Dict({}),
    ):
        with pytest.raises(ConfigError, match="there is none in place of"):
            JoinedActions(space)
    with pytest.raises(ConfigError, match="have 8,192, more than 4,096"):
        JoinedActions(spaces.MultiBinary(13))


def test_recorded_actions_outside_of_their_space_are_refused():
    for space, value, words in [
        (spaces.Box(-2, 2, (1,)), [[2.1]], r"'action'\[0, 0\] is 2.1; its space says \[-2, 2\]"),
        (spaces.Box(-2, 2, (1,)), [[np.nan]], "is nan"),
        (spaces.Box(3, 3, (1,)), [[2.0]], "is 2"),
        (spaces.Discrete(3, start=1), [0], "holds 0, which is not in Discrete"),
        (spaces.MultiDiscrete([2, 3]), [[1, 3]], "holds 3"),
        (spaces.MultiBinary(2), [[0, 5]], "holds 5"),
        (spaces.Discrete(3), [1.5], "holds 1.5"),
        (spaces.Discrete(3), [[1]], r"shape \(1, 1\)"),
        (spaces.Dict(a=spaces.Discrete(3)), {"b": [1]}, "no 'a'"),
        (spaces.Tuple([spaces.Discrete(3)]), (["x"],), "real numbers"),
    ]:
        with pytest.raises(DataError, match=words):
            ActionSpec(space).from_env(value, 1)


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
        spaces.Tuple([]),
        spaces.Text(3),
        spaces.Dict({}),
        spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)}), "a/b": spaces.Discrete(2)}),
        spaces.Dict({"keys": spaces.MultiBinary(2), "keys0": spaces.Discrete(2)}),
    ],
)
def test_unsupported_actions_are_refused(space):
    with pytest.raises(ConfigError, match=r"wrapper|Wrapper|at least one"):
        ActionSpec(space)
