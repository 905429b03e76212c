"""Adding episodes: both layouts, dtypes, and everything that is refused before it is stored."""

import numpy as np
import pytest

from worldloom.errors import ConfigError, DataError
from worldloom.replay import ReplayBuffer


def gymnasium_episode(steps=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "obs": rng.normal(size=(steps + 1, 3)),
        "actions": rng.uniform(-1, 1, (steps, 2)),
        "rewards": rng.normal(size=steps),
    }


def content(buffer):
    """Everything observable of a buffer, as comparable bytes."""
    episodes = [
        {k: np.asarray(v).tobytes() for k, v in e.items() if not isinstance(v, dict)} for e in buffer.episodes()
    ]
    return repr(buffer), buffer.summary(), buffer.state_dict(), buffer.obs_shape, buffer.action_dim, episodes


def only_episode(buffer):
    (episode,) = buffer.episodes()
    return episode


def test_gymnasium_layout_becomes_rows_by_the_arrival_rule():
    buffer = ReplayBuffer()
    ids = buffer.add_episode([[1.0], [2.0], [3.0]], [[0.5], [-0.5]], [10.0, 20.0], terminated=True)
    row = only_episode(buffer)
    np.testing.assert_array_equal(row["obs"], [[1], [2], [3]])
    np.testing.assert_array_equal(row["actions"], [[0.5], [-0.5], [0]])
    np.testing.assert_array_equal(row["rewards"], [0, 10, 20])
    np.testing.assert_array_equal(row["is_first"], [True, False, False])
    np.testing.assert_array_equal(row["is_last"], [False, False, True])
    np.testing.assert_array_equal(row["is_terminal"], [False, False, True])
    np.testing.assert_array_equal(row["row_ids"], ids)
    assert row["obs"].dtype == row["actions"].dtype == row["rewards"].dtype == np.float32
    assert row["is_first"].dtype == bool
    assert row["row_ids"].dtype == np.int64


def test_both_layouts_agree():
    episode = gymnasium_episode()
    steps, rows = ReplayBuffer(), ReplayBuffer()
    steps.add_episode(**episode, terminated=True)
    rows.add_episode(
        episode["obs"],
        np.concatenate([episode["actions"], np.zeros((1, 2))]),
        np.concatenate([[0.0], episode["rewards"]]),
        np.arange(6) == 5,
    )
    assert content(steps) == content(rows)


def test_equal_lengths_are_stored_as_given():
    episode = gymnasium_episode(steps=6)
    buffer = ReplayBuffer()
    buffer.add_episode(episode["obs"][1:], episode["actions"], episode["rewards"], np.zeros(6), layout="arrival")
    row = only_episode(buffer)
    np.testing.assert_array_equal(row["actions"], episode["actions"].astype(np.float32))
    np.testing.assert_array_equal(row["rewards"], episode["rewards"].astype(np.float32))


@pytest.mark.parametrize(
    ("ends", "terminal"),
    [
        ({}, False),
        ({"dones": True}, True),
        ({"dones": False}, False),
        ({"dones": np.array([0.0, 0, 0, 0, 1])}, True),
        ({"dones": np.zeros(5, bool)}, False),
        ({"terminated": True}, True),
        ({"truncated": True}, False),
        ({"terminated": [False] * 5, "truncated": [False] * 4 + [True]}, False),
        ({"terminated": True, "truncated": True}, True),
        ({"dones": True, "truncated": True}, False),
        ({"dones": True, "truncated": False}, True),
        ({"dones": True, "terminated": False}, False),
        ({"dones": True, "terminated": True, "truncated": False}, True),
    ],
)
def test_only_termination_is_terminal_and_the_last_row_always_ends(ends, terminal):
    buffer = ReplayBuffer()
    buffer.add_episode(**gymnasium_episode(), **ends)
    row = only_episode(buffer)
    assert row["is_terminal"].tolist() == [False] * 5 + [terminal]
    assert row["is_last"].tolist() == [False] * 5 + [True]


