"""Environments in this process: the arrival rule, returns, time limits, action repeat, seeds, exact resume."""

import numpy as np
import pytest
from rollouts import assert_same, rollout
from tiny_envs import Corridor, Lamp, Nan, Steady, Walk, WalkPicture

from worldloom.envs import EpisodeEnd, episode_seed, make_env
from worldloom.errors import ConfigError, DataError, EnvError


def test_rows_follow_the_arrival_rule():
    """An episode of n actions has n + 1 rows: compare with a loop over the bare environment."""
    env, bare = make_env(Walk, seed=3), Walk()
    rng, actions = np.random.default_rng(0), np.random.default_rng(0)
    time_step = env.reset()
    for episode in range(30):
        obs, _ = bare.reset(seed=episode_seed(3, 0, episode))
        assert time_step.is_first[0]
        assert time_step.reward[0] == 0
        assert not time_step.is_last[0]
        np.testing.assert_array_equal(time_step.obs[0], obs.astype(np.float32))
        total, length, terminated, truncated = 0.0, 0, False, False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, _ = bare.step(int(actions.integers(2, size=1, dtype=np.int32)[0]))
            time_step = env.step(env.sample_actions(rng))
            total, length = total + np.float32(reward), length + 1
            np.testing.assert_array_equal(time_step.obs[0], obs.astype(np.float32))
            assert time_step.reward[0] == np.float32(reward)
            assert not time_step.is_first[0]
        assert time_step.is_last[0]
        assert time_step.is_terminal[0] == terminated
        assert time_step.events == (EpisodeEnd(0, pytest.approx(total), length, terminated, False),)
        time_step = env.step(np.array([99]))  # ignored: the episode is over
        assert not time_step.events


def test_time_steps_have_the_shapes_and_dtypes_of_the_spaces():
    env = make_env(WalkPicture, 2)
    assert env.obs_shape == {"camera": (8, 8, 3), "body/position": (2,), "body/parity": (2,)}
    assert env.obs_dtype["camera"] == np.uint8
    assert env.action_dim == {"way": 2, "push": 2, "keys0": 2, "keys1": 3}
    assert env.action_type == {"way": "discrete", "push": "continuous", "keys0": "discrete", "keys1": "discrete"}
    for time_step in rollout(env, 20):
        assert time_step.obs["camera"].shape == (2, 8, 8, 3)
        assert time_step.obs["camera"].dtype == np.uint8
        assert time_step.reward.dtype == np.float32
        assert time_step.is_first.dtype == time_step.is_last.dtype == time_step.is_terminal.dtype == bool
        assert not (time_step.is_terminal & ~time_step.is_last).any()


def episode_ends(env, policy, episodes):
    """``EpisodeEnd`` of at least ``episodes`` episodes under a policy, a function from observations to actions."""
    ends, time_step = [], env.reset()
    while len(ends) < episodes:
        time_step = env.step(policy(time_step.obs))
        ends += [event for event in time_step.events if isinstance(event, EpisodeEnd)]
    return ends


def test_optimal_policies_get_the_known_optimal_returns():
    ends = episode_ends(make_env(Corridor, 3), lambda obs: np.ones(3, int), 9)
    assert all(end == EpisodeEnd(end.env, pytest.approx(0.5), 5, True, False) for end in ends)

    ends = episode_ends(make_env(Steady, 2), lambda obs: -obs / 2, 6)  # [−1, 1] is scaled to ±2
    assert all(end == EpisodeEnd(end.env, pytest.approx(10), 10, False, False) for end in ends)

    def lamp(obs, uses_image=True):
        bright, positive = obs["image"].max((1, 2, 3)) > 127, obs["sign"][:, 0] > 0
        return {"action0": (bright & uses_image).astype(int), "action1": positive.astype(int)}

    ends = episode_ends(make_env(Lamp, 4), lamp, 20)
    assert all(end == EpisodeEnd(end.env, 1.0, 1, True, False) for end in ends)
    ends = episode_ends(make_env(Lamp, 4), lambda obs: lamp(obs, uses_image=False), 400)
    assert 0.7 < np.mean([end.episode_return for end in ends]) < 0.8


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = make_env(Corridor, action_repeat=3)
    env.reset()
    time_step = env.step([1])
    assert time_step.reward[0] == pytest.approx(-0.3)
    time_step = env.step([1])
    assert time_step.reward[0] == pytest.approx(1 - 0.2)  # two of three steps: the goal came first
    assert time_step.is_terminal[0]
    assert time_step.events[0].length == 2
    assert env.action_repeat == 3


