"""Gymnasium vector environments: the time steps are the same in all three autoreset modes."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from rollouts import assert_same, rollout
from tiny_envs import Corridor, Lamp, Steady, Walk, WalkPicture

from worldloom.envs import make_env
from worldloom.errors import ConfigError, EnvError


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("kind", [Walk, WalkPicture, Corridor, Steady, Lamp])
def test_all_modes_give_the_time_steps_of_single_environments(mode, kind):
    """All arrays and events, with the same seeds; episodes end both at different and at the same times."""
    expected = rollout(make_env(kind, 3, seed=6), 150)
    with make_env(SyncVectorEnv([kind] * 3, autoreset_mode=mode), seed=6) as env:
        assert_same(rollout(env, 150), expected)
    assert sum(len(time_step.events) for time_step in expected) > 20


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_gymnasiums_processes_give_the_same_time_steps(mode, shared_memory):
    expected = rollout(make_env(Walk, 2, seed=6), 60)
    vector = AsyncVectorEnv([Walk] * 2, autoreset_mode=mode, shared_memory=shared_memory, context="spawn")
    with make_env(vector, seed=6) as env:
        assert_same(rollout(env, 60), expected)


def rollout_with_reset(env):
    """A rollout in which all environments are reset in the call in which one of them would start an episode anyway."""
    time_steps = rollout(env, 3)
    while not time_steps[-1].is_last.any():
        time_steps.append(env.step(np.zeros(env.num_envs, int)))
    return time_steps + rollout(env, 30)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("make", [SyncVectorEnv, AsyncVectorEnv])
def test_a_reset_when_an_episode_has_just_ended(mode, make):
    process = {"shared_memory": False, "context": "spawn"} if make is AsyncVectorEnv else {}
    with make_env(make([Walk] * 2, autoreset_mode=mode, **process), seed=6) as env:
        assert_same(rollout_with_reset(env), rollout_with_reset(make_env(Walk, 2, seed=6)))


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_of_one_environment(mode):
    with make_env(SyncVectorEnv([Walk], autoreset_mode=mode), seed=6) as env:
        assert_same(rollout(env, 80), rollout(make_env(Walk, 1, seed=6), 80))


def test_an_environment_that_gymnasium_vectorises_itself():
    env = make_env(gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point"), seed=1)
    assert (env.num_envs, env.obs_shape, env.action_dim) == (3, (4,), 2)
    time_steps = rollout(env, 200)
    ends = [event for time_step in time_steps for event in time_step.events]
    assert len(ends) > 10
    for before, time_step in itertools.pairwise(time_steps):
        np.testing.assert_array_equal(time_step.is_first, before.is_last)
        np.testing.assert_array_equal(time_step.reward, np.where(before.is_last, 0, 1))
        assert (np.abs(time_step.obs[time_step.is_first]) <= 0.05).all()
    assert all(end.episode_return == end.length for end in ends)


class Counters(VectorEnv):
    """Two counters that end after 2 and 3 steps, written as one vector environment."""

    single_observation_space = spaces.Box(0, 10, (1,))
    single_action_space = spaces.Discrete(2)
    num_envs = 2

    def __init__(self, mode, supports_masks=True):
        self.metadata = {"autoreset_mode": mode}
        self.supports_masks = supports_masks
        self.count = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        assert seed is None or isinstance(seed, int)
        mask = (options or {}).get("reset_mask", np.ones(2, bool)) if self.supports_masks else np.ones(2, bool)
        self.count = np.where(mask, 0, self.count)
        self.over = np.zeros(2, bool)
        return self._obs(), {}

    def step(self, actions):
        mode = self.metadata["autoreset_mode"]
        skip = self.over if mode is AutoresetMode.NEXT_STEP else np.zeros(2, bool)
        self.count = np.where(skip, 0, self.count + 1)
        self.over = self.count >= [2, 3]
        reward, over, info = np.where(skip, 0.0, 1.0), self.over, {}
        if mode is AutoresetMode.SAME_STEP and over.any():
            final = np.empty(2, object)
            for i in np.flatnonzero(over):
                final[i] = np.float32([self.count[i]])
            info = {"final_obs": final}
            self.count = np.where(over, 0, self.count)
        return self._obs(), reward, over, np.zeros(2, bool), info

    def _obs(self):
        return self.count[:, None].astype(np.float32)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_users_own_vector_environment(mode):
    time_steps = rollout(make_env(Counters(mode)), 8)
    np.testing.assert_array_equal(
        np.stack([time_step.obs[:, 0] for time_step in time_steps], 1),
        [[0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3, 0]],
    )
    np.testing.assert_array_equal(
        np.stack([time_step.reward for time_step in time_steps], 1),
        [[0, 1, 1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 0]],
    )
    np.testing.assert_array_equal(
        np.stack([time_step.is_terminal for time_step in time_steps], 1), [[0, 0, 1] * 3, [0, 0, 0, 1, 0, 0, 0, 1, 0]]
    )


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_a_vector_environment_that_ignores_masks_is_refused_where_they_are_needed(mode):
    env = make_env(Counters(mode, supports_masks=False))
    with pytest.raises(EnvError, match="ignores options"):
        rollout(env, 8)


def test_options_that_would_change_a_vector_environment_are_refused():
    vector = SyncVectorEnv([Walk] * 2)
    for change in ({"num_envs": 3}, {"action_repeat": 2}, {"time_limit": 5}, {"parallel": "subprocess"}, {"x": 1}):
        with pytest.raises(ConfigError, match="used as it is"):
            make_env(vector, **{"num_envs": 2, **change})
    vector.metadata = {}
    with pytest.raises(ConfigError, match="autoreset_mode"):
        make_env(vector)


def test_vector_environments_cannot_be_copied_rendered_or_replayed():
    env = make_env(SyncVectorEnv([Walk] * 2))
    rollout(env, 5)
    with pytest.raises(ConfigError, match="given as an object"):
        env.another(1, 0)
    with pytest.raises(ConfigError, match="renders no frames"):
        env.render()
    state = env.state()
    with pytest.warns(RuntimeWarning, match="cannot be replayed"):
        assert env.restore(state).is_first.all()