def test_discrete_actions_from_integers_and_one_hots_agree():
    obs, rewards, index = np.zeros((4, 2)), np.zeros(3), np.array([2, 0, 1])
    integers, one_hots, booleans = ReplayBuffer(action_dim=3), ReplayBuffer(action_type="discrete"), ReplayBuffer()
    integers.add_episode(obs, index, rewards)
    one_hots.add_episode(obs, np.eye(3)[index], rewards)
    booleans.add_episode(obs, np.eye(3, dtype=bool)[index], rewards)
    expected = [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    for buffer in (integers, one_hots, booleans):
        np.testing.assert_array_equal(only_episode(buffer)["actions"], expected)
        assert (buffer.action_type, buffer.action_dim) == ("discrete", 3)


def test_undeclared_number_of_discrete_actions_grows_with_the_data():
    buffer = ReplayBuffer()
    with pytest.raises(DataError, match=r"actions\[0\] is -1; discrete actions count from 0"):
        buffer.add_episode(np.zeros((3, 2)), [-1, 1], np.zeros(2))
    buffer.add_episode(np.zeros((3, 2)), [0, 1], np.zeros(2))
    assert buffer.action_dim == 2
    buffer.add_episode(np.zeros((3, 2)), [0, 4], np.zeros(2))
    assert buffer.action_dim == 5
    assert buffer.sample(2, 3)["actions"].shape == (2, 3, 5)
    buffer.match(obs_shape=(2,), action_dim=6)
    assert buffer.sample(2, 3)["actions"].shape == (2, 3, 6)
    with pytest.raises(DataError, match=r"actions\[0\] is 6; with 6 discrete actions"):
        buffer.add_episode(np.zeros((3, 2)), [6, 4], np.zeros(2))


def test_dict_observations_and_actions_keep_the_declared_order():
    shapes = {"image": (4, 4, 3), "vector": (2,)}
    buffer = ReplayBuffer(
        obs_shape=shapes, action_dim={"move": 2, "aim": 3}, action_type={"move": "continuous", "aim": "discrete"}
    )
    buffer.add_episode(
        {"vector": np.ones((3, 2)), "image": np.full((3, 4, 4, 3), 7, np.uint8)},
        {"aim": [2, 1], "move": np.zeros((2, 2))},
        [0.0, 0.0],
    )
    batch = buffer.sample(2, 2)
    assert list(batch["obs"]) == ["image", "vector"]
    assert list(batch["actions"]) == ["move", "aim"]
    assert batch["obs"]["image"].shape == (2, 2, 4, 4, 3)
    assert batch["obs"]["image"].dtype == np.uint8
    assert batch["actions"]["aim"].shape == (2, 2, 3)
    assert buffer.obs_shape == shapes
    assert buffer.action_dim == {"move": 2, "aim": 3}


@pytest.mark.parametrize(
    ("given", "stored"), [(np.uint8, np.uint8), (np.float64, np.float32), (np.float16, np.float32)]
)
def test_images_stay_uint8_or_become_float32(given, stored):
    buffer = ReplayBuffer()
    buffer.add_episode(np.ones((3, 3, 8, 8), given), np.zeros((2, 1)), np.zeros(2))
    assert only_episode(buffer)["obs"].dtype == stored


def test_integer_vectors_become_float32():
    buffer = ReplayBuffer()
    buffer.add_episode(np.array([[1, 2], [3, 4]]), np.zeros((1, 1)), [1])
    assert only_episode(buffer)["obs"].dtype == np.float32


def test_stored_rows_are_copies():
    buffer, obs = ReplayBuffer(), np.zeros((3, 2), np.float32)
    buffer.add_episode(obs, np.zeros((2, 1)), np.zeros(2))
    obs[:] = 9
    only_episode(buffer)["obs"][:] = 8
    assert not only_episode(buffer)["obs"].any()


def test_tasks():
    buffer = ReplayBuffer()
    buffer.add_episode(**gymnasium_episode(), task=3)
    buffer.add_episode(**gymnasium_episode(), task=1)
    batch = buffer.sample(64, 4)
    assert batch["task"].shape == (64,)
    np.testing.assert_array_equal(batch["task"], np.where(batch["row_ids"][:, 0] < 6, 3, 1))
    with pytest.raises(DataError, match="task"):
        buffer.add_episode(**gymnasium_episode())


def change(**changes):
    return {**gymnasium_episode(), **changes}


def with_value(name, value):
    array = gymnasium_episode()[name].copy()
    array.flat[3] = value
    return change(**{name: array})


NAN, INF = float("nan"), float("inf")
BAD = {
    "obs shape": (change(obs=np.zeros((6, 4))), "shape"),
    "obs rank": (change(obs=np.zeros(6)), "time axis"),
    "obs dtype": (change(obs=np.full((6, 3), "a")), "dtype"),
    "obs object": (change(obs=np.full((6, 3), None)), "dtype"),
    "obs complex": (change(obs=np.zeros((6, 3), complex)), "dtype"),
    "obs ragged": (change(obs=[[1.0, 2.0, 3.0], [1.0]]), "not an array"),
    "obs nan": (with_value("obs", NAN), "NaN"),
    "obs inf": (with_value("obs", INF), "NaN or inf"),
    "obs beyond float32": (with_value("obs", 1e300), "float32"),
    "obs dict": (change(obs={"a": np.zeros((6, 3))}), "one array"),
    "obs empty dict": (change(obs={}), "named entries"),
    "obs number": (change(obs=3.0), "single number"),
    "action shape": (change(actions=np.zeros((5, 3))), "shape"),
    "action rank": (change(actions=np.zeros(5)), "shape"),
    "action integers": (change(actions=np.zeros(5, int)), r"\[n, 2\]"),
    "action nan": (with_value("actions", NAN), "NaN"),
    "action range": (with_value("actions", 1.5), r"actions\[1, 1\] is 1.5; .*Scale them"),
    "action just out": (with_value("actions", -1.00001), "Scale them"),
    "action dict": (change(actions={"a": np.zeros((5, 2))}), "one array"),
    "rewards rank": (change(rewards=np.zeros((5, 1))), r"rewards has shape \(5, 1\)"),
    "rewards nan": (with_value("rewards", NAN), "rewards holds NaN"),
    "rewards text": (change(rewards=["a"] * 5), "dtype"),
    "rewards length": (change(rewards=np.zeros(6)), "Lengths"),
    "lengths": (change(actions=np.zeros((4, 2))), "obs has 6 rows and actions 4"),
    "more actions than obs": (change(actions=np.zeros((7, 2))), "obs has 6 rows and actions 7"),
    "empty": (change(obs=np.zeros((0, 3)), actions=np.zeros((0, 2)), rewards=[]), r"0 row"),
    "one observation": (change(obs=np.zeros((1, 3)), actions=np.zeros((0, 2)), rewards=np.zeros(0)), r"1 row"),
    "one row": (change(obs=np.zeros((1, 3)), actions=np.zeros((1, 2)), rewards=[0.0]), r"1 row"),
    "dones length": (change(dones=np.zeros(6)), "Lengths"),
    "dones rank": (change(dones=np.zeros((5, 1))), "one boolean per step"),
    "dones values": (change(dones=np.full(5, 0.5)), "booleans"),
    "dones nan": (change(dones=np.full(5, NAN)), "booleans"),
    "dones text": (change(dones="yes"), "dtype"),
    "dones ragged": (change(dones=[[0], [0, 1]]), "not an array"),
    "done in the middle": (change(dones=[0, 1, 0, 0, 0]), "step 1 of 5, in the middle"),
    "terminal in the middle": (change(terminated=[True, False, False, False, True]), "terminated is True at step 0"),
    "timeout in the middle": (change(truncated=[0, 0, 0, 1, 0]), "truncated is True at step 3"),
    "dones against terminated": (change(dones=False, terminated=True), "their 'or'"),
    "dones against truncated": (change(dones=np.zeros(5), truncated=True), "their 'or'"),
    "dones without reason": (change(dones=True, terminated=False, truncated=False), "their 'or'"),
    "task": (change(task=2), "no task"),
    "task kind": (change(task=1.5), "integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_episodes_are_refused_and_leave_the_buffer_as_it_was(name):
    episode, message = BAD[name]
    buffer = ReplayBuffer(100)
    buffer.add_episode(**gymnasium_episode(seed=1))
    before = content(buffer)
    with pytest.raises(DataError, match=message):
        buffer.add_episode(**episode)
    assert content(buffer) == before
    buffer.add_episode(**gymnasium_episode(seed=2))
    assert len(buffer) == 12


@pytest.mark.parametrize(
    "name",
    [n for n in BAD if n not in ("obs shape", "obs dict", "action shape", "action integers", "action dict", "task")],
)
def test_a_bad_first_episode_leaves_the_buffer_empty_and_without_a_schema(name):
    buffer = ReplayBuffer()
    with pytest.raises(DataError):
        buffer.add_episode(**BAD[name][0])
    assert (len(buffer), buffer.obs_shape, buffer.action_dim) == (0, None, None)
    buffer.add_episode(np.zeros((3, 7)), [0, 1], np.zeros(2))
    assert (buffer.obs_shape, buffer.action_type) == ((7,), "discrete")


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 3], r"actions\[1\] is 3; with 3"),
        ([0, -1], r"actions\[1\] is -1"),
        ([0.0, 1.0], "integers"),
        ([True, False], "integers"),
        ([[1, 0], [0, 1]], r"one-hots \[n, 3\]"),
        ([[1, 0, 0], [0, 0, 0]], "not a one-hot"),
        ([[1, 0, 0], [1, 1, 0]], "not a one-hot"),
        ([[1, 0, 0], [0.5, 0.5, 0]], "not a one-hot"),
        ([[1, 0, 0], [0, NAN, 1]], "not a one-hot"),
        ([2**40, 0], "with 3"),
    ],
)
def test_bad_discrete_actions(actions, message):
    buffer = ReplayBuffer(action_dim=3, action_type="discrete")
    with pytest.raises(DataError, match=message):
        buffer.add_episode(np.zeros((3, 2)), actions, np.zeros(2))
    assert len(buffer) == 0


