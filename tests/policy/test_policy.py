"""Agents take what environments give and return what they take, from the newest weights."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gymnasium import spaces
from worlds import Arm, Buttons, Camera, Robot, World, equal, small

from worldloom import Policy
from worldloom.acting.budget import largest_plan
from worldloom.envs import EnvSpaces, make_env
from worldloom.errors import ConfigError, DataError, WeightsError

PAIRS = [
    ("dreamerv3", Arm), ("dreamerv3", Buttons), ("dreamerv3", Camera), ("dreamerv3", Robot),
    ("tdmpc2", Arm), ("tdmpc2", Buttons), ("tdmpc2", Camera),
]  # fmt: skip
NAMES = [f"{family}-{env.__name__}" for family, env in PAIRS]
FAMILIES = ["dreamerv3", "tdmpc2"]


@pytest.fixture
def compilations():
    """A list that grows by one for every program that XLA compiles."""
    compiled = []

    def count(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(count)


# ---- what goes in and comes out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "env"), PAIRS, ids=NAMES)
def test_an_agent_plays_an_environment_as_it_is(family, env):
    world = env()
    policy = small(family, env).policy(world)
    for episode in range(2):
        obs, _ = world.reset(seed=episode)
        policy.reset()
        over = False
        while not over:
            action = policy(obs)
            assert isinstance(action, int) == isinstance(world.action_space, spaces.Discrete)
            obs, _, terminated, truncated, _ = world.step(action)  # checks the action
            over = terminated or truncated


@pytest.mark.parametrize(("family", "env"), PAIRS, ids=NAMES)
def test_a_vector_of_environments_gets_a_batch_of_actions(family, env):
    vector = gym.vector.SyncVectorEnv([env] * 3)
    policy = small(family, env).policy(vector)
    assert policy.num_envs == 3
    obs, _ = vector.reset(seed=0)
    for _ in range(7):
        obs, *_ = vector.step(policy(obs))
    with pytest.raises(DataError, match="acts in 3"):
        policy(env.observation_space.sample())
    vector.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_own_environments_get_actions_as_they_take_them(family):
    with make_env(Arm, num_envs=2) as env:
        policy = small(family).policy(env)
        now = env.reset()
        for _ in range(12):
            action = policy(now.obs, is_first=now.is_first)
            assert action.shape == (2, 2)
            assert np.abs(action).max() <= 1
            now = env.step(action)


@pytest.mark.parametrize("family", FAMILIES)
def test_actions_are_the_models_clipped_and_scaled(family):
    model = small(family)
    native, agents = model.policy(Arm()), model.policy()
    obs = np.float32([0.5, -1, 2])
    low, high = Arm.action_space.low, Arm.action_space.high
    for _ in range(30):
        ours = agents(obs)
        assert ours.dtype == np.float32
        assert np.abs(ours).max() <= 1
        np.testing.assert_allclose(native(obs), low + (ours + 1) / 2 * (high - low), rtol=1e-6, atol=1e-6)


def test_observations_of_any_dtype_and_form_are_one_observation():
    model, obs = small("tdmpc2", Lattice), np.array([1, -2, 0])
    expected = model.policy(Lattice(), mode="greedy")(obs.astype(np.float32))
    for given in (
        obs, obs.astype(np.float64), obs.astype(np.int8), obs.astype(np.float16), obs.tolist(), tuple(obs.tolist()),
        jnp.asarray(obs), jnp.asarray(obs, jnp.bfloat16), obs[::-1][::-1], np.ma.array(obs),
    ):  # fmt: skip
        np.testing.assert_array_equal(model.policy(Lattice(), mode="greedy")(given), expected)
    batched = model.policy(Lattice(), mode="greedy")(obs[None])
    np.testing.assert_array_equal(batched, expected[None])


class Lattice(World):
    observation_space = spaces.Box(-5, 5, (3,), np.int64)
    action_space = spaces.Box(-3, 3, (2,))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_bytes_in_any_dtype_or_floats_where_nothing_says_bytes(family):
    model = small(family, Camera)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    policy = lambda env=None: model.policy(env, mode="greedy")  # noqa: E731
    expected = policy()(image)
    np.testing.assert_array_equal(policy(Camera())(image.astype(np.float64)), expected)
    np.testing.assert_array_equal(policy()(image.astype(np.int32)), expected)
    np.testing.assert_allclose(policy()(image / np.float32(255)), expected, atol=1e-4)
    with pytest.raises(DataError, match="integers from 0 to 255"):
        policy(Camera())(image / 255)
    with pytest.raises(DataError, match="floats from 0 to 1"):
        policy()(image.astype(np.float32))


# ---- memory, episodes, randomness --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_carry_is_that_of_act_called_by_hand(family):
    model = small(family)
    policy = model.policy(num_envs=2, mode="greedy")
    rng, carry = np.random.default_rng(0), model.algorithm.initial_carry(model.config, 2)
    act = jax.jit(lambda carry, obs, first: model.algorithm.evaluation_policy(model, carry, obs, None, is_first=first))
    for step in range(6):
        obs = rng.normal(size=(2, 3)).astype(np.float32)
        first = np.array([step == 0, step in (0, 3)])
        if step == 3:
            policy.reset(1)
        carry, expected = act(carry, obs, first)
        np.testing.assert_allclose(policy(obs), np.clip(expected, -1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_actions_and_another_others(family):
    model, obs = small(family), np.ones(3)
    play = lambda policy: [policy(obs) for _ in range(4)]  # noqa: E731
    one = play(model.policy(seed=1))
    assert equal(dict(enumerate(one)), dict(enumerate(play(model.policy(seed=1)))))
    assert not equal(dict(enumerate(one)), dict(enumerate(play(model.policy(seed=2)))))
    greedy = play(model.policy(mode="greedy", seed=1))
    assert equal(dict(enumerate(greedy)), dict(enumerate(play(model.policy(mode="greedy", seed=2)))))


def test_reset_starts_the_episodes_it_names():
    model = small("dreamerv3")
    policy = model.policy(num_envs=3, mode="greedy")
    rows = np.random.default_rng(0).normal(size=(3, 3))
    start = policy(rows)
    later = policy(rows)
    assert not np.array_equal(later, start)
    for index, where in ((1, [1]), ([0, 2], [0, 2]), (np.array([False, True, True]), [1, 2]), (None, [0, 1, 2])):
        policy(rows)
        policy.reset(index)
        again = policy(rows)
        np.testing.assert_allclose(again[where], start[where], atol=1e-6)
    policy(rows)
    np.testing.assert_allclose(policy(rows, is_first=np.array([True, False, False]))[0], start[0], atol=1e-6)
    for wrong in (3, -1, [0, 7], 1.5, np.ones(2, bool)):
        with pytest.raises(ConfigError, match="index"):
            policy.reset(wrong)
    with pytest.raises(DataError, match="is_first"):
        policy(rows, is_first=np.ones(2, bool))


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_and_changes_nothing(bad):
    model, obs = small("dreamerv3"), np.ones(3)
    policy, other = model.policy(), model.policy()
    for _ in range(2):
        np.testing.assert_array_equal(policy(obs), other(obs))
        with pytest.raises(DataError, match="NaN or infinite"):
            policy(np.array([0, bad, 0]))
    policy.reset()
    with pytest.raises(DataError, match="NaN or infinite"):
        policy(np.array([0, bad, 0]))
    other.reset()
    np.testing.assert_array_equal(policy(obs), other(obs))


def test_weights_that_give_nan_give_no_action():
    model = small("dreamerv3")
    policy = model.policy(Arm())
    good = model.params
    model.load_params(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good))
    with pytest.raises(DataError, match="NaN"):
        policy(np.ones(3))
    model.load_params(good)
    assert np.isfinite(policy(np.ones(3))).all()


def test_what_is_no_observation_is_named():
    policy = small("dreamerv3", Robot).policy(Robot())
    world = Robot()
    obs, _ = world.reset(seed=0)
    for wrong, message in [
        (world.reset(seed=0), "give only the first"),
        ({name: obs[name] for name in ("camera", "gear")}, "no 'joints'"),
        (np.zeros(3), "should be"),
        ({**obs, "camera": obs["camera"][:5]}, "shape"),
        ({**obs, "camera": "a picture"}, "numbers are needed"),
        ({**obs, "joints": [[1], [1, 2]]}, "no array of numbers"),
        ({**obs, "gear": 5}, "not in Discrete"),
    ]:
        with pytest.raises(DataError, match=message):
            policy(wrong)
    policy(obs)


def test_wrong_arguments_are_answered_with_a_sentence():
    model = small("tdmpc2")
    for arguments, message in [
        ({"mode": "random"}, "mode"),
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": True}, "num_envs"),
        ({"seed": -1}, "seed"),
        ({"max_ms": 0}, "max_ms"),
        ({"max_ms": float("nan")}, "max_ms"),
        ({"planner": {"samples": 3}}, "Did you mean 'num_samples'"),
        ({"planner": {"num_samples": 2}}, "num_elites"),
        ({"planner": {"iterations": 0}}, "iterations"),
        ({"env": "Pendulum-v1"}, "gymnasium.Env"),
        ({"env": Buttons()}, "obs_shape"),
        ({"env": gym.vector.SyncVectorEnv([Arm] * 2), "num_envs": 3}, "2 environments"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.policy(**arguments)
    with pytest.raises(ConfigError, match="does not plan"):
        small("dreamerv3").policy(planner={"num_samples": 3})
    with pytest.raises(DataError, match="tasks"):
        small("tdmpc2", num_tasks=2, episode_lengths=(5, 5)).policy()
    model.encoder.note = "changed"
    with pytest.raises(ConfigError, match="changed after it was built"):
        model.policy()


# ---- weights -----------------------------------------------------------------------------------------------------


def new_params(model, other):
    model.load_params(other.params)


def new_state(model, other):
    nnx.update(model, nnx.state(other))


def new_parts(model, other):
    for name in model.params:
        setattr(model, name, vars(other)[name])


@pytest.mark.parametrize("change", [new_params, new_state, new_parts])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_follows_its_model(family, change):
    model, other, obs = small(family), small(family, seed=1), np.ones(3)
    if family == "dreamerv3":  # its fresh actors' means are all alike
        other.load_params(jax.tree.map(lambda x: x + 0.1, other.params))
    policy = model.policy(Arm(), mode="greedy")
    before = policy(obs)
    change(model, other)
    policy.reset()
    after = policy(obs)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, other.policy(Arm(), mode="greedy")(obs))


def test_weights_that_were_deleted_after_a_change_are_not_missed():
    model, other, obs = small("tdmpc2"), small("tdmpc2", seed=1), np.ones(3)
    policy = model.policy(mode="greedy")
    policy(obs)
    old = jax.tree.leaves(model.params)
    model.load_params(other.params)
    for leaf in old:
        leaf.delete()
    policy.reset()
    np.testing.assert_array_equal(policy(obs), other.policy(mode="greedy")(obs))
    for leaf in jax.tree.leaves(model.params):
        leaf.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        policy(obs)


def test_update_follows_another_model_or_keeps_given_weights():
    model, obs = small("tdmpc2"), np.ones(3)
    others = [small("tdmpc2", seed=seed) for seed in (1, 2)]
    expected = [other.policy(mode="greedy")(obs) for other in others]
    policy = model.policy(mode="greedy")

    def act():
        policy.reset()
        return policy(obs)

    policy.update(others[0])
    np.testing.assert_array_equal(act(), expected[0])
    model.load_params(small("tdmpc2", seed=5).params)  # no longer followed
    np.testing.assert_array_equal(act(), expected[0])
    others[0].load_params(others[1].params)
    np.testing.assert_array_equal(act(), expected[1])
    from worldloom.training import TrainingConfig

    state = others[0].algorithm.init_state(small("tdmpc2", seed=1), TrainingConfig(), jax.random.key(0))
    policy.update(state)
    for leaf in jax.tree.leaves(state.params):
        leaf.delete()  # as the next update of a run does
    np.testing.assert_array_equal(act(), expected[0])
    policy.update(others[0].params)
    np.testing.assert_array_equal(act(), expected[1])

    wider = small("tdmpc2", hidden_dim=16)
    for wrong in (wider, wider.params):
        with pytest.raises(WeightsError, match="other shapes"):
            policy.update(wrong)
    with pytest.raises(WeightsError, match="other names"):
        policy.update({"a": np.zeros(3)})
    with pytest.raises(ConfigError, match="cannot take its place"):
        policy.update(small("dreamerv3"))
    np.testing.assert_array_equal(act(), expected[1])


def test_weights_on_another_device_are_moved_and_followed():
    model, obs = small("tdmpc2"), np.ones(3)
    policy = model.policy(mode="greedy", device="cpu")
    policy._device = jax.devices("cpu")[-1]
    other = small("tdmpc2", seed=1)
    numpy_weights = jax.tree.map(np.asarray, other.params)
    nnx.update(model, numpy_weights)  # weights that lie on no device
    np.testing.assert_array_equal(policy(obs), other.policy(mode="greedy")(obs))


# ---- speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "env"), [("dreamerv3", Robot), ("tdmpc2", Arm)])
def test_nothing_is_compiled_after_construction(family, env, compilations):
    jax.clear_caches()  # policies of the tests before share the program
    world = env()
    policy = small(family, env).policy(world)
    assert compilations
    obs, _ = world.reset(seed=0)
    compilations.clear()
    for step in range(1000 if family == "tdmpc2" else 300):
        policy(obs)
        if step % 100 == 3:
            policy.reset(0)
    policy.latency(3)
    assert not compilations


def test_latency_is_measured_and_changes_nothing():
    model, obs = small("dreamerv3"), np.ones(3)
    policy, other = model.policy(), model.policy()
    policy(obs), other(obs)
    latency = policy.latency(20)
    assert latency.calls == 20
    assert 0 < latency.p50_ms <= latency.p99_ms <= latency.max_ms
    np.testing.assert_array_equal(policy(obs), other(obs))


def test_a_planner_of_ones_own_acts_as_a_model_of_that_config():
    model, obs = small("tdmpc2"), np.ones(3)
    changes = {"num_samples": 8, "iterations": 1, "num_elites": 2}
    policy = model.policy(planner=changes, mode="greedy")
    assert policy.plan.items() >= changes.items()
    assert "num_samples=8" in repr(policy)
    configured = type(model)(model.config.replace(**changes), seed=0, device="cpu")
    np.testing.assert_array_equal(policy(obs), configured.policy(mode="greedy")(obs))
    assert model.config.num_samples == 16
    prior = model.policy(planner={"mpc": False}, mode="greedy")(obs)
    np.testing.assert_allclose(prior, np.asarray(model.prior(model.encode(obs[None]).z, None).mean)[0], atol=1e-6)


def test_a_time_limit_chooses_the_largest_plan_that_keeps_it(monkeypatch):
    model = small("tdmpc2")

    # Time as a function of the plan: a millisecond per 8 candidates and iteration, and one for all else.
    def work(policy, calls):
        plan = policy.plan
        return np.full(calls, 1.0 + (plan["num_samples"] * plan["iterations"] / 8 if plan["mpc"] else 0))

    monkeypatch.setattr(Policy, "_time", work)
    monkeypatch.setattr(Policy, "_compile", lambda self, config: setattr(self, "plan", {
        name: getattr(config, name) for name in model.algorithm.planner_fields}))  # fmt: skip
    for limit, samples, iterations in ((5, 16, 2), (4.9, 8, 2), (3, 8, 2), (2.9, 4, 2), (1.5, 2, 2)):
        plan = model.policy(max_ms=limit).plan
        assert (plan["num_samples"], plan["iterations"], plan["mpc"]) == (samples, iterations, True)
    assert not model.policy(max_ms=1.1).plan["mpc"]
    with pytest.raises(ConfigError, match=r"max_ms=0.9 cannot be kept: the least plan .* takes 1 ms"):
        model.policy(max_ms=0.9)


def test_a_time_limit_that_holds_is_kept(caplog):
    with caplog.at_level("INFO", logger="worldloom"):
        policy = small("tdmpc2").policy(max_ms=10_000)
    assert policy.plan["num_samples"] == 16
    assert "max_ms=10000: acting takes" in caplog.text
    small("dreamerv3").policy(max_ms=10_000)
    with pytest.raises(ConfigError, match="cannot be kept: the policy"):
        small("dreamerv3").policy(max_ms=1e-6)


def test_plans_are_ordered_by_work_and_bisected():
    plans = small("tdmpc2", num_samples=512, num_elites=64, num_pi_trajs=24, iterations=6)
    ladder = plans.algorithm.smaller_plans(plans.config)
    configs = [plans.config.replace(**change) for change in ladder]
    work = [c.num_samples * c.planner_iterations if c.mpc else 0 for c in configs]
    assert ladder[0] == {}
    assert work == sorted(work, reverse=True)
    assert work[-1] == 0
    for limit in (0.0, 1.0, 100.0, 3071.0, 3072.0, 1e9):
        timed = []
        number, ms = largest_plan(lambda n, timed=timed: timed.append(n) or float(work[n]), len(work), limit)
        assert ms == work[number] <= limit
        assert number == 0 or work[number - 1] > limit
        assert len(timed) <= 8
    assert largest_plan(lambda n: 5.0, 1, 4.0) == (None, 5.0)


def test_spaces_given_by_themselves_are_enough():
    policy = small("dreamerv3").policy(EnvSpaces(Arm.observation_space, Arm.action_space), num_envs=2)
    assert Arm.action_space.contains(policy(np.ones((2, 3)))[0])
