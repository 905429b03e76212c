"""MPPI and the cross-entropy method on problems with known answers, and what holds for any problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_quadratic import GAMMA, A, B, quadratic, riccati, transition

from worldloom.errors import ConfigError, DataError
from worldloom.planning import CategoricalActions, GaussianActions, Step, cem, mppi, refit, rollout, shift

BOTH = pytest.mark.parametrize("planner", [mppi, cem])
SMALL = {"num_samples": 32, "num_elites": 8, "iterations": 3}


# ---- A linear system with quadratic costs ---------------------------------------------------------------------------


def linear_step(x, action, key):
    return Step(*transition(x, action), GAMMA)


def cost_to_go(x, key):
    return -quadratic(x, riccati()[0])


@BOTH
@pytest.mark.parametrize("prior", [None, lambda x, key: jnp.zeros((len(x), 1))])
@pytest.mark.parametrize("start", [(0.2, 0.0), (-0.25, -0.1)])
def test_linear_quadratic_returns_are_within_two_percent_of_the_optimum(planner, prior, start):
    """Closed loop over 150 steps with plans of 3 steps, against the Riccati solution."""

    def act(carry, n):
        x, mean = carry
        key = jax.random.fold_in(jax.random.key(0), n)
        plan = planner(linear_step, cost_to_go, prior, x, shift(mean), key)
        step = linear_step(x[None], plan.action[None], None)
        return (step.latent[0], plan.mean), GAMMA**n * step.reward[0]

    first = (jnp.asarray(start, jnp.float32), jnp.zeros((3, 1)))
    (last, _), rewards = jax.jit(lambda carry: jax.lax.scan(act, carry, jnp.arange(150)))(first)
    P = riccati()[0]
    cost = -rewards.sum() + GAMMA**150 * last @ P @ last
    optimum = np.array(start) @ P @ np.array(start)
    assert optimum * 0.999 <= cost <= optimum * 1.02


def test_a_long_refinement_converges_to_the_optimal_actions():
    """Without a lower bound on the spread, cem finds the optimal sequence −K·x_t itself."""
    x = jnp.array([0.2, 0.1])
    plan = jax.jit(functools.partial(cem, linear_step, cost_to_go, None, min_std=0.0, iterations=15))(
        x, jnp.zeros((4, 1)), jax.random.key(0)
    )
    K = riccati()[1]
    expected, state = [], np.asarray(x)
    for _ in range(4):
        expected.append(-K @ state)
        state = A @ state + B @ expected[-1]
    np.testing.assert_allclose(plan.mean, expected, atol=5e-3)
    np.testing.assert_allclose(plan.action, expected[0], atol=5e-3)


# ---- Bandits ---------------------------------------------------------------------------------------------------------


def bandit(reward):
    """One state; every action is worth ``reward(action)``."""
    return lambda latent, action, key: Step(latent, reward(action), 1.0)


@BOTH
def test_the_best_arm_of_a_bandit_is_chosen_at_every_step(planner):
    worth = jnp.array([0.0, 3.0, 10.0, 9.0])
    plan = jax.jit(functools.partial(planner, bandit(lambda a: a @ worth), None, None, actions=CategoricalActions()))(
        jnp.zeros(()), jnp.zeros((2, 4))
    )
    np.testing.assert_array_equal(plan.action, [0, 0, 1, 0])
    np.testing.assert_array_equal(jnp.argmax(plan.mean, axis=-1), [2, 2])
    np.testing.assert_allclose(plan.mean.sum(-1), 1.0, rtol=1e-5)


@BOTH
def test_the_best_price_of_a_continuous_bandit_is_found_in_its_own_units(planner):
    actions = GaussianActions(jnp.array([0.0, -5.0]), jnp.array([10.0, 5.0]))
    reward = lambda a: -10.0 * (jnp.square(a[:, 0] - 7.0) + jnp.square(a[:, 1] + 9.0))  # noqa: E731
    plan = jax.jit(functools.partial(planner, bandit(reward), None, None, actions=actions, max_std=5.0))(
        {"nothing": jnp.zeros(3)}, jnp.zeros((1, 2)), jax.random.key(0)
    )
    np.testing.assert_allclose(plan.action, [7.0, -5.0], atol=0.3)  # The second optimum lies outside of the bounds.


def test_an_arm_that_only_the_prior_knows_is_found():
    """Nothing but exactly 0.123 is rewarded, which no draw hits."""
    exact = bandit(lambda a: jnp.where(a[:, 0] == 0.123, 100.0, 0.0))
    plan = functools.partial(mppi, exact, None)
    found = plan(lambda latent, key: jnp.full((latent.shape[0], 1), 0.123), jnp.zeros(1), jnp.zeros((1, 1)))
    assert found.action == np.float32(0.123)
    assert plan(None, jnp.zeros(1), jnp.zeros((1, 1))).elite_values[0] == 0.0


# ---- What holds for any problem --------------------------------------------------------------------------------------

TABLE = st.lists(st.floats(-20, 20, width=32) | st.just(float("nan")), min_size=16, max_size=16)
SEEDS = st.integers(0, 2**31 - 1)
COMMON = settings(max_examples=30, deadline=None)


def by_cell(table):
    """Transition whose reward is the table's entry for the cell of [−1, 1] that the action lies in; NaN included."""
    return bandit(lambda a: table[jnp.clip(((a[:, 0] + 1) * 8).astype(int), 0, 15)])


