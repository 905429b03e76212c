"""DeepMind Control, Atari and Crafter, each where its package is installed (the extra ``envs``)."""

import os
import warnings

import numpy as np
import pytest
from rollouts import rollout

from worldloom.envs import make_env
from worldloom.envs.wrappers import resize
from worldloom.errors import ConfigError, EnvError

pytestmark = pytest.mark.filterwarnings("default")  # of simulators, not ours


@pytest.fixture
def suite():
    pytest.importorskip("dm_control")
    os.environ.setdefault("MUJOCO_GL", "egl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dm_control import suite

    return suite


@pytest.fixture
def drawing(suite):
    """Skips where MuJoCo has no OpenGL."""
    env = make_env("dmc_vision:cartpole_swingup")
    try:
        env.reset()
    except EnvError as error:
        pytest.skip(str(error))
    finally:
        env.close()


def assert_repeatable(make, steps):
    """Two environments with one seed give the same rows; an environment goes on from its state."""
    env, twin = make(), make()
    for a, b in zip(rollout(env, steps), rollout(twin, steps), strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.reward, b.reward)
    resumed = make()
    resumed.restore(env.state())
    for step in range(10):
        action = env.sample_actions(np.random.default_rng(step))
        np.testing.assert_array_equal(env.step(action).obs, resumed.step(action).obs)
    for each in (env, twin, resumed):
        each.close()


def test_dmc_state_is_the_suites_own(suite):
    env = make_env("dmc:cartpole_swingup", seed=5)
    assert (env.obs_shape, env.action_dim, env.action_type) == ((5,), 1, "continuous")
    assert (env.action_repeat, env.episode_length) == (2, 500)
    row = env.reset()
    physics = env._backend._envs[0].env.unwrapped._suite
    expected = np.concatenate([np.ravel(v) for v in physics.task.get_observation(physics.physics).values()])
    np.testing.assert_array_equal(row.obs[0], expected.astype(np.float32))
    rows = rollout(env, 501)
    assert [i for i, row in enumerate(rows) if row.is_last[0]] == [500]
    assert not rows[500].is_terminal[0]  # a time limit, and the suite's discount stays 1
    assert rows[501].is_first[0]
    assert 0 <= sum(row.reward[0] for row in rows) <= 1000
    env.close()


def test_dmc_sums_rewards_over_repeats(suite):
    once, twice = make_env("dmc:cheetah_run", seed=5, action_repeat=1), make_env("dmc:cheetah_run", seed=5)
    once.reset(), twice.reset()
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = once.sample_actions(rng)
        first, second, both = once.step(action), once.step(action), twice.step(action)
        np.testing.assert_array_equal(second.obs, both.obs)
        np.testing.assert_allclose(first.reward + second.reward, both.reward, rtol=1e-6)


def test_dmc_ends_with_discount_0_are_terminal(suite, monkeypatch):
    env = make_env("dmc:hopper_hop", seed=5)
    env.reset()
    task = env._backend._envs[0].env.unwrapped._suite.task
    monkeypatch.setattr(task, "get_termination", lambda physics: 0.0, raising=False)
    row = env.step(env.sample_actions(np.random.default_rng(0)))
    assert row.is_last[0]
    assert row.is_terminal[0]


def test_dmc_is_repeatable(suite):
    assert_repeatable(lambda: make_env("dmc:walker_walk", 2, seed=3), 60)


def test_dmc_limits_and_names(suite):
    env = make_env("dmc:cup-catch", time_limit=1200)
    assert env.episode_length == 600
    assert [i for i, row in enumerate(rollout(env, 600)) if row.is_last[0]] == [600]
    for name in ("cartpol_swingup", "nothing"):
        with pytest.raises(ConfigError, match="The control suite has no task"):
            make_env(f"dmc:{name}")
    with pytest.raises(ConfigError, match="dmc_vision"):
        make_env("dmc:cartpole_swingup", image_size=64)


def test_dmc_vision(drawing):
    env = make_env("dmc_vision:quadruped_walk", seed=1)
    assert env.obs_shape == (64, 64, 3)
    row = env.reset()
    assert row.obs.dtype == np.uint8
    assert row.obs.std() > 10
    inner = env._backend._envs[0].env.unwrapped
    np.testing.assert_array_equal(row.obs[0], inner._suite.physics.render(64, 64, camera_id=2))
    assert env.render().shape == (240, 240, 3)
    env.close()
    with make_env("dmc_vision:cartpole_swingup", 1, parallel="subprocess", frame_stack=3) as stacked:
        rows = rollout(stacked, 3)
        assert stacked.obs_shape == (9, 64, 64)
        np.testing.assert_array_equal(rows[0].obs[0, :3], rows[0].obs[0, 6:])
        np.testing.assert_array_equal(rows[3].obs[0, :3], rows[1].obs[0, 6:])


def atari_screen(env):
    return env._backend._envs[0].env.unwrapped._console.getScreenRGB()


def test_atari_presets():
    pytest.importorskip("ale_py")
    env = make_env("atari:pong", seed=1)
    assert (env.obs_shape, env.action_dim, env.action_repeat, env.episode_length) == ((96, 96, 1), 18, 4, 27_000)
    assert env._backend._envs[0].env.unwrapped._console.getFloat("repeat_action_probability") == 0.25
    env = make_env("atari100k:pong", seed=1)
    assert (env.obs_shape, env.action_dim, env.action_repeat) == ((64, 64, 3), 6, 4)
    assert env._backend._envs[0].env.unwrapped._console.getFloat("repeat_action_probability") == 0
    assert env.reset().obs.dtype == np.uint8
    assert env.render().shape == (210, 160, 3)
    with pytest.raises(ConfigError, match="Did you mean 'pong'"):
        make_env("atari:pongg")


def test_atari_pools_two_frames_and_none_from_before_the_reset():
    pytest.importorskip("ale_py")
    env = make_env("atari100k:ms_pacman", seed=1)
    rollout(env, 100)
    inner = env._backend._envs[0].env.unwrapped
    row = env.reset()
    np.testing.assert_array_equal(row.obs[0], resize(atari_screen(env), 64))
    flicker = 0
    for _ in range(50):
        row = env.step([0])
        older, newer = inner._screens
        np.testing.assert_array_equal(newer, atari_screen(env))
        np.testing.assert_array_equal(row.obs[0], resize(np.maximum(older, newer), 64))
        flicker += not np.array_equal(older, newer)
    assert flicker > 5


def test_atari_ends_and_limits():
    pytest.importorskip("ale_py")
    rows = rollout(make_env("atari100k:ms_pacman", seed=1), 700)
    assert any(row.is_terminal[0] for row in rows)
    short = make_env("atari100k:ms_pacman", seed=1, time_limit=10)
    assert short.episode_length == 3
    rows = rollout(short, 4)
    assert rows[3].is_last[0]
    assert not rows[3].is_terminal[0]


@pytest.mark.parametrize("spec", ["atari:ms_pacman", "atari100k:ms_pacman"])
def test_atari_is_repeatable(spec):
    pytest.importorskip("ale_py")
    assert_repeatable(lambda: make_env(spec, seed=3), 60)
    assert_repeatable(lambda: make_env(spec, seed=4), 30)


def test_crafter():
    pytest.importorskip("crafter")
    env = make_env("crafter:reward", seed=1, time_limit=30)
    assert (env.obs_shape, env.action_dim, env.action_type, env.episode_length) == ((64, 64, 3), 17, "discrete", 30)
    first = env.reset()
    np.testing.assert_array_equal(first.obs, make_env("crafter:reward", seed=1).reset().obs)
    assert first.obs.std() > 10
    rows = [env.step([0]) for _ in range(30)]
    assert rows[-1].is_last[0]
    assert not rows[-1].is_terminal[0]
    assert env.render().shape == (256, 256, 3)
    with pytest.raises(ConfigError, match="'reward' and 'noreward'"):
        make_env("crafter:rewards")


def test_crafters_death_is_terminal():
    pytest.importorskip("crafter")
    env = make_env("crafter:noreward", seed=1)
    env.reset()
    env._backend._envs[0].env.unwrapped._game._player.health = 0
    row = env.step([0])
    assert row.is_last[0]
    assert row.is_terminal[0]
    assert row.reward[0] == 0
