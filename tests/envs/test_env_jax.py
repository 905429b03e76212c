"""Environments in JAX: our own against Gymnasium's, on the host path, and what is refused."""

import re
import types
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import worldloom
from worldloom.envs import make_env
from worldloom.envs.jax import Acrobot, CartPole, Catch, MountainCarContinuous, Pendulum, check_jax_env, make_jax_env
from worldloom.envs.jax.classic import PendulumState
from worldloom.errors import ConfigError, DataError, EnvContractError, EnvError, MissingDependencyError
from worldloom.replay import ReplayBuffer


class Brax:
    """What adapt knows brax by."""

    action_size = 1

    def reset(self, key):
        raise NotImplementedError

    def step(self, state, action):
        raise NotImplementedError


def pendulum_state(env):
    angle, velocity = env.state
    return PendulumState(jnp.float32((angle + np.pi) % (2 * np.pi) - np.pi), jnp.float32(velocity))


SAME = {
    "Pendulum-v1": (Pendulum(), pendulum_state),
    "CartPole-v1": (CartPole(), lambda env: jnp.asarray(env.state, jnp.float32)),
    "Acrobot-v1": (Acrobot(), lambda env: jnp.asarray(env.state, jnp.float32)),
    "MountainCarContinuous-v0": (MountainCarContinuous(), lambda env: jnp.asarray(env.state, jnp.float32)),
}