@functools.cache
def on_table(planner, **options):
    def plan(table, seed, low, high):
        actions = GaussianActions(low, high)
        prior = lambda latent, key: 5.0 * jax.random.normal(key, (latent.shape[0], 1))  # noqa: E731
        return planner(by_cell(table), None, prior, jnp.zeros(2), jnp.zeros((2, 1)), jax.random.key(seed),
                       actions=actions, num_prior=4, **SMALL, **options)  # fmt: skip

    return jax.jit(plan)


BOUND = st.floats(-3, 0.875, width=32, allow_subnormal=False)  # XLA's CPU code counts subnormal numbers as 0


@BOTH
@COMMON
@given(TABLE, SEEDS, BOUND, st.floats(0.125, 4, width=32), st.booleans())
def test_plans_stay_within_the_bounds(planner, table, seed, low, width, explore):
    """Whatever is rewarded, proposed by the prior, or added by exploration."""
    high = np.float32(low + width)
    plan = on_table(planner, explore=explore)(np.float32(table), seed, np.float32(low), high)
    for actions in (plan.action, plan.elite_actions):
        assert np.all((low <= np.asarray(actions)) & (np.asarray(actions) <= high))
    # A weighted mean, rounded.
    assert np.all((low - 1e-5 <= np.asarray(plan.mean)) & (np.asarray(plan.mean) <= high + 1e-5))
    np.testing.assert_allclose(plan.elite_weights.sum(), 1.0, rtol=1e-5)


@BOTH
@COMMON
@given(st.lists(st.integers(-8, 8), min_size=16, max_size=16), SEEDS, st.integers(-64, 64))
def test_adding_a_constant_to_all_values_changes_nothing(planner, table, seed, constant):
    """Whole numbers, so that the sums are exact and the plans can be compared bit for bit."""
    plan = functools.partial(on_table(planner), seed=seed, low=np.float32(-1), high=np.float32(1))
    one, other = plan(np.float32(table)), plan(np.float32(table) + constant)
    np.testing.assert_array_equal(one.action, other.action)
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.elite_values + 2 * constant, other.elite_values)  # two steps


@COMMON
@given(st.lists(st.floats(-50, 50, width=32), min_size=8, max_size=8), st.sets(st.integers(0, 7), max_size=7),
       st.sampled_from([0.0, 0.5]), st.integers(1, 8))  # fmt: skip
def test_nan_candidates_are_as_if_they_were_not_there(values, broken, temperature, num_elites):
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 8, 3)).astype(np.float32)
    values, kept = np.float32(values), [i for i in range(8) if i not in broken]
    fit = functools.partial(refit, temperature=temperature, min_std=0.0, max_std=2.0)
    alone = fit(actions[:, kept], values[kept], num_elites=min(num_elites, len(kept)))
    values[list(broken)] = np.nan
    beside = fit(actions, values, num_elites=num_elites)
    np.testing.assert_allclose(beside.mean, alone.mean, atol=1e-6)
    np.testing.assert_allclose(beside.std, alone.std, atol=1e-5)
    weights = np.asarray(beside.weights)
    assert not weights[np.isin(beside.elites, list(broken))].any()
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)


@BOTH
def test_a_plan_avoids_actions_whose_predictions_are_nan(planner):
    """NaN for everything above −0.5, and the more the better: the optimum is the last cell that is no NaN."""
    table = np.where(np.arange(16) < 4, np.arange(16), np.nan).astype(np.float32)
    plan = on_table(planner)(table, 0, np.float32(-1), np.float32(1))
    assert plan.action < -0.5
    assert np.isfinite(plan.mean).all()


@BOTH
def test_a_prior_that_gives_nan_is_ignored(planner):
    broken = lambda latent, key: jnp.full((latent.shape[0], 1), jnp.nan)  # noqa: E731
    # A reward that does not notice: 1 for NaN too.
    reward = bandit(lambda a: jnp.where(a[:, 0] < 0.5, 0.0, 1.0))
    plan = planner(reward, None, broken, jnp.zeros(1), jnp.zeros((2, 1)), jax.random.key(0), **SMALL, num_prior=4)
    assert 0.4 < plan.action <= 1.0
    assert np.isfinite(plan.mean).all()
    assert np.isfinite(plan.std).all()


