"""The planner on problems with known answers, and the statistics that recorded numbers cannot show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_quadratic import GAMMA, quadratic, riccati, transition
from tdmpc2_variants import make

from worldloom.models.tdmpc2 import TDMPC2Config, planner
from worldloom.models.tdmpc2.networks import CategoricalSample, GaussianSample


class Known:
    """A stand-in for the world model whose dynamics, rewards and values are given functions of latents [N, L]."""

    params = {}  # noqa: RUF012

    def __init__(self, config, step, value, ends=None, prior=None):
        self.config, self.step, self.value, self.ends = config, step, value, ends
        self.prior_action = prior or (lambda z: jnp.zeros((*z.shape[:-1], config.action_dim)))

    def fused_dynamics_reward(self, task):
        return lambda z, action: self.step(jnp.broadcast_to(z, (*action.shape[:-1], z.shape[-1])), action)

    def prior(self, z, task, key=None):
        mean = self.prior_action(z)
        if self.config.action_type == "discrete":
            return CategoricalSample(mean, mean, jnp.log(mean + 1e-30))
        noise = jnp.zeros(mean.shape) if key is None else jax.random.normal(key, mean.shape)
        return GaussianSample(jnp.clip(mean + 0.1 * noise, -1, 1), mean, mean, mean[..., 0], mean[..., 0])

    def q_values(self, z, action, task, members):
        return jnp.broadcast_to(self.value(z, action), (2, z.shape[0])) + members[:, None]

    def q_pair(self, key):
        return jnp.zeros(2)

    def decode_scalar(self, rewards):
        return rewards

    def termination_logits(self, z):
        return self.ends(z)

    def gamma(self, task):
        return jnp.float32(self.config.discounts[0])

    def action_mask(self, task):
        return jnp.ones(self.config.action_dim)


def config(**fields):
    known = {"obs_shape": (2,), "action_dim": 1, "discount": 0.99, "latent_dim": 8, "simnorm_dim": 8}
    return TDMPC2Config(**known | fields)


def inline(model):
    """``plan`` of a stand-in, under one jit."""
    return jax.jit(functools.partial(planner.plan, model))


def linear_quadratic():
    P = riccati()[0]
    # After the prior's action a = 0: reward of that step, then the optimal cost-to-go.
    return Known(config(), transition, lambda z, action: -quadratic(z, P))


@pytest.mark.parametrize("start", [(0.2, 0.0), (-0.25, -0.1)])
@pytest.mark.parametrize("seed", [None, 0])
def test_linear_quadratic_returns_are_within_two_percent_of_the_optimum(start, seed):
    model = linear_quadratic()

    def act(carry, n):
        z, mean = carry
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), n)
        action, mean = planner.plan(model, z, mean, key)
        z, reward = model.step(z[None], action[None])
        return (z[0], mean), GAMMA**n * reward[0]

    first = (jnp.asarray(start, jnp.float32), jnp.zeros((3, 1)))
    (last, _), rewards = jax.jit(lambda carry: jax.lax.scan(act, carry, jnp.arange(150)))(first)
    P = riccati()[0]
    cost = -rewards.sum() + GAMMA**150 * last @ P @ last
    optimum = np.array(start) @ P @ np.array(start)
    assert optimum * 0.999 <= cost <= optimum * 1.02


def test_actions_are_clipped_where_the_optimum_lies_outside():
    action, mean = inline(Known(config(), lambda z, a: (z, a[:, 0]), lambda z, a: 0 * z[:, 0]))(
        jnp.zeros(2), jnp.zeros((3, 1)), None
    )
    np.testing.assert_allclose(action, 1.0)
    np.testing.assert_allclose(mean, 1.0, atol=0.05)


def test_score_discounts_rewards_and_stops_at_terminations():
    """Latent = steps done; every step gives its number as reward, the end is worth 100."""
    count = lambda z, a: (z + 1.0, z[:, 0] + 1.0)  # noqa: E731
    worth = lambda z, a: 100.0 + 0 * z[:, 0]  # noqa: E731
    actions, z = jnp.zeros((3, 4, 1)), jnp.zeros(2)
    on = Known(config(), count, worth)
    expected = 1 + GAMMA * 2 + GAMMA**2 * 3 + GAMMA**3 * 100
    np.testing.assert_allclose(jax.jit(lambda z: planner.score(on, z, actions))(z), [expected] * 4, rtol=1e-6)
    # The second step's latent is terminal: its reward counts, nothing after it does.
    ended = Known(config(episodic=True), count, worth, ends=lambda z: jnp.where(z[:, 0] == 2.0, 1.0, -1.0))
    np.testing.assert_allclose(jax.jit(lambda z: planner.score(ended, z, actions))(z), [1 + GAMMA * 2] * 4, rtol=1e-6)


def test_first_plan_starts_from_zero_and_later_ones_shift_the_mean():
    """With equal weights of all candidates, the returned mean is the mean that candidates were drawn around."""
    flat = Known(config(min_std=0.05, max_std=0.05, temperature=0.0, num_samples=512, num_elites=512, iterations=1,
                        num_pi_trajs=0), lambda z, a: (z, 0 * a[:, 0]), lambda z, a: 0 * z[:, 0])  # fmt: skip
    plan = inline(flat)
    previous = jnp.array([[0.9], [0.5], [-0.5]])
    np.testing.assert_allclose(plan(jnp.zeros(2), previous, None)[1], [[0.5], [-0.5], [0.0]], atol=0.01)
    np.testing.assert_allclose(plan(jnp.zeros(2), jnp.zeros((3, 1)), None)[1], 0.0, atol=0.01)


def test_only_the_mean_is_warm_started():
    """The std starts at ``max_std`` in every plan, so that the first candidates cover the whole range."""
    flat = Known(config(temperature=0.0, num_elites=512, iterations=1, num_pi_trajs=0), lambda z, a: (z, 0 * a[:, 0]),
                 lambda z, a: 0 * z[:, 0])  # fmt: skip
    model_key = jax.random.key(0)
    actions, _ = jax.jit(jax.vmap(lambda k: planner.plan(flat, jnp.zeros(2), jnp.zeros((3, 1)), k)))(
        jax.random.split(model_key, 2_000)
    )
    # N(0, 2) clipped to ±1 is at a bound with probability 0.617.
    assert abs(np.mean(np.abs(actions) == 1.0) - 0.617) < 0.04


def test_executed_elite_is_drawn_by_weight():
    """Two candidates only, from the prior: value ±v, so that the better one is executed with probability σ(τ·2v)."""
    two = config(num_samples=3, num_pi_trajs=2, num_elites=2, temperature=0.5, iterations=1, max_std=0.05)
    # The one sampled candidate is worth −10⁶ and never among the two elites.
    value = lambda z, a: jnp.where(jnp.arange(z.shape[0]) == 0, 1.0, jnp.where(jnp.arange(z.shape[0]) == 1, -1.0, -1e6))  # noqa: E731
    model = Known(two, lambda z, a: (z, 0 * a[:, 0]), value,
                  prior=lambda z: jnp.where(jnp.arange(z.shape[0]) % 2 == 0, 0.5, -0.5)[:, None])  # fmt: skip
    plan = lambda k: planner.plan(model, jnp.zeros(2), jnp.zeros((3, 1)), k)  # noqa: E731
    actions, _ = jax.jit(jax.vmap(plan))(jax.random.split(jax.random.key(0), 4_000))
    share = np.mean(np.asarray(actions) > 0)
    expected = 1 / (1 + np.exp(-0.5 * 2.0))
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 4_000)
    assert jax.jit(lambda: planner.plan(model, jnp.zeros(2), jnp.zeros((3, 1)), None)[0])() > 0


def test_exploration_adds_the_first_steps_spread():
    """The optimum is 0 and sharp, so std falls to its bound 0.05; exploring adds noise of just that size."""
    sharp = Known(config(), lambda z, a: (z, -1e5 * a[:, 0] ** 2), lambda z, a: 0 * z[:, 0])
    keys = jax.random.split(jax.random.key(0), 1_000)
    plan = jax.jit(
        jax.vmap(lambda k, e: planner.plan(sharp, jnp.zeros(2), jnp.zeros((3, 1)), k, explore=e)[0], (0, None))
    )
    calm, noisy = plan(keys, False), plan(keys, True)
    assert np.std(calm) < 0.01
    assert abs(np.std(noisy - calm) - 0.05) < 0.005


def test_refit_in_closed_form():
    actions = jnp.array([[[0.0], [1.0], [0.5]], [[-1.0], [1.0], [9.0]]])
    values = jnp.array([0.0, 2 * np.log(3.0), -100.0])  # weights 1 : 3 at temperature 0.5
    mean, std, elites, weights = planner.refit(
        actions, values, num_elites=2, temperature=0.5, min_std=0.05, max_std=0.5
    )
    np.testing.assert_array_equal(elites, [1, 0])
    np.testing.assert_allclose(weights, [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(mean, [[0.75], [0.5]], rtol=1e-6)
    np.testing.assert_allclose(std, [[np.sqrt(0.75 * 0.25)], [0.5]], rtol=1e-6)  # √0.75 is clipped


def test_refit_counts_nan_as_zero_and_survives_infinities():
    actions = jnp.arange(5.0)[None, :, None]
    refit = functools.partial(planner.refit, num_elites=2, temperature=0.5, min_std=0.0, max_std=9.0)
    _, _, elites, weights = refit(actions, jnp.array([-1.0, jnp.nan, -2.0, -3.0, jnp.nan]))
    np.testing.assert_array_equal(elites, [1, 4])
    np.testing.assert_allclose(weights, 0.5)
    mean, std, elites, weights = refit(actions, jnp.array([0.0, jnp.inf, 1.0, -jnp.inf, jnp.nan]))
    assert elites[0] == 1
    np.testing.assert_allclose(weights, [1.0, 0.0])
    np.testing.assert_allclose((mean, std), [[[1.0]], [[0.0]]])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=8, max_size=8, unique=True), st.floats(0.01, 3), st.integers(1, 8))
def test_refit_properties(values, temperature, num_elites):
    actions = jnp.linspace(-1, 1, 2 * 8 * 3).reshape(2, 8, 3)
    values = jnp.array(values, jnp.float32)
    fit = functools.partial(planner.refit, num_elites=num_elites, temperature=temperature, min_std=0.05, max_std=2.0)
    mean, std, elites, weights = fit(actions, values)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
    assert np.all(np.diff(weights) <= 1e-7)
    assert set(np.asarray(values)[np.asarray(elites)]) == set(np.sort(np.asarray(values))[::-1][:num_elites])
    chosen = np.asarray(actions)[:, np.asarray(elites)]
    assert np.all(mean >= chosen.min(1) - 1e-5)
    assert np.all(mean <= chosen.max(1) + 1e-5)
    assert np.all((std >= 0.05) & (std <= 2.0))
    # Only differences of values matter.
    np.testing.assert_allclose(fit(actions, values + 7.0)[0], mean, atol=1e-4)


def test_discrete_plan_finds_the_only_good_sequence():
    """Five actions; only 3, 1, 4 in that order is rewarded, at the end."""
    steps = jnp.array([3, 1, 4])

    def step(z, action):
        good = jnp.argmax(action, axis=-1) == steps[z[:, 0].astype(int)]
        return jnp.stack([z[:, 0] + 1, z[:, 1] + good], axis=-1), 0.0 * z[:, 0]

    model = Known(
        config(action_type="discrete", action_dim=5, num_pi_trajs=4),
        step,
        lambda z, a: 10.0 * (z[:, 1] == 3),
        prior=lambda z: jnp.broadcast_to(jax.nn.one_hot(0, 5), (*z.shape[:-1], 5)),
    )
    action, mean = inline(model)(jnp.zeros(2), jnp.zeros((3, 5)), None)
    np.testing.assert_array_equal(action, jax.nn.one_hot(3, 5))
    np.testing.assert_array_equal(jnp.argmax(mean, -1), steps)
    np.testing.assert_allclose(mean.sum(-1), 1.0, rtol=1e-5)


def test_mixed_values_are_those_of_all_lengths():
    """Reward 1 per step and Q = 10 · (steps done), by hand for λ = 0.25; λ = 1 uses the last latent alone."""
    step = lambda z, action: (z + 1.0, jnp.ones(z.shape[0]))  # noqa: E731
    actions = jax.nn.one_hot(jnp.zeros((3, 4), int), 2)
    estimates = [0.0, 1 + 0.5 * 10, 1.5 + 0.25 * 20, 1.75 + 0.125 * 30]
    for lam, value in ((1.0, estimates[3]), (0.25, np.dot([0.75, 0.75 * 0.25, 0.75 * 0.0625, 0.25**3], estimates))):
        fields = {"action_type": "discrete", "action_dim": 2, "discount": 0.5, "planner_lambda": lam}
        model = Known(
            config(**fields), step, lambda z, a: 10.0 * z[:, 0], prior=lambda z: jnp.full((*z.shape[:-1], 2), 0.5)
        )
        found = jax.jit(lambda z, model=model: planner.score(model, z, actions))(jnp.zeros(2))
        np.testing.assert_allclose(found, np.full(4, value), rtol=1e-6)


def test_every_environment_has_its_own_plan():
    model = make()
    z = model.encode(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)).z
    means = 0.3 * jax.random.normal(jax.random.key(0), (3, 2, 2))
    together = planner.plan(model, z, means, None)
    alone = [planner.plan(model, z[i], means[i], None) for i in range(3)]
    for i in range(2):
        np.testing.assert_allclose(together[i], jnp.stack([one[i] for one in alone]), atol=1e-5)


def test_same_key_same_plan_and_other_key_another():
    model = make()
    z, mean = jnp.full((1, 16), 1 / 8), jnp.zeros((1, 2, 2))
    plan = lambda seed: np.asarray(planner.plan(model, z, mean, jax.random.key(seed))[0])  # noqa: E731
    np.testing.assert_array_equal(plan(0), plan(0))
    assert np.any(plan(0) != plan(1))