@pytest.mark.parametrize("name", SAME)
def test_every_step_equals_gymnasiums_from_the_same_state(name):
    ours, state_of = SAME[name]
    env, step, rng = gym.make(name).unwrapped, jax.jit(ours.step), np.random.default_rng(0)
    env.reset(seed=0)
    scale = 2 if name == "Pendulum-v1" else 1
    terminations = 0
    for number in range(500):
        continuous = ours.action_type == "continuous"
        # The car is driven up the hill for once, so that the goal is compared too.
        push = np.sign(env.state[1] + 1e-9) if name.startswith("Mountain") and number > 250 else rng.uniform(-1, 1)
        action = np.array([push], np.float32) if continuous else np.int32(rng.integers(ours.action_dim))
        state = state_of(env)
        obs, reward, terminated, *_ = env.step(scale * action if continuous else int(action))
        _, our_obs, our_reward, our_end, our_cut, _ = step(jax.random.key(0), state, action)
        np.testing.assert_allclose(our_obs, obs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(our_reward, reward, rtol=0, atol=1e-5)
        assert bool(our_end) == bool(terminated)
        assert not our_cut
        if terminated:
            terminations += 1
            env.reset()
    assert terminations > 0 or name in ("Pendulum-v1", "Acrobot-v1")


STATES = {
    "Pendulum-v1": ([-np.pi, -8], [np.pi, 8]),
    "CartPole-v1": ([-2.4, -5, -0.2, -5], [2.4, 5, 0.2, 5]),
    "Acrobot-v1": ([-np.pi, -np.pi, -4 * np.pi, -9 * np.pi], [np.pi, np.pi, 4 * np.pi, 9 * np.pi]),
    "MountainCarContinuous-v0": ([-1.2, -0.07], [0.6, 0.07]),
}


@pytest.mark.parametrize("name", SAME)
def test_a_step_from_any_state_is_as_close_to_gymnasiums_as_the_page_says(name):
    ours, _ = SAME[name]
    env, rng = gym.make(name).unwrapped, np.random.default_rng(0)
    env.reset(seed=0)
    continuous = ours.action_type == "continuous"
    states = rng.uniform(*STATES[name], (500, len(STATES[name][0]))).astype(np.float32)
    actions = rng.uniform(-1, 1, (500, 1)) if continuous else rng.integers(ours.action_dim, size=500)
    make = (lambda state: PendulumState(*state)) if name == "Pendulum-v1" else (lambda state: state)
    step = lambda state, action: ours.step(jax.random.key(0), make(state), action)  # noqa: E731
    _, obs, rewards, ends, *_ = jax.jit(jax.vmap(step))(states, actions.astype(np.float32 if continuous else np.int32))
    errors = np.zeros(500)
    for i, state in enumerate(states):
        env.state, env.steps_beyond_terminated = state.astype(np.float64), None
        action = actions[i].astype(np.float32) * (2 if name == "Pendulum-v1" else 1) if continuous else int(actions[i])
        theirs, reward, terminated, *_ = env.step(action)
        errors[i] = np.abs(obs[i] - theirs).max()
        assert abs(rewards[i] - reward) <= (1e-5 if continuous else 0)
        assert bool(ends[i]) == bool(terminated)
    spin = np.abs(states[:, 3]) if name == "Acrobot-v1" else np.zeros(500)
    for fastest, within in ((8, 1e-5), (15, 5e-5), (30, 5e-3)):
        assert errors[spin < fastest].max() <= within


@pytest.mark.parametrize("name", SAME)
def test_spaces_limits_and_first_states_are_gymnasiums(name):
    ours, _ = SAME[name]
    env, reference = make_env(f"jax:{name}", 3), make_env(name)
    for attribute in ("obs_shape", "obs_dtype", "action_dim", "action_type", "time_limit"):
        assert getattr(env, attribute) == getattr(reference, attribute)
    first = np.asarray(jax.vmap(lambda key: ours.reset(key)[1])(jax.random.split(jax.random.key(0), 2000)))
    gyms = np.stack([reference.reset(seed=i).obs[0] for i in range(200)])
    np.testing.assert_allclose(first.mean(0), gyms.mean(0), atol=0.15)
    np.testing.assert_allclose(first.std(0), gyms.std(0), atol=0.1)


def test_catch_pays_for_the_ball_and_shows_ball_and_paddle():
    env = make_env("jax:Catch-v0", 2, seed=1, size=16, cells=4)
    step = env.reset()
    assert step.obs.shape == (2, 16, 16, 3)
    assert step.obs.dtype == np.uint8
    white = (step.obs == 255).all(-1)
    assert (white.sum((1, 2)) == 16).all()
    assert not white[:, 4:].any()  # in the highest row
    for _ in range(3):
        column = (step.obs == 255).all(-1).any(1).argmax(1)  # of the ball, in pixels
        paddle = (step.obs[:, -1] == (60, 200, 60)).all(-1).argmax(1)
        step = env.step(np.sign(column - paddle) + 1)
    assert step.is_last.all()
    assert step.is_terminal.all()
    assert [end.info["success"] for end in step.events] == [float(reward > 0) for reward in step.reward]
    assert set(step.reward.tolist()) <= {-1.0, 1.0}
    with pytest.raises(ConfigError, match="size=10 must be a multiple of cells=4"):
        Catch(10, 4)


def test_rows_follow_the_arrival_rule_and_a_state_is_restored_exactly():
    env = make_env("jax:CartPole-v1", 3, seed=2)
    rng, rows = np.random.default_rng(0), [env.reset()]
    for _ in range(80):
        rows.append(env.step(env.sample_actions(rng)))
    over = np.stack([row.is_last for row in rows])
    first = np.stack([row.is_first for row in rows])
    np.testing.assert_array_equal(first[1:], over[:-1])
    assert (np.stack([row.reward for row in rows])[first] == 0).all()
    assert over.sum() > 3
    state, actions = env.state(), env.sample_actions(rng)
    assert not [name for name in state if name.startswith("actions/")]
    expected = [env.step(actions) for _ in range(30)]
    again = make_env("jax:CartPole-v1", 3, seed=99)
    again.restore(state)
    for one in expected:
        other = again.step(actions)
        np.testing.assert_array_equal(one.obs, other.obs)
        np.testing.assert_array_equal(one.reward, other.reward)
        assert one.events == other.events
    with pytest.warns(RuntimeWarning, match="not those of these environments"):
        assert make_env("jax:Pendulum-v1", 3).restore({**state, "obs/obs": np.zeros((3, 3))}).is_first.all()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_and_bfloat16_in_a_state_come_back_from_a_file(tmp_path, impl):
    def reset(key):
        position = jax.random.normal(key, (3,))
        return (jax.random.key(jax.random.key_data(key)[0], impl=impl), position.astype(jnp.bfloat16)), position

    def step(key, state, action):
        kept, drawn = jax.random.split(state[0])
        position = 0.5 * state[1].astype(jnp.float32) + jax.random.normal(drawn, (3,))
        return (kept, position.astype(jnp.bfloat16)), position, position[0], False, False, {}

    env, actions = make_env(broken(reset=reset, step=step), 2), np.zeros((2, 1))
    env.reset()
    env.step(actions)
    np.savez(tmp_path / "state.npz", **env.state())
    again = make_env(broken(reset=reset, step=step), 2, seed=9)
    with np.load(tmp_path / "state.npz") as saved:
        again.restore(dict(saved))
    for _ in range(3):
        np.testing.assert_array_equal(env.step(actions).obs, again.step(actions).obs)
    with pytest.warns(RuntimeWarning, match="not those of these environments"):
        make_env("jax:Pendulum-v1", 2).restore(env.state())


def test_an_episode_depends_on_seed_and_number_alone():
    one, three = (make_env("jax:Pendulum-v1", count, seed=4, time_limit=5) for count in (1, 3))
    for _ in range(2):
        np.testing.assert_array_equal(one.reset().obs[0], three.reset().obs[0])
    assert not np.array_equal(three.reset().obs[0], three.reset().obs[0])
    assert len(np.unique(three.reset().obs[:, 0])) == 3


@pytest.mark.parametrize("seed", [0, 42, 2**31 + 5, 2**63 - 1])
def test_seeds_on_the_device_are_numpys(seed):
    from worldloom.envs import episode_seed
    from worldloom.ops.seed_sequence import entropy_words, spawned_state

    for env, episode in ((0, 0), (3, 17), (255, 2**31 - 1)):
        assert int(spawned_state(entropy_words(seed), env, episode)[0] >> 1) == episode_seed(seed, env, episode)


@pytest.mark.parametrize("seed", [0, 42, 2**31 + 5, 2**63 - 1])
def test_keys_of_many_generators_are_those_that_numpy_derives(seed):
    from worldloom.ops.seed_sequence import philox_keys

    found = philox_keys(seed, 2**32 - 1, 2**31 - 3, 5)
    for i, key in enumerate(found):
        of_numpy = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(2**32 - 1, 2**31 - 3 + i)))
        np.testing.assert_array_equal(key, of_numpy.state["state"]["key"])