@BOTH
def test_a_plan_is_finite_even_if_all_predictions_are_nan_or_infinite(planner):
    for number in (np.nan, np.inf, -np.inf):
        plan = on_table(planner)(np.full(16, number, np.float32), 0, np.float32(-1), np.float32(1))
        for field in (plan.action, plan.mean, plan.std, plan.elite_weights):
            assert np.isfinite(field).all()


# ---- Stages and arguments --------------------------------------------------------------------------------------------


def test_rollout_sums_discounted_rewards_and_stops_at_an_end():
    """Latent = steps done, which is also the reward; discount 0.5, and the second step ends the episode for some."""
    ends = jnp.array([False, True])
    step = lambda z, a, key: Step(z + 1.0, z + 1.0, jnp.where(ends & (z == 1.0), 0.0, 0.5))  # noqa: E731
    seen = rollout(step, lambda t, z: jnp.zeros((2, 1)), jnp.zeros(2), horizon=3)
    np.testing.assert_array_equal(seen.rewards, [[0, 0], [1, 1], [2, 2], [2.75, 2]])
    np.testing.assert_array_equal(seen.discounts, [[1, 1], [0.5, 0.5], [0.25, 0], [0.125, 0]])
    np.testing.assert_array_equal(seen.latents, [[0, 0], [1, 1], [2, 2], [3, 3]])


def test_shift_drops_the_first_step_and_fills_the_last():
    mean = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(shift(mean), [[3, 4], [0, 0]])
    np.testing.assert_array_equal(shift(mean, jnp.array([5.0, 6.0])), [[3, 4], [5, 6]])


def test_elites_weigh_alike_in_cem_and_by_value_in_mppi():
    plan = {
        planner: planner(bandit(lambda a: a[:, 0]), None, None, jnp.zeros(1), jnp.zeros((1, 1)), **SMALL)
        for planner in (mppi, cem)
    }
    np.testing.assert_allclose(plan[cem].elite_weights, 1 / 8, rtol=1e-6)
    expected = np.exp(0.5 * np.asarray(plan[mppi].elite_values))
    np.testing.assert_allclose(plan[mppi].elite_weights, expected / expected.sum(), rtol=1e-5)
    np.testing.assert_array_equal(plan[cem].action, plan[cem].mean[0])
    np.testing.assert_array_equal(plan[mppi].action, plan[mppi].elite_actions[0])


def test_min_and_max_std_of_zero_pin_a_dimension():
    pinned = jnp.array([1.0, 0.0])
    plan = mppi(bandit(lambda a: a.sum(-1)), None, None, jnp.zeros(1), jnp.array([[0.0, 0.25]]), jax.random.key(0),
                min_std=0.05 * pinned, max_std=2.0 * pinned, explore=True, **SMALL)  # fmt: skip
    assert plan.action[0] > 0.5
    assert plan.action[1] == 0.25


def test_a_stochastic_model_gets_a_fresh_key_at_every_step_and_none_without_a_key():
    """The reward is a draw of the key alone: values differ between steps, iterations and the prior's candidates."""
    seen = []

    def step(z, action, key):
        if key is None:
            seen.append(None)
            return Step(z, action[:, 0], 1.0)
        jax.debug.callback(lambda data: seen.append(tuple(np.ravel(data))), jax.random.key_data(key), ordered=True)
        return Step(z, jax.random.normal(key, z.shape[:1]), 1.0)

    prior = lambda z, key: jnp.zeros((z.shape[0], 1))  # noqa: E731
    plan = jax.jit(functools.partial(mppi, step, None, prior, num_prior=2, **SMALL))
    jax.block_until_ready(plan(jnp.zeros(1), jnp.zeros((2, 1)), jax.random.key(0)))
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2 + 3 * 2  # two of the prior, then three iterations of two
    seen.clear()
    plan(jnp.zeros(1), jnp.zeros((2, 1)), None)
    assert set(seen) == {None}


def test_context_reaches_the_value_one_row_per_iteration():
    """The value asks for the action +1 in all iterations but the last, and for −1 in that one."""
    wanted = jnp.array([1.0, 1.0, -1.0])
    value = lambda z, draw: -jnp.abs(z[:, 0] - draw[1])  # noqa: E731
    step = lambda z, a, key: Step(a, 0.0 * a[:, 0], 1.0)  # noqa: E731
    plan = functools.partial(mppi, step, value, None, jnp.zeros(1), jnp.zeros((1, 1)), None, **SMALL)
    assert plan(context=wanted).elite_values[0] < -0.5  # the candidates had gathered at +1
    assert plan(context=-jnp.ones(3)).elite_values[0] > -0.1


