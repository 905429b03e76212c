"""The check values of the specification, exact edge cases, and the statistics of samples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.dreamer.losses import replay_return, update_return_range
from worldloom.models.params import flatten
from worldloom.nn.linear import MLP, BlockLinear, Linear, OneDraw, RMSNorm, truncated_normal
from worldloom.ops.distributions import Categorical, Normal, OneHot, binary_cross_entropy
from worldloom.ops.returns import lambda_return
from worldloom.ops.symexp_twohot import symexp_bins, symexp_twohot_loss, symexp_twohot_mean
from worldloom.optim import clip_by_agc, scale_by_laprop

RAMP = jnp.linspace(-1.0, 1.0, 255)


def test_bins_are_antisymmetric_around_zero():
    bins = np.asarray(symexp_bins())
    assert bins.shape == (255,)
    np.testing.assert_array_equal(bins, -bins[::-1])
    np.testing.assert_allclose(bins[[127, 128, 129, 132, 133]], [0, 0.170558, 0.370205, 1.197678, 1.572508], rtol=1e-5)
    np.testing.assert_allclose(bins[[0, -1]], [-4.85165e8, 4.85165e8], rtol=1e-5)


def test_uniform_logits_mean_exactly_zero():
    for level in (0.0, 3.7, -20.0):
        assert float(symexp_twohot_mean(jnp.full(255, level))) == 0.0
    np.testing.assert_allclose(symexp_twohot_loss(jnp.zeros(255), jnp.array(2.0)), 5.541264, rtol=1e-6)


def test_twohot_check_values():
    np.testing.assert_allclose(symexp_twohot_mean(RAMP), 2.4558888e7, rtol=1e-6)
    targets = jnp.array([1.5, -3.0, 0.0, 1e9])
    losses = symexp_twohot_loss(jnp.broadcast_to(RAMP, (4, 255)), targets)
    np.testing.assert_allclose(losses, [5.658214, 5.773149, 5.703935, 4.703935], rtol=1e-6)


def test_twohot_saturates_on_the_end_bins():
    end = jax.nn.logsumexp(RAMP) - RAMP[jnp.array([0, -1])]
    far = symexp_twohot_loss(jnp.broadcast_to(RAMP, (2, 255)), jnp.array([-3e9, 3e9]))
    np.testing.assert_allclose(far, end, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(-4.8e8, 4.8e8, width=32))
def test_the_two_hot_code_decodes_to_its_target(target):
    """The loss is linear in the logits but for logsumexp: its gradient at uniform logits is 1/255 − code."""
    code = 1 / 255 - jax.grad(symexp_twohot_loss)(jnp.zeros(255), jnp.float32(target))
    code = np.asarray(code, np.float64)
    assert np.sum(np.abs(code) > 1e-6) <= 2
    np.testing.assert_allclose(code.sum(), 1, atol=1e-5)
    near = np.flatnonzero(np.abs(code) > 1e-6)
    bins = np.asarray(symexp_bins(), np.float64)
    gap = max(np.diff(bins[max(near[0] - 1, 0) : near[-1] + 2]))
    assert abs(code[near] @ bins[near] - target) <= 1e-5 * (gap + abs(target)) + 1e-6


def test_imagined_return_check_values():
    r, con, v = (jnp.array(x)[:, None] for x in ([1.0, 2, 3, 4], [0.9, 0.8, 0.7, 0.6], [10.0, 20, 30, 40]))
    returns = lambda_return(r[1:], con[1:], v[1:], 0.95)
    np.testing.assert_allclose(returns[:, 0], [20.029198, 22.669998, 28.0], rtol=1e-6)


def test_replayed_return_check_values():
    rewards, bootstrap = jnp.array([[1.0, 2, 3, 4]]), jnp.array([[10.0, 20, 30, 40]])
    last, terminal = jnp.array([[0.0, 0, 1, 0]]), jnp.zeros((1, 4))
    returns = replay_return(rewards, terminal, last, bootstrap, 1 - 1 / 333, 0.95)
    np.testing.assert_allclose(returns[0], [34.167526, 32.909912, 43.879883], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**31))
def test_lambda_return_between_one_step_and_monte_carlo(steps, lambda_, seed):
    r, v = np.random.default_rng(seed).normal(size=(2, steps)).astype(np.float32)
    discount = np.random.default_rng(seed + 1).uniform(0, 1, steps).astype(np.float32)
    expected, g = [], v[-1]
    for t in reversed(range(steps)):
        g = r[t] + discount[t] * ((1 - lambda_) * v[t] + lambda_ * g)
        expected.append(g)
    np.testing.assert_allclose(
        lambda_return(r, discount, jnp.asarray(v), lambda_), expected[::-1], rtol=1e-4, atol=1e-5
    )


def test_kl_and_entropy_check_values():
    posterior = OneHot.from_logits(jnp.array([[0.0, 1, 2, 3]]), 0.01)
    prior = OneHot.from_logits(jnp.array([[3.0, 1, 0, -1]]), 0.01)
    np.testing.assert_allclose(posterior.kl(prior), 2.571995, rtol=1e-6)
    np.testing.assert_allclose(posterior.entropy(), 0.957364, rtol=1e-6)
    assert float(posterior.kl(posterior)) == 0.0


def test_bounded_normal_check_values():
    normal = Normal.bounded(jnp.array([0.3]), jnp.array([0.2]))
    np.testing.assert_allclose(normal.std, [0.910225], rtol=1e-6)
    np.testing.assert_allclose(normal.log_prob(jnp.array([0.5])), -0.851157, rtol=1e-6)
    np.testing.assert_allclose(normal.entropy(), 1.324875, rtol=1e-6)
    start = Normal.bounded(jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_allclose([start.std[0], start.entropy()], [0.8927, 1.3055], atol=1e-4)


def test_continue_loss_of_a_perfect_head_is_the_label_entropy():
    gamma = 1 - 1 / 333
    np.testing.assert_allclose(binary_cross_entropy(jnp.log(gamma / (1 - gamma)), gamma), 0.02044, atol=1e-5)
    assert np.isfinite(binary_cross_entropy(jnp.array([-500.0, 500.0]), jnp.array([1.0, 0.0]))).all()


def test_optimizer_chain_check_values():
    p = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    clipped, _ = clip_by_agc(0.3).update({"a": jnp.array([1.0, -2.0]), "b": jnp.zeros(2)}, optax.EmptyState(), p)
    np.testing.assert_allclose(clipped["a"], [0.670820, -1.341641], rtol=1e-6)
    chain = optax.chain(clip_by_agc(0.3), scale_by_laprop(0.9, 0.999, 1e-20))
    state = chain.init(p)
    steps = zip([(1, -2), (0.5, 4), (-1, 1)], [(0.1, 0), (0, 0.2), (1e-5, -1e-5)], strict=True)
    for a, b in steps:
        grads = {"a": jnp.array(a, jnp.float32), "b": jnp.array(b, jnp.float32)}
        updates, state = chain.update(grads, state, p)
    np.testing.assert_allclose(updates["a"], [-0.100008, 0.335367], atol=2e-6)
    np.testing.assert_allclose(updates["b"], [0.320194, 0.448250], atol=2e-6)


def test_rms_norm_check_values():
    np.testing.assert_allclose(RMSNorm(4)(jnp.arange(1.0, 5)), [0.365146, 0.730292, 1.095438, 1.460584], atol=1e-6)
    assert RMSNorm(4)(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16


def test_initial_weights_are_different_numbers_of_one_draw():
    """No number is used twice, a request beyond the draw fails, and the key streams are those of plain Rngs."""
    config = DreamerV3Config(obs_shape=(3,), action_dim=2, deter_dim=64, stoch_dim=16, num_categories=4, hidden_dim=32)
    model = DreamerV3WorldModel(config, seed=3, device="cpu")
    kernels = [
        np.ravel(x) for name, x in flatten(model.params).items() if name.endswith("kernel") and "slow" not in name
    ]
    drawn = np.concatenate([x / x.std() for x in kernels if x.any()])
    # Float32 has 2^24 numbers to draw from, so some coincide; a slice used twice would be a tenth of all.
    assert len(np.unique(drawn)) > 0.97 * drawn.size
    assert abs(drawn.mean()) < 5 / drawn.size**0.5
    rngs = OneDraw(jax.random.key(0), 10)
    first, second = rngs.truncated_normal(-2, 2, (2, 3)), rngs.truncated_normal(-2, 2, (4,))
    assert len(np.unique(np.r_[np.ravel(first), second])) == 10
    assert rngs.params() == nnx.Rngs(0).params()
    with pytest.raises(TypeError):
        rngs.truncated_normal(-2, 2, (1,))


def test_initial_weights_have_the_variance_of_the_full_fan_in():
    draws = truncated_normal(nnx.Rngs(0), (200_000,), 4)
    assert abs(float(draws.std()) - 0.5) < 0.002
    assert float(jnp.abs(draws).max()) <= 2 * 1.1368 * 0.5
    block = BlockLinear(512, 512, 8, rngs=nnx.Rngs(0))
    assert abs(float(block.kernel[...].std()) * 512**0.5 - 1) < 0.02
    assert not np.any(Linear(4, 3, scale=0.0, rngs=nnx.Rngs(0)).kernel[...])


def test_block_linear_is_block_diagonal():
    layer = BlockLinear(6, 4, 2, rngs=nnx.Rngs(1))
    dense = np.zeros((6, 4), np.float32)
    dense[:3, :2], dense[3:, 2:] = layer.kernel[0], layer.kernel[1]
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    np.testing.assert_allclose(layer(x), x @ dense, rtol=1e-5, atol=1e-6)


def test_a_known_product_gives_a_gradient_to_its_kernel_alone():
    mlp = MLP(5, 4, 2, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(mlp)
    x = jax.random.normal(jax.random.key(1), (3, 2, 5))
    known = mlp.first_matmul(x)

    def value(weights, x, known):
        mlp = nnx.merge(graph, weights)
        return jnp.sum(jnp.sin(mlp.after_first_matmul(mlp.first_matmul(x, known))))

    expected, found = (jax.value_and_grad(value)(weights, x, y) for y in (None, known))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
    for gradient in jax.grad(value, argnums=(1, 2))(weights, x, known):
        np.testing.assert_array_equal(gradient, 0)


def test_return_range_moves_before_it_divides():
    moved, scale = update_return_range({"lo": 0.0, "hi": 0.0}, jnp.linspace(0.0, 1000.0, 101), 0.01)
    np.testing.assert_allclose([moved["lo"], moved["hi"], scale], [0.5, 9.5, 9.0], rtol=1e-6)
    assert float(update_return_range({"lo": 0.0, "hi": 0.5}, jnp.zeros(7), 0.01)[1]) == 1.0


# Statistics of samples. 5 standard errors of n draws bound each frequency: a false alarm once in a million.


@pytest.mark.parametrize("logits", [[0.0, 0, 0, 0], [3.0, 1, 0, -1], [100.0, 0, 0, 0]])
def test_latent_frequencies_with_unimix(logits):
    n = 40_000
    probs = 0.99 * np.asarray(jax.nn.softmax(jnp.array(logits))) + 0.01 / 4
    one_hot = OneHot.from_logits(jnp.broadcast_to(jnp.array([logits]), (n, 1, 4)), 0.01)
    draws = np.asarray(one_hot.sample_straight_through(jax.random.uniform(jax.random.key(3), (n, 1))))
    assert set(np.unique(draws)) <= {0.0, 1.0}
    np.testing.assert_array_equal(draws.sum(-1), 1)
    assert np.all(np.abs(draws.mean((0, 1)) - probs) <= 5 * np.sqrt(probs * (1 - probs) / n) + 1e-9)


def test_straight_through_gradient_is_that_of_the_probabilities():
    logits, weight = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 5.0, -2.0]])
    probs = lambda logits: 0.99 * jax.nn.softmax(logits) + 0.01 / 3  # noqa: E731
    expected = jax.grad(lambda logits: jnp.sum(weight * probs(logits)))(logits)
    for uniform in (None, jnp.array([0.1]), jnp.array([0.9])):
        through = jax.grad(
            lambda x, u=uniform: jnp.sum(weight * OneHot.from_logits(x, 0.01).sample_straight_through(u))
        )(logits)
        np.testing.assert_allclose(through, expected, rtol=1e-5)


def test_action_samples_have_the_stated_distribution():
    n = 40_000
    normal = Normal(jnp.full((n, 1), 0.4), jnp.full((n, 1), 0.7))
    draws = np.asarray(normal.sample(jax.random.key(0)))
    assert abs(draws.mean() - 0.4) < 5 * 0.7 / n**0.5
    assert abs(draws.std() - 0.7) < 5 * 0.7 / (2 * n) ** 0.5
    assert draws.max() > 1  # never clipped or squashed
    # Monte-Carlo entropy: −E log p.
    spread = np.asarray(normal.log_prob(jnp.asarray(draws)))
    assert abs(-spread.mean() - float(normal.entropy()[0])) < 5 * spread.std() / n**0.5
    categorical = Categorical.from_logits(jnp.broadcast_to(jnp.array([2.0, 0.0, -1.0]), (n, 3)))
    index = categorical.sample(jax.random.key(1))
    probs = np.exp(np.asarray(categorical.log_probs[0]))
    frequency = np.bincount(np.asarray(index), minlength=3) / n
    assert np.all(np.abs(frequency - probs) <= 5 * np.sqrt(probs * (1 - probs) / n))
    assert index.dtype == jnp.int32
    spread = np.asarray(categorical.log_prob(index))
    assert abs(-spread.mean() - float(categorical.entropy()[0])) < 5 * spread.std() / n**0.5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), st.sampled_from([0.0, 0.01, 0.5]))
def test_probabilities_are_normalised_and_bounded_below(logits, unimix):
    probs = np.exp(np.asarray(OneHot.from_logits(jnp.array([logits]), unimix).log_probs))
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-5)
    assert probs.min() >= unimix / 4 * (1 - 1e-5)