def test_a_stray_index_does_not_widen_actions_without_limit():
    buffer = ReplayBuffer()
    with pytest.raises(DataError, match="say action_dim"):
        buffer.add_episode(np.zeros((3, 2)), [0, 10**6], np.zeros(2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 8, 8, 3), np.int64), "dtype int64; give uint8"),
        (np.full((3, 8, 8, 3), 255.0), "Divide by 255"),
        (np.full((3, 8, 8, 3), -0.5), "floats are 0–1"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(DataError, match=message):
        ReplayBuffer().add_episode(images, np.zeros((2, 1)), np.zeros(2))


def test_image_dtypes_do_not_mix():
    buffer = ReplayBuffer()
    buffer.add_episode(np.zeros((3, 8, 8, 3), np.uint8), np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(DataError, match="stored as uint8"):
        buffer.add_episode(np.zeros((3, 8, 8, 3)), np.zeros((2, 1)), np.zeros(2))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"obs_shape": (4,)}, r"observations here have shape \(4,\)"),
        ({"obs_shape": {"image": (3,)}}, "a dict of image"),
        ({"action_dim": 5}, r"\[n, 5\]"),
        ({"action_dim": {"a": 2}}, "a dict of a"),
        ({"action_type": "discrete"}, "not a one-hot"),
        ({"action_type": {"a": "discrete"}}, "a dict of a"),
    ],
)
def test_the_first_episode_must_be_as_declared(described, message):
    with pytest.raises(DataError, match=message):
        ReplayBuffer(**described).add_episode(**gymnasium_episode())


