"""Which reward belongs to which observation: episodes of equal lengths, flat arrays of many episodes, their files."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.errors import ConfigError, DataError, FileFormatError
from worldloom.replay import ReplayBuffer

OBS, ACTIONS, REWARDS = np.arange(8.0).reshape(4, 2), np.linspace(-1, 1, 4)[:, None], np.array([1.0, 2, 3, 4])


def as_lists(value):
    return {name: as_lists(entry) for name, entry in value.items()} if isinstance(value, dict) else value.tolist()


def rows(buffer):
    return [as_lists(episode) for episode in buffer.episodes()]


def test_equal_lengths_with_a_first_reward_need_a_layout():
    buffer = ReplayBuffer()
    with pytest.raises(DataError, match=r"first reward is 1: say what.*'departure' if .* left out.*'arrival' if"):
        buffer.add_episode(OBS, ACTIONS, REWARDS)
    assert len(buffer) == 0
    buffer.add_episode(OBS, ACTIONS, [0.0, *REWARDS[1:]])
    assert rows(buffer)[0]["rewards"] == [0, 2, 3, 4]


def test_arrival_rows_are_stored_as_given():
    buffer = ReplayBuffer()
    buffer.add_episode(OBS, ACTIONS, REWARDS, terminated=True, layout="arrival")
    (episode,) = buffer.episodes()
    np.testing.assert_array_equal(episode["rewards"], REWARDS)
    np.testing.assert_allclose(episode["actions"], ACTIONS, rtol=1e-6)
    assert episode["is_terminal"].tolist() == [False, False, False, True]


def test_departure_rewards_move_to_the_row_they_lead_to_and_the_last_step_is_lost(caplog):
    buffer = ReplayBuffer()
    with caplog.at_level(logging.WARNING, logger="worldloom"):
        for _ in range(2):
            buffer.add_episode(OBS, ACTIONS, REWARDS, terminated=True, layout="departure")
    assert [record.message for record in caplog.records if "are left out" in record.message] == [
        "layout='departure': the observation after the last action is missing, so the last action of each episode, its "
        "reward and whether it terminated are left out. Give that observation too to keep them."
    ]
    for episode in buffer.episodes():
        np.testing.assert_array_equal(episode["obs"], OBS)
        assert episode["rewards"].tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(episode["actions"][:3], ACTIONS[:3], rtol=1e-6)
        assert episode["actions"][3].tolist() == [0]
        assert episode["is_last"].tolist() == [False, False, False, True]
        assert not episode["is_terminal"].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.sampled_from(["float", "integer", "one-hot", "dict"]), st.randoms(use_true_random=False))
def test_departure_is_gymnasiums_layout_without_the_last_step(steps, kind, random):
    draw = np.random.default_rng(random.randrange(2**32))
    index = np.concatenate([[2], draw.integers(0, 3, steps - 1)])
    actions = {"float": draw.uniform(-1, 1, (steps, 2)), "integer": index, "one-hot": np.eye(3)[index]}.get(kind)
    actions = {"a": draw.uniform(-1, 1, (steps, 2)), "b": index} if actions is None else actions
    cut = {k: v[:-1] for k, v in actions.items()} if isinstance(actions, dict) else actions[:-1]
    obs, rewards = draw.normal(size=(steps, 3)), draw.normal(size=steps)
    one, other = ReplayBuffer(), ReplayBuffer()
    one.add_episode(obs, actions, rewards, dones=True, layout="departure")
    other.add_episode(obs, cut, rewards[:-1], truncated=True)
    assert rows(one) == rows(other)


def test_a_layout_that_contradicts_the_lengths_is_refused():
    with pytest.raises(DataError, match="layout='arrival' needs as many rewards as observations, 4"):
        ReplayBuffer().add_episode(OBS, ACTIONS[1:], REWARDS[1:], layout="arrival")
    with pytest.raises(ConfigError, match="layout must be 'arrival' or 'departure', not 'row'"):
        ReplayBuffer().add_episode(OBS, ACTIONS, REWARDS, layout="row")
    buffer = ReplayBuffer()
    buffer.add_episode(OBS, ACTIONS[1:], REWARDS[1:], layout="departure")
    assert rows(buffer)[0]["rewards"] == [0, 2, 3, 4]


# ---- flat arrays --------------------------------------------------------------------------------------------------


FLAT = {
    "obs": np.arange(7.0)[:, None],
    "actions": np.linspace(-1, 1, 7)[:, None],
    "rewards": np.arange(10.0, 17.0),
    "terminals": np.array([0, 0, 1, 0, 0, 0, 0], bool),
    "timeouts": np.array([0, 0, 0, 0, 1, 0, 0], bool),
}
D4RL = {"observations": FLAT["obs"], **{name: FLAT[name] for name in ("actions", "rewards", "terminals", "timeouts")}}


def test_flat_arrays_with_next_observations_lose_nothing():
    buffer = ReplayBuffer.from_arrays(*FLAT.values(), next_obs=FLAT["obs"] + 0.5)
    first, second, third = rows(buffer)
    assert first["obs"] == [[0], [1], [2], [2.5]]
    assert first["rewards"] == [0, 10, 11, 12]
    assert first["is_terminal"] == [False, False, False, True]
    assert (second["obs"], second["rewards"], any(second["is_terminal"])) == ([[3], [4], [4.5]], [0, 13, 14], False)
    assert (third["obs"], third["rewards"]) == ([[5], [6], [6.5]], [0, 15, 16])
    assert (len(buffer), buffer.capacity) == (10, 10)


def test_flat_arrays_without_next_observations_lose_the_last_step_and_say_so(caplog):
    with caplog.at_level(logging.WARNING, logger="worldloom"):
        first, second, third = rows(ReplayBuffer.from_arrays(*FLAT.values()))
    assert "whether it terminated are left out" in caplog.text
    assert (first["obs"], first["rewards"], any(first["is_terminal"])) == ([[0], [1], [2]], [0, 10, 11], False)
    assert (second["rewards"], third["rewards"]) == ([0, 13], [0, 15])


def test_flat_rows_by_the_arrival_rule_lose_nothing():
    first, second, third = rows(ReplayBuffer.from_arrays(*FLAT.values(), layout="arrival"))
    assert (first["rewards"], first["is_terminal"]) == ([10, 11, 12], [False, False, True])
    assert (second["rewards"], any(second["is_terminal"]), third["rewards"]) == ([13, 14], False, [15, 16])


def test_dones_alone_are_terminal_and_timeouts_beside_them_are_not():
    dones = FLAT["terminals"] | FLAT["timeouts"]
    arrays = {name: FLAT[name] for name in ("obs", "actions", "rewards")} | {"next_obs": FLAT["obs"], "dones": dones}
    ends = lambda **more: [any(e["is_terminal"]) for e in rows(ReplayBuffer.from_arrays(**arrays, **more))]  # noqa: E731
    assert ends() == [True, True, False]
    assert ends(timeouts=FLAT["timeouts"]) == [True, False, False]
    assert ends(terminals=FLAT["terminals"]) == [True, False, False]


def test_flat_dicts_of_observations_and_declared_sizes():
    obs = {"cam": np.zeros((7, 5, 5, 3), np.uint8), "pos": FLAT["obs"]}
    buffer = ReplayBuffer.from_arrays(
        obs, [0, 1, 1, 0, 1, 0, 1], FLAT["rewards"], FLAT["terminals"], next_obs=obs, action_dim=4, capacity=99
    )
    assert (buffer.obs_shape, buffer.action_dim, buffer.capacity) == ({"cam": (5, 5, 3), "pos": (1,)}, 4, 99)
    assert (buffer.num_episodes, len(buffer)) == (2, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terminals": None, "timeouts": None}, "Nothing says where the episodes end; give terminals"),
        ({"rewards": np.zeros(3)}, "different lengths: obs 7, actions 7, rewards 3, terminals 7, timeouts 7"),
        ({"rewards": 3.0}, "different lengths: .* rewards none"),
        ({"obs": {"a": FLAT["obs"], "b": np.zeros(3)}}, "different lengths: .* obs/b 3"),
        ({"next_obs": {"a": FLAT["obs"]}}, "next_obs must have the form of obs"),
        ({"timeouts": np.full(7, 0.5)}, "timeouts must hold booleans"),
        ({"next_obs": np.zeros((7, 1)), "layout": "arrival"}, "leave next_obs out"),
        ({"obs": np.full((7, 1), np.nan)}, "NaN"),
    ],
)
def test_flat_arrays_that_do_not_fit_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        ReplayBuffer.from_arrays(**FLAT | change)


def test_what_is_left_out_of_flat_arrays_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="worldloom"):
        ReplayBuffer.from_arrays(**FLAT | {"terminals": np.zeros(7), "timeouts": None})
        ReplayBuffer.from_arrays(**FLAT | {"timeouts": np.array([1, 0, 0, 0, 1, 1, 0])})
    assert "No row ends an episode: all 7 are taken as one." in caplog.text
    assert "3 episodes of a single row are left out" in caplog.text


# ---- files --------------------------------------------------------------------------------------------------------


def test_flat_files_are_read_by_the_names_in_use(tmp_path, caplog):
    path = tmp_path / "flat.npz"
    expected = rows(ReplayBuffer.from_arrays(*FLAT.values(), next_obs=FLAT["obs"] + 0.5))
    np.savez(path, **D4RL, next_observations=FLAT["obs"] + 0.5, infos=np.zeros(2))
    assert rows(ReplayBuffer.from_npz(path)) == expected
    assert "are not read: infos." in caplog.text
    gymnasium = {"terminals": "terminations", "timeouts": "truncations"}
    np.savez_compressed(path, next_obs=FLAT["obs"] + 0.5, **{gymnasium.get(k, k): v for k, v in FLAT.items()})
    assert rows(ReplayBuffer.from_npz(str(path))) == expected
    named = {"obs/pos": FLAT["obs"], "obs/cam": np.zeros((7, 5, 5, 3), np.uint8)}
    np.savez(path, **named, **{k: v for k, v in FLAT.items() if k != "obs"})
    assert ReplayBuffer.from_npz(path).obs_shape == {"pos": (1,), "cam": (5, 5, 3)}


def test_files_of_the_earlier_library_are_read(tmp_path, caplog):
    path = tmp_path / "old.npz"
    sizes = {"obs_shape": np.array([1]), "action_dim": np.array(1), "capacity": np.array(100)}
    arrays = {name: FLAT[name] for name in ("obs", "actions", "rewards")}
    np.savez_compressed(path, **arrays, dones=FLAT["terminals"].astype(np.float32), **sizes)
    with caplog.at_level(logging.WARNING, logger="worldloom"):
        first, second = rows(ReplayBuffer.from_npz(path))
    assert "not read" not in caplog.text
    assert (first["rewards"], second["rewards"]) == ([0, 10, 11], [0, 13, 14, 15])
    first, _ = rows(ReplayBuffer.from_npz(path, layout="arrival"))
    assert (first["rewards"], first["is_terminal"]) == ([10, 11, 12], [False, False, True])
    with pytest.raises(FileFormatError, match=r"read by ReplayBuffer\.from_npz"):
        ReplayBuffer.load(path)


def test_other_files_are_refused_with_what_they_hold(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, observation=FLAT["obs"], actions=FLAT["actions"], rewards=FLAT["rewards"])
    with pytest.raises(FileFormatError, match=r"has no obs; it holds observation, actions, rewards"):
        ReplayBuffer.from_npz(path)
    np.savez(path, **FLAT)
    with pytest.raises(FileFormatError, match=r"no member 'meta'; .* ReplayBuffer\.from_npz"):
        ReplayBuffer.load(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FileFormatError, match=r"x\.npz"):
        ReplayBuffer.from_npz(path)
    np.savez(path, **FLAT | {"rewards": np.array([{}] * 7)})
    with pytest.raises(FileFormatError, match="pickled"):
        ReplayBuffer.from_npz(path)
    ReplayBuffer.from_arrays(*FLAT.values()).save(path)
    with pytest.raises(FileFormatError, match=r"read it by ReplayBuffer\.load"):
        ReplayBuffer.from_npz(path)
    with pytest.raises(FileNotFoundError):
        ReplayBuffer.from_npz(tmp_path / "absent.npz")
