"""Layers and pure functions of TD-MPC2 against closed forms."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tdmpc2_variants import make

from worldloom.models.tdmpc2.networks import CategoricalSample
from worldloom.nn.ensemble import Ensemble
from worldloom.nn.normed import NormedLinear, NormedMLP, mish
from worldloom.ops import symlog_twohot
from worldloom.ops.random_shift import random_shift
from worldloom.ops.simnorm import simnorm
from worldloom.ops.symlog import symlog

BINS = {"num_bins": 101, "vmin": -10.0, "vmax": 10.0}
FLOAT = {"dtype": jnp.float32}


def test_mish_and_its_gradient_at_any_size():
    x = np.concatenate([np.linspace(-30, 30, 601), [-1e4, 1e4, 88.0, -88.0]]).astype(np.float32)
    exact = x.astype(np.float64) * np.tanh(np.logaddexp(0.0, x.astype(np.float64)))
    np.testing.assert_allclose(mish(x), exact, rtol=2e-6, atol=1e-30)
    slope = jax.vmap(jax.grad(mish))(x)
    numeric = jax.vmap(jax.grad(lambda x: x * jnp.tanh(jax.nn.softplus(x))))(x)
    np.testing.assert_allclose(slope, numeric, rtol=1e-4, atol=1e-6)


def test_simnorm_takes_consecutive_features():
    x = jnp.array([[0.0, np.log(3.0), 5.0, 5.0]])
    np.testing.assert_allclose(simnorm(x, 2), [[0.25, 0.75, 0.5, 0.5]], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(-22_000, 22_000, width=32))
def test_two_hot_decodes_to_what_it_encodes(x):
    weights = symlog_twohot.two_hot(jnp.float32(x), **BINS)
    np.testing.assert_allclose(weights.sum(), 1.0, atol=1e-5)
    assert np.sum(np.asarray(weights) > 0) <= 2
    decoded = symlog_twohot.decode(jnp.log(jnp.maximum(weights, 1e-30)), vmin=-10.0, vmax=10.0)
    np.testing.assert_allclose(decoded, x, rtol=2e-4, atol=1e-4)


def test_two_hot_by_hand():
    bin_50_is_zero = symlog_twohot.two_hot(jnp.float32(0.0), **BINS)
    np.testing.assert_array_equal(np.flatnonzero(bin_50_is_zero), [50])
    between = symlog_twohot.two_hot(jnp.expm1(jnp.float32(0.25)), **BINS)  # symlog 0.25 is bin 51.25
    np.testing.assert_allclose(between[51:53], [0.75, 0.25], atol=1e-5)
    for x, index in ((1e9, 100), (-1e9, 0)):
        np.testing.assert_array_equal(np.flatnonzero(symlog_twohot.two_hot(jnp.float32(x), **BINS)), [index])
    np.testing.assert_allclose(
        symlog_twohot.decode(jnp.eye(101)[100] * 1e4, vmin=-10.0, vmax=10.0), np.expm1(10.0), rtol=1e-5
    )
    np.testing.assert_allclose(symlog_twohot.decode(jnp.zeros(101), vmin=-10.0, vmax=10.0), 0.0, atol=1e-5)
    np.testing.assert_allclose(symlog_twohot.cross_entropy(jnp.zeros(101), between), np.log(101), rtol=1e-6)


def test_initial_weights_are_normal_and_not_truncated():
    layer = NormedLinear(512, 512, **FLOAT, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.affine.kernel[...])
    assert abs(kernel.std() - 0.02) < 1e-4
    assert np.abs(kernel).max() > 4 * 0.02
    np.testing.assert_array_equal(layer.affine.bias[...], 0.0)
    head = NormedMLP(4, [8], 5, zero_head=True, **FLOAT, rngs=nnx.Rngs(0)).head
    np.testing.assert_array_equal(head.kernel[...], 0.0)


def test_normed_linear_normalises_after_its_dropout():
    """Rows with all units dropped become zeros; all others have mean 0, which dropout after the norm would change."""
    layer = NormedLinear(3, 4, activation=lambda x: x, dropout=0.75, **FLOAT, rngs=nnx.Rngs(0))
    x = jnp.ones((2_000, 3))
    out = layer(x, jax.random.key(0))
    constant_rows = np.all(np.asarray(out) == 0.0, axis=-1)
    np.testing.assert_allclose(constant_rows.mean(), 0.75**4, atol=0.04)  # all four dropped
    rest = np.asarray(out)[~constant_rows]
    np.testing.assert_allclose(rest.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_array_equal(layer(x), layer(x))


def test_layer_norm_has_pytorchs_epsilon():
    layer = NormedLinear(1, 2, activation=lambda x: x, **FLOAT, rngs=nnx.Rngs(0))
    out = layer.after_affine(jnp.array([[1e-3, -1e-3]]))
    np.testing.assert_allclose(out, np.array([[1e-3, -1e-3]]) / np.sqrt(1e-6 + 1e-5), rtol=1e-4)


def test_ensemble_members_are_independent_and_gathered_first():
    build = lambda rngs: NormedMLP(3, [8], 2, dropout=0.5, **FLOAT, rngs=rngs)  # noqa: E731
    ensemble = Ensemble(build, 4, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    every = ensemble(x)
    assert every.shape == (4, 5, 2)
    assert len({float(member[0, 0]) for member in every}) == 4
    np.testing.assert_allclose(ensemble(x, members=jnp.array([2, 0])), every[jnp.array([2, 0])], atol=1e-7)
    dropped = ensemble(jnp.ones((1, 3)), jax.random.key(2))
    assert not np.allclose(dropped, ensemble(jnp.ones((1, 3)), jax.random.key(3)))
    same = Ensemble(build, 4, key=jax.random.key(0))
    np.testing.assert_array_equal(every, same(x))


def test_pairs_of_q_networks_are_uniform():
    model = make(num_q=5)
    draws = jax.vmap(model.q_pair)(jax.random.split(jax.random.key(0), 20_000))
    counts = collections.Counter(map(tuple, draws.tolist()))
    assert len(counts) == 20
    expected = 1_000
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 43.8  # 99.9 % of chi-square with 19 degrees of freedom
    np.testing.assert_array_equal(model.q_pair(None), [0, 1])


def test_prior_entropy_in_closed_form():
    """−log density of tanh(u) by the change of variables, and the mean over draws of the Gaussian's own entropy."""
    model = make()
    z = model.initial_state(1).z
    noise = jnp.array([[0.3, -0.7]])
    sample = model.prior(z, None, noise=noise)
    std = np.exp(np.asarray(sample.log_std, np.float64))
    u = np.arctanh(np.asarray(sample.mean, np.float64)) + std * np.asarray(noise)
    log_density = np.sum(-0.5 * np.asarray(noise) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)) - np.sum(
        np.log(1 - np.tanh(u) ** 2)
    )
    np.testing.assert_allclose(sample.entropy, -log_density, rtol=1e-4)
    draws = model.prior(jnp.broadcast_to(z, (50_000, z.shape[1])), None, jax.random.key(0))
    gaussian = np.sum(np.log(std) + 0.5 * np.log(2 * np.pi * np.e))
    np.testing.assert_allclose(draws.scaled_entropy.mean(), 2 * gaussian, rtol=5e-3)
    assert np.all((sample.log_std >= -10) & (sample.log_std <= 2))