@pytest.mark.parametrize(
    "described",
    [
        {"capacity": 0},
        {"capacity": -1},
        {"capacity": 1.5},
        {"capacity": True},
        {"obs_shape": ()},
        {"obs_shape": (0,)},
        {"obs_shape": 4},
        {"obs_shape": (2**30, 2**30)},
        {"action_dim": 0},
        {"action_type": "both"},
        {"latents": {"deter": ()}},
    ],
)
def test_bad_descriptions(described):
    with pytest.raises(ConfigError):
        ReplayBuffer(**described)


def test_match_names_both_sides():
    buffer = ReplayBuffer()
    with pytest.raises(DataError, match="empty"):
        buffer.match(obs_shape=(3,), action_dim=2)
    buffer.add_episode(**gymnasium_episode())
    buffer.match(obs_shape=(3,), action_dim=2, action_type="continuous")
    with pytest.raises(DataError, match=r"held have shape \(3,\); the model takes \(4,\)"):
        buffer.match(obs_shape=(4,), action_dim=2)
    with pytest.raises(DataError, match="2 continuous; the model takes 2 discrete"):
        buffer.match(obs_shape=(3,), action_dim=2, action_type="discrete")
    with pytest.raises(DataError, match="the model takes 3 continuous"):
        buffer.match(obs_shape=(3,), action_dim=3)
    with pytest.raises(DataError, match="one array"):
        buffer.match(obs_shape=(3,), action_dim={"a": 2})