def test_a_shared_start_is_the_same_plan():
    shapes = []

    def step(x, action, key):
        shapes.append(x.shape)
        x = jnp.broadcast_to(x, (len(action), 2))
        return linear_step(x, action, key)

    plan = functools.partial(mppi, step, cost_to_go, None, jnp.array([0.2, 0.1]), jnp.zeros((2, 1)), None, **SMALL)
    one, other = plan(), plan(shared_start=True)
    np.testing.assert_allclose(one.action, other.action, rtol=1e-6)
    assert shapes == [(32, 2), (32, 2), (2,), (32, 2)]


@BOTH
def test_batches_are_a_vmap_and_keys_decide(planner):
    plan = functools.partial(planner, linear_step, cost_to_go, None, **SMALL)
    x, mean = jnp.array([[0.2, 0.0], [0.1, -0.3]]), jnp.zeros((2, 3, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(plan))(x, mean, keys)
    for i in range(2):
        np.testing.assert_allclose(together.action[i], plan(x[i], mean[i], keys[i]).action, atol=1e-5)
    same, other = plan(x[0], mean[0], keys[0]), plan(x[0], mean[0], keys[1])
    np.testing.assert_array_equal(same.action, plan(x[0], mean[0], keys[0]).action)
    assert same.mean[0, 0] != other.mean[0, 0]


def test_given_noise_replaces_the_draws():
    noise = jnp.zeros((3, 1, 32, 1)).at[:, :, 5].set(0.5)
    plan = mppi(bandit(lambda a: 100.0 * a[:, 0]), None, None, jnp.zeros(1), jnp.zeros((1, 1)), noise=noise,
                max_std=1.0, min_std=1.0, **SMALL)  # fmt: skip
    np.testing.assert_allclose(plan.action, [1.0], rtol=1e-5)  # 0.5, 1.0, then clipped


WRONG = {
    "num_elites=9": ({"num_elites": 9, "num_samples": 8}, ConfigError),
    "num_prior=32": ({"num_prior": 32, "prior": lambda z, key: jnp.zeros((32, 1))}, ConfigError),
    "iterations=0": ({"iterations": 0}, ConfigError),
    "temperature=-1": ({"temperature": -1.0}, ConfigError),
    "min_std=3": ({"min_std": 3.0}, ConfigError),
    r"mean has shape \(1,\)": ({"mean": jnp.zeros(1)}, DataError),
    r"noise has shape \(2,\)": ({"noise": jnp.zeros(2)}, DataError),
    "transition returned a tuple": ({"transition": lambda z, a, key: (z, a[:, 0], 1.0)}, DataError),
    r"a reward of shape \(32, 1\)": ({"transition": lambda z, a, key: Step(z, a, 1.0)}, DataError),
    r"a discount of shape \(1,\)": ({"transition": lambda z, a, key: Step(z, a[:, 0], jnp.ones(1))}, DataError),
    "a latent of shapes": ({"transition": lambda z, a, key: Step(z[:, :1], a[:, 0], 1.0)}, DataError),
    r"values of 32 candidates have shape \(32, 2\)": ({"estimate": lambda v, c, key: c.latents[0]}, DataError),
    "prior returned actions of shape": ({"prior": lambda z, key: jnp.zeros(1)}, DataError),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_answered_with_a_sentence(message):
    changes, error = WRONG[message]
    given = {"transition": bandit(lambda a: a[:, 0]), "value": None, "prior": None, "latent": jnp.zeros(2),
             "mean": jnp.zeros((1, 1))} | SMALL | {"num_prior": 4}  # fmt: skip
    with pytest.raises(error, match=message):
        mppi(**given | changes)


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigError, match=r"low=1\.0 must be below high=-1\.0"):
        GaussianActions(1.0, -1.0)


def test_bounds_may_be_lists_and_are_checked():
    move = lambda z, action, key: Step(z + action.sum(-1), -(z**2), 1.0)  # noqa: E731
    options = {"iterations": 1, "num_samples": 8, "num_elites": 2}
    plan = lambda **given: cem(  # noqa: E731
        move, None, None, jnp.zeros(()), jnp.zeros((2, 2)), jax.random.key(0), **options, **given
    )
    bounded = GaussianActions(low=[-1.0, 0.0], high=[0.0, 1.0])
    action = plan(actions=bounded, min_std=[0.1, 0.2], max_std=[1.0, 2.0]).action
    assert (action >= jnp.array([-1.0, 0.0])).all()
    assert (action <= jnp.array([0.0, 1.0])).all()
    for wrong in ({"min_std": [0.1] * 3}, {"actions": GaussianActions(low=-1.0, high=[1.0, 1.0, 1.0])}):
        with pytest.raises(DataError, match=r"has shape \(3,\)"):
            plan(**wrong)
    with pytest.raises(ConfigError, match="must be below high"):
        GaussianActions(low=[-1.0, 1.0], high=1.0)
