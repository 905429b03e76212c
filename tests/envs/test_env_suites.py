"""DeepMind Control, Atari and Crafter, where their packages (the extra ``envs``) are installed."""

import os
import sys
import warnings

import numpy as np
import pytest
from rollouts import rollout

from worldloom.envs import make_env
from worldloom.envs.wrappers import resize
from worldloom.errors import ConfigError, EnvError

pytestmark = pytest.mark.filterwarnings("default")  # the simulators' own warnings are not errors


@pytest.fixture
def suite():
    pytest.importorskip("dm_control")
    os.environ.setdefault("MUJOCO_GL", "egl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dm_control import suite

    return suite


@pytest.fixture
def rendering(suite):
    """Skips where MuJoCo cannot render."""
    env = make_env("dmc_vision:cartpole_swingup")
    try:
        env.reset()
    except EnvError as error:
        pytest.skip(str(error))
    finally:
        env.close()


def test_an_opengl_that_does_not_start_is_said(tmp_path, monkeypatch):
    # As the import of dm_control ends with MUJOCO_GL=osmesa where that library is missing.
    (tmp_path / "dm_control").mkdir()
    (tmp_path / "dm_control" / "__init__.py").write_text("None.glGetError")
    for name in [name for name in sys.modules if name.partition(".")[0] == "dm_control"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(EnvError, match=r"MUJOCO_GL=osmesa .*glGetError.*'egl'"):
        make_env("dmc:cartpole_swingup")


def assert_repeatable(make, steps):
    """Two environments with the same seed give the same time steps; a third continues from the state of the first."""
    env, twin = make(), make()
    for a, b in zip(rollout(env, steps), rollout(twin, steps), strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.reward, b.reward)
    resumed = make()
    resumed.restore(env.state())
    for step in range(10):
        action = env.sample_actions(np.random.default_rng(step))
        np.testing.assert_array_equal(env.step(action).obs, resumed.step(action).obs)
    for vector in (env, twin, resumed):
        vector.close()


def test_dmc_states_are_the_suites_observations(suite):
    env = make_env("dmc:cartpole_swingup", seed=5)
    assert (env.obs_shape, env.action_dim, env.action_type) == ((5,), 1, "continuous")
    assert (env.action_repeat, env.episode_length) == (2, 500)
    time_step = env.reset()
    physics = env._backend._envs[0].env.unwrapped._suite
    expected = np.concatenate([np.ravel(v) for v in physics.task.get_observation(physics.physics).values()])
    np.testing.assert_array_equal(time_step.obs[0], expected.astype(np.float32))
    time_steps = rollout(env, 501)
    assert [i for i, time_step in enumerate(time_steps) if time_step.is_last[0]] == [500]
    assert not time_steps[500].is_terminal[0]  # a time limit, and the suite's discount stays 1
    assert time_steps[501].is_first[0]
    assert 0 <= sum(time_step.reward[0] for time_step in time_steps) <= 1000
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
    time_step = env.step(env.sample_actions(np.random.default_rng(0)))
    assert time_step.is_last[0]
    assert time_step.is_terminal[0]


def test_dmc_is_repeatable(suite):
    assert_repeatable(lambda: make_env("dmc:walker_walk", 2, seed=3), 60)


def test_dmc_time_limits_and_task_names(suite):
    env = make_env("dmc:cup-catch", time_limit=1200)
    assert env.episode_length == 600
    assert [i for i, time_step in enumerate(rollout(env, 600)) if time_step.is_last[0]] == [600]
    for name in ("cartpol_swingup", "nothing"):
        with pytest.raises(ConfigError, match="The control suite has no task"):
            make_env(f"dmc:{name}")
    with pytest.raises(ConfigError, match="dmc_vision"):
        make_env("dmc:cartpole_swingup", image_size=64)


def test_dmc_vision_gives_images(rendering):
    env = make_env("dmc_vision:quadruped_walk", seed=1)
    assert env.obs_shape == (64, 64, 3)
    time_step = env.reset()
    assert time_step.obs.dtype == np.uint8
    assert time_step.obs.std() > 10
    inner = env._backend._envs[0].env.unwrapped
    np.testing.assert_array_equal(time_step.obs[0], inner._suite.physics.render(64, 64, camera_id=2))
    assert env.render().shape == (240, 240, 3)
    env.close()
    with make_env("dmc_vision:cartpole_swingup", 1, parallel="subprocess", frame_stack=3) as stacked:
        time_steps = rollout(stacked, 3)
        assert stacked.obs_shape == (9, 64, 64)
        np.testing.assert_array_equal(time_steps[0].obs[0, :3], time_steps[0].obs[0, 6:])
        np.testing.assert_array_equal(time_steps[3].obs[0, :3], time_steps[1].obs[0, 6:])


def atari_screen(env):
    return env._backend._envs[0].env.unwrapped._console.getScreenRGB()


def test_atari_and_atari100k_have_their_preprocessing():
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


def test_atari_pools_two_frames_but_none_from_before_the_reset():
    pytest.importorskip("ale_py")
    env = make_env("atari100k:ms_pacman", seed=1)
    rollout(env, 100)
    inner = env._backend._envs[0].env.unwrapped
    time_step = env.reset()
    np.testing.assert_array_equal(time_step.obs[0], resize(atari_screen(env), 64))
    flicker = 0
    for _ in range(50):
        time_step = env.step([0])
        older, newer = inner._screens
        np.testing.assert_array_equal(newer, atari_screen(env))
        np.testing.assert_array_equal(time_step.obs[0], resize(np.maximum(older, newer), 64))
        flicker += not np.array_equal(older, newer)
    assert flicker > 5


def test_atari_game_over_is_terminal_and_the_time_limit_is_not():
    pytest.importorskip("ale_py")
    time_steps = rollout(make_env("atari100k:ms_pacman", seed=1), 700)
    assert any(time_step.is_terminal[0] for time_step in time_steps)
    short = make_env("atari100k:ms_pacman", seed=1, time_limit=10)
    assert short.episode_length == 3
    time_steps = rollout(short, 4)
    assert time_steps[3].is_last[0]
    assert not time_steps[3].is_terminal[0]


@pytest.mark.parametrize("spec", ["atari:ms_pacman", "atari100k:ms_pacman"])
def test_atari_is_repeatable(spec):
    pytest.importorskip("ale_py")
    assert_repeatable(lambda: make_env(spec, seed=3), 60)
    assert_repeatable(lambda: make_env(spec, seed=4), 30)


def test_crafter_time_limit_truncates():
    pytest.importorskip("crafter")
    env = make_env("crafter:reward", seed=1, time_limit=30)
    assert (env.obs_shape, env.action_dim, env.action_type, env.episode_length) == ((64, 64, 3), 17, "discrete", 30)
    first = env.reset()
    np.testing.assert_array_equal(first.obs, make_env("crafter:reward", seed=1).reset().obs)
    assert first.obs.std() > 10
    time_steps = [env.step([0]) for _ in range(30)]
    assert time_steps[-1].is_last[0]
    assert not time_steps[-1].is_terminal[0]
    assert env.render().shape == (256, 256, 3)
    with pytest.raises(ConfigError, match="'reward' and 'noreward'"):
        make_env("crafter:rewards")


def test_crafters_death_is_terminal():
    pytest.importorskip("crafter")
    env = make_env("crafter:noreward", seed=1)
    env.reset()
    env._backend._envs[0].env.unwrapped._game._player.health = 0
    time_step = env.step([0])
    assert time_step.is_last[0]
    assert time_step.is_terminal[0]
    assert time_step.reward[0] == 0