@pytest.mark.parametrize(("time_limit", "repeat", "decisions"), [(4, 1, 4), (4, 2, 2), (5, 2, 3)])
def test_a_time_limit_truncates_and_does_not_terminate(time_limit, repeat, decisions):
    env = make_env(Steady, time_limit=time_limit, action_repeat=repeat)
    assert env.episode_length == decisions
    time_steps = rollout(env, decisions)
    assert [bool(time_step.is_last[0]) for time_step in time_steps] == [False] * decisions + [True]
    assert not time_steps[-1].is_terminal[0]


def test_an_end_on_the_time_limit_is_terminal():
    env = make_env(Corridor, time_limit=5)
    env.reset()
    for _ in range(5):
        time_step = env.step([1])
    assert time_step.is_last[0]
    assert time_step.is_terminal[0]


def test_a_registered_time_limit_is_known_and_can_be_replaced():
    assert make_env("Pendulum-v1").episode_length == 200
    longer = make_env("Pendulum-v1", time_limit=300)
    assert longer.episode_length == 300
    assert sum(bool(time_step.is_last[0]) for time_step in rollout(longer, 300)) == 1


def test_seeds_are_a_function_of_run_environment_and_episode():
    seeds = {episode_seed(seed, env, episode) for seed in range(5) for env in range(10) for episode in range(20)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    alone, crowd = make_env(Walk, 1, seed=9), make_env(Walk, 4, seed=9)
    np.testing.assert_array_equal(alone.reset().obs[0], crowd.reset().obs[0])
    assert len({tuple(obs) for obs in crowd.reset().obs}) == 4
    assert_same(rollout(make_env(Walk, 3, seed=1), 100), rollout(make_env(Walk, 3, seed=1), 100))
    other = make_env(Walk, 3, seed=2)
    assert (rollout(make_env(Walk, 3, seed=1), 1)[0].obs != other.reset().obs)[:, 0].all()


def test_reset_continues_the_episode_numbers_or_restarts_them_with_a_seed():
    env = make_env(Walk, 2, seed=1)
    first, second = env.reset(), env.reset()
    assert (first.obs != second.obs)[:, 0].all()
    np.testing.assert_array_equal(env.reset(seed=1).obs, first.obs)
    np.testing.assert_array_equal(env.reset().obs, second.obs)
    assert second.is_first.all()
    assert env.step(np.zeros(2, int)).is_first.sum() == 0


def test_the_first_step_without_reset_starts_episodes():
    np.testing.assert_array_equal(make_env(Walk, 2).step(np.zeros(2, int)).obs, make_env(Walk, 2).reset().obs)


def test_action_space_is_seeded():
    samples = []
    for _ in range(2):
        inner = Walk()
        make_env(inner, seed=4).reset()
        samples.append([inner.action_space.sample() for _ in range(20)])
    assert samples[0] == samples[1]


@pytest.mark.parametrize("kind", [Walk, WalkPicture, Steady])
@pytest.mark.parametrize("steps", [0, 1, 37, 200])
def test_a_run_resumes_in_the_middle_of_its_episodes(kind, steps, tmp_path):
    env = make_env(kind, 3, seed=5)
    time_steps = rollout(env, steps)
    np.savez(tmp_path / "state.npz", **env.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        resumed = make_env(kind, 3, seed=77)
        assert_same([resumed.restore(dict(saved))], [time_steps[-1]._replace(events=())])
    actions = [env.sample_actions(np.random.default_rng(step)) for step in range(60)]
    assert_same([env.step(action) for action in actions], [resumed.step(action) for action in actions])
    assert resumed.state().keys() == env.state().keys()


class Unseeded(Walk):
    """Not a function of seed and actions."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None)


def test_an_environment_that_cannot_be_reproduced_starts_its_next_episodes():
    env = make_env(Unseeded, 2, seed=5)
    rollout(env, 11)
    state, resumed = env.state(), make_env(Unseeded, 2)
    with pytest.warns(RuntimeWarning, match="did not return to the saved observations"):
        time_steps = resumed.restore(state)
    assert time_steps.is_first.all()
    np.testing.assert_array_equal(resumed.state()["episodes"], state["episodes"] + 1)


def test_invalid_states_are_refused():
    env = make_env(Walk, 2)
    with pytest.raises(EnvError, match="before the first reset"):
        env.state()
    env.reset()
    with pytest.raises(DataError, match="of 2 environments; there are 3"):
        make_env(Walk, 3).restore(env.state())


def test_another_environment_has_the_same_settings():
    env = make_env(Steady, 2, seed=1, time_limit=4, action_repeat=2)
    other = env.another(5, seed=2)
    assert (other.num_envs, other.seed, other.episode_length, other.action_repeat) == (5, 2, 2, 2)
    with pytest.raises(ConfigError, match="given as an object"):
        make_env(Steady()).another(1, 0)


def test_frames_are_rendered_where_the_environment_renders():
    env = make_env(WalkPicture, render_mode="rgb_array")
    rollout(env, 1)
    assert env.render().shape == (16, 16, 3)
    without_rendering = make_env(WalkPicture)
    without_rendering.reset()
    with pytest.raises(ConfigError, match="render=True"):
        without_rendering.render()


def test_nan_is_refused_before_it_is_returned():
    env = make_env(Nan, 2)
    env.reset()
    for _ in range(2):
        env.step(np.zeros((2, 1)))
    with pytest.raises(DataError, match=r"'obs' came back NaN or infinite from environments \[0, 1\]"):
        env.step(np.zeros((2, 1)))


def test_closed_environments_refuse_to_be_used():
    with make_env(Walk) as env:
        env.reset()
    env.close()
    for use in (env.reset, lambda: env.step([0]), env.render):
        with pytest.raises(EnvError, match="closed"):
            use()


def test_time_steps_of_earlier_calls_are_not_overwritten():
    env = make_env(WalkPicture, 2)
    time_steps = rollout(env, 30)
    assert_same(time_steps, rollout(make_env(WalkPicture, 2), 30))


class Interrupted(Walk):
    """Ctrl-C arrives in its step."""

    due = False

    def step(self, action):
        if Interrupted.due:
            raise KeyboardInterrupt
        return super().step(action)


def test_an_interrupted_step_leaves_the_state_before_it(monkeypatch):
    inner = [Walk(), Interrupted()]
    env = make_env(lambda: inner.pop(0), 2, seed=3)
    time_steps = rollout(env, 12)
    while time_steps[-1].is_last[1]:  # until an episode of the second environment is in progress
        time_steps.append(env.step([0, 0]))
    before = env.state()
    monkeypatch.setattr(Interrupted, "due", True)
    with pytest.raises(KeyboardInterrupt):
        env.step([0, 0])
    with pytest.raises(EnvError, match="closed"):
        env.step([0, 0])
    assert_same([make_env(Walk, 2).restore(env.state())], [time_steps[-1]._replace(events=())])
    for name, value in before.items():
        np.testing.assert_array_equal(env.state()[name], value)