@pytest.mark.parametrize(
    ("spec", "options", "error", "text"),
    [
        ("jax:Pendlum-v1", {}, ConfigError, "Did you mean 'Pendulum-v1'"),
        ("jax:Pendulum-v1", {"mass": 2}, ConfigError, "cannot be made with"),
        (
            "jax:Pendulum-v1",
            {"frame_stack": 3},
            ConfigError,
            "frame_stack: environments in JAX are stepped",
        ),
        ("jax:Pendulum-v1", {"parallel": "subprocess"}, ConfigError, "parallel: environments in JAX"),
        ("jax:Pendulum-v1", {"render": True}, EnvError, "draws no pictures"),
        ("navix:Navix-Empty-5x5-v0", {}, MissingDependencyError, "needs the package 'navix'"),
        ("gymnx:CartPole-v1", {}, ConfigError, "Did you mean 'gymnax'"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_sentence(spec, options, error, text):
    with pytest.raises(error, match=text):
        make_env(spec, 2, **options)


def stepping(**changes):
    """A ``step`` that returns other values."""
    usual = {"state": None, "obs": None, "reward": 0.0, "terminated": False, "truncated": False, "info": {}}

    def step(key, state, action):
        state, obs, *_ = Pendulum().step(key, state, action)
        return tuple((usual | {"state": state, "obs": obs} | changes).values())

    return step


def observing(obs):
    """The shape and the functions of an environment with such observations."""
    shape = {name: getattr(x, "shape", ()) for name, x in obs.items()} if isinstance(obs, dict) else np.shape(obs)
    step = lambda key, state, action: (state, obs, 0.0, False, False, None)  # noqa: E731
    return {"obs_shape": shape, "reset": lambda key: (jnp.zeros(()), obs), "step": step}


def broken(**changes):
    """A Pendulum with other attributes or functions."""
    env = Pendulum()
    names = ("obs_shape", "action_dim", "action_type", "time_limit", "reset", "step")
    return types.SimpleNamespace(**{name: getattr(env, name) for name in names} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"action_type": "box"}, ConfigError, "action_type must be 'continuous' or 'discrete', not 'box'"),
        ({"action_dim": 0}, ConfigError, "action_dim must be an integer ≥ 1, not 0"),
        ({"time_limit": 1.5}, ConfigError, "time_limit must be an integer ≥ 1"),
        (
            {"obs_shape": (4,)},
            EnvContractError,
            "obs_shape is \\(4,\\); reset returned .* \\(3,\\)",
        ),
        ({"reset": lambda key: jnp.zeros(3)}, EnvContractError, "reset returned an array of shape \\(3,\\); a tuple"),
        ({"step": lambda key, s, a: (s, jnp.zeros(3), 0.0, False)}, EnvContractError, "step returned a tuple of 4"),
        (
            {"step": lambda key, s, a: (s, jnp.zeros(2), jnp.zeros(()), False, False, {})},
            EnvContractError,
            "return another obs",
        ),
        (
            {"step": lambda key, s, a: (s, jnp.zeros(3), jnp.zeros(()), jnp.zeros(()), False, {})},
            EnvContractError,
            "terminated of dtype float32; a boolean",
        ),
        ({"obs_shape": 3}, ConfigError, r"obs_shape must be a shape such as \(4,\) .* not 3"),
        ({"obs_shape": "ab"}, ConfigError, "obs_shape must be a shape"),
        ({"obs_shape": (-3,)}, ConfigError, "obs_shape must be a shape"),
        ({"reset": 3}, ConfigError, r"reset must be a function of \(key\), not 3"),
        ({"step": lambda s, a: None}, ConfigError, r"step must take \(key, state, action\); it takes \(s, a\)"),
        ({"reset": lambda key: ("x", jnp.zeros(3))}, EnvContractError, "reset returned a str in state; only arrays"),
        (
            {"reset": lambda key: ({"a": types.SimpleNamespace()}, jnp.zeros(3))},
            EnvContractError,
            r"a SimpleNamespace in state\['a'\]; .* registered by jax.tree_util.register_dataclass",
        ),
        ({"step": stepping(terminated="no")}, EnvContractError, "step returned a str in terminated"),
        ({"step": stepping(truncated=None)}, EnvContractError, "truncated = NoneType; one number"),
        ({"step": stepping(info=[1])}, EnvContractError, "info = list; a dict of numbers by name is needed, or None"),
        ({"step": stepping(reward=1j)}, EnvContractError, "reward of dtype complex64; a real number"),
        (observing(jnp.zeros(3, jnp.complex64)), EnvContractError, "dtype complex64; real numbers"),
        (observing(jax.random.key(0)), EnvContractError, "dtype key<fry>; real numbers"),
        (observing(jnp.zeros((8, 8, 3), jnp.int32)), EnvContractError, "uint8 from 0 to 255 or float from 0 to 1"),
        (observing(jnp.zeros((2, 2, 2, 2))), EnvContractError, r"three axes and vectors one: reshape it to \(-1,\)"),
        (observing({"a": {"b": jnp.zeros(3)}}), EnvContractError, "observation dict 'a'; an array is needed"),
        (observing((jnp.zeros(3), jnp.zeros(3))), EnvContractError, "observation a tuple of 2; an array is needed"),
    ],
)
def test_an_object_that_breaks_the_protocol_is_refused(changes, error, text):
    with pytest.raises(error, match=text):
        make_env(broken(**changes))