def test_discrete_prior_sums_over_actions():
    model = make("discrete")
    z = jax.random.uniform(jax.random.key(0), (4, model.config.latent_dim))
    sample = model.prior(z, None, jax.random.key(1))
    worth = jnp.array([1.0, 10.0, 100.0])
    np.testing.assert_allclose(sample.expect(lambda action: action @ worth), sample.probs @ worth, rtol=1e-6)
    np.testing.assert_allclose(sample.entropy, -np.sum(sample.probs * np.log(sample.probs), -1), rtol=1e-5)
    many = model.prior(jnp.broadcast_to(z[0], (20_000, z.shape[1])), None, jax.random.key(2))
    np.testing.assert_allclose(many.action.mean(0), sample.probs[0], atol=0.015)


def test_a_certain_discrete_prior_can_be_corrected():
    """The loss's gradient on the logits is π − π*, however small the probability of the better action is."""
    values = jnp.array([[0.0, 0.02, 0.01]])
    best = jax.nn.softmax(values / 0.01, axis=-1)

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits)
        return -CategoricalSample(logits, logits, log_probs).objective(values, 0.01).sum()

    for logits in (jnp.zeros((1, 3)), jnp.array([[20.0, 0.0, 0.0]])):
        np.testing.assert_allclose(jax.grad(loss)(logits), jax.nn.softmax(logits) - best, atol=1e-6)
    # The gradient is 0 where value plus β times entropy is greatest; with β = 0 that is the best action.
    np.testing.assert_allclose(jax.grad(loss)(jnp.log(best)), np.zeros((1, 3)), atol=1e-6)
    sure = jnp.array([[-50.0, 0.0, -50.0]])
    np.testing.assert_allclose(CategoricalSample(sure, sure, sure).objective(values, 0.0), 0.0, atol=1e-6)


def test_random_shift_moves_whole_images_evenly():
    images = jnp.broadcast_to(
        jnp.arange(20.0)[:, None, None] + 100 * jnp.arange(20.0)[None, :, None], (4_000, 20, 20, 1)
    )
    images = jnp.concatenate([images, -images], axis=-1)
    shifted = np.asarray(random_shift(images, jax.random.key(0), pad=3))
    np.testing.assert_array_equal(shifted[..., 0], -shifted[..., 1])
    rows, columns = shifted[:, 10, 10, 0] % 100 - 10, shifted[:, 10, 10, 0] // 100 - 10
    counts = collections.Counter(zip(rows.tolist(), columns.tolist(), strict=True))
    assert set(counts) == {(i, j) for i in range(-3, 4) for j in range(-3, 4)}
    assert sum((n - 4_000 / 49) ** 2 / (4_000 / 49) for n in counts.values()) < 84.0  # 99.9 %, 48 degrees
    np.testing.assert_array_equal(random_shift(images[:2], jax.random.key(0), pad=0), images[:2])


def test_symlog_observations_are_fed_to_the_encoder():
    plain, logged = make(), make(symlog_obs=True)
    logged.load_params(plain.params)
    obs = jnp.array([[100.0, -5.0, 0.0, 1.0, -0.1]])
    np.testing.assert_allclose(logged.encode(obs).z, plain.encode(symlog(obs)).z, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_return_float32(dtype):
    mlp = NormedMLP(3, [8, 8], 2, dtype=dtype, rngs=nnx.Rngs(0))
    assert mlp(jnp.ones((1, 3))).dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(mlp)))