def test_from_episodes_and_split():
    episodes = [gymnasium_episode(steps=3 + n, seed=n) for n in range(10)]
    buffer = ReplayBuffer.from_episodes(episodes)
    assert buffer.capacity == len(buffer) == sum(4 + n for n in range(10))
    train, held_out = buffer.split(0.3, seed=1)
    assert (train.num_episodes, held_out.num_episodes) == (7, 3)
    found = sorted([e["obs"].tobytes() for e in train.episodes()] + [e["obs"].tobytes() for e in held_out.episodes()])
    assert found == sorted(e["obs"].tobytes() for e in buffer.episodes())
    again = buffer.split(0.3, seed=1)[1]
    np.testing.assert_array_equal(held_out.episode_lengths, again.episode_lengths)
    assert [buffer.split(f)[1].num_episodes for f in (0.001, 0.999)] == [1, 9]
    with pytest.raises(DataError, match="cannot be split"):
        ReplayBuffer.from_episodes(episodes[:1]).split()
    with pytest.raises(ConfigError):
        buffer.split(1.5)


def test_repr_and_summary_describe_the_content():
    assert repr(ReplayBuffer(10)) == "ReplayBuffer(0 of 10 rows)"
    buffer = ReplayBuffer.from_episodes([gymnasium_episode(steps=n) for n in (2, 5)], 1_000)
    assert repr(buffer) == (
        "ReplayBuffer(9 of 1,000 rows; 2 episodes of 3–6 rows; obs (3,) float32; actions 2 continuous; 0.0 MB)"
    )
    facts = buffer.summary(sequence_length=4)
    assert (facts["episodes_too_short"], facts["rows_too_short"], facts["longest_episode"]) == (1, 3, 6)


def test_it_knows_whether_it_holds_terminal_rows():
    buffer = ReplayBuffer(10)
    assert not buffer.has_terminals
    obs, actions, rewards = np.zeros((4, 2)), np.zeros((3, 1)), np.zeros(3)
    buffer.add_episode(obs, actions, rewards, truncated=True)
    assert not buffer.has_terminals
    buffer.add_episode(obs, actions, rewards, terminated=True)
    assert buffer.has_terminals
    for _ in range(3):
        buffer.add_episode(obs, actions, rewards, truncated=True)
    assert not buffer.has_terminals  # The terminal row has left.