def test_any_object_with_the_methods_is_an_environment():
    env = make_env(broken(time_limit=7), 2, time_limit=100)
    env.reset()
    assert env.episode_length == 7  # the shorter of both
    check_jax_env(make_jax_env("jax:Acrobot-v1"))
    assert make_jax_env("jax:Catch-v0", size=32) is make_jax_env("jax:Catch-v0", size=32)


@pytest.mark.parametrize(
    ("obs", "shape", "dtype"),
    [
        (jnp.int32(3), (1,), np.float32),
        (jnp.ones((4, 3)), (12,), np.float32),
        (jnp.ones(5, jnp.uint8), (5,), np.float32),
        (jnp.ones(5, bool), (5,), np.float32),
        (jnp.ones((8, 6), jnp.uint8), (8, 6, 1), np.uint8),
        (jnp.ones((8, 6, 3), jnp.uint8), (8, 6, 3), np.uint8),
        (jnp.full((8, 6, 3), 0.5, jnp.bfloat16), (8, 6, 3), np.float32),
        (jnp.ones((8, 6, 3), bool), (8, 6, 3), np.float32),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if isinstance(value, jax.Array) else None,
)
def test_observations_are_what_the_same_arrays_from_gymnasium_are(obs, shape, dtype):
    for changes in (observing(obs), observing({"one": obs, "other": jnp.zeros(2)})):
        env = make_env(broken(**changes), 2, action_repeat=2)
        rows = [env.reset(), env.step(env.sample_actions(np.random.default_rng(0)))]
        for row in rows:
            single = not isinstance(env.obs_shape, dict)
            found = row.obs if single else row.obs["one"]
            assert (env.obs_shape if single else env.obs_shape["one"]) == shape
            assert (env.obs_dtype if single else env.obs_dtype["one"]) == dtype
            assert (found.shape, found.dtype) == ((2, *shape), dtype)
            np.testing.assert_array_equal(found[0].ravel(), np.asarray(obs, np.float32).ravel())


def test_pictures_of_floats_beyond_1_are_refused_by_replay():
    env = make_env(broken(**observing(jnp.full((8, 8, 3), 7.0))))
    with pytest.raises(DataError, match="float images from 0 to 7; floats are 0–1"):
        ReplayBuffer(10).add_episode(np.repeat(env.reset().obs, 3, 0), np.zeros((2, 1)), np.zeros(2), truncated=True)


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (types.SimpleNamespace(step=None, obs_shape=(3,)), "lacks reset, action_dim, action_type, time_limit; see"),
        (Pendulum, "returned a Pendulum; .* is an environment in JAX: give make_env the object itself"),
        (Brax(), "not Brax. worldloom.envs.jax.adapt makes an environment in JAX of a Brax"),
        (Brax, "returned a Brax; .* worldloom.envs.jax.adapt makes"),
        (object(), "or one in JAX, not object.$"),
    ],
)
def test_an_object_that_is_nearly_an_environment_is_told_what_it_lacks(env, text):
    with pytest.raises(ConfigError, match=text):
        make_env(env)


def test_the_environment_of_the_page_works():
    page = (Path(worldloom.__file__).parent / "docs" / "jax_environments.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Walk" in block)
    namespace = {"make_env": make_env}
    exec(compile(example, "jax_environments.md", "exec"), namespace)
    env = namespace["env"]
    env.reset()
    ends = [end for _ in range(25) for end in env.step(np.ones((16, 1))).events]
    assert all(end.info == {"success": 1.0} and end.length <= 4 for end in ends)
    assert len(ends) > 60


def test_nan_is_refused_or_ends_the_episode():
    env = Pendulum()
    bad = broken(step=lambda key, s, a: (*env.step(key, s, a)[:2], jnp.float32(jnp.nan), *env.step(key, s, a)[3:]))
    world = make_env(bad, 2)
    world.reset()
    with pytest.raises(DataError, match=r"'reward' came back NaN or infinite from environments \[0, 1\]"):
        world.step(np.zeros((2, 1)))
    world = make_env(bad, 2, on_bad_step="restart")
    world.reset()
    assert world.step(np.zeros((2, 1))).is_last.all()
    assert world.step(np.zeros((2, 1))).is_first.all()
