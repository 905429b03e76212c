"""A world small enough to be solved by hand: DreamerV3 must find its dynamics, rewards, ends, values and policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.models import dreamer
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.training.config import TrainingConfig

STEPS, EPISODE = 400, 6
CONFIG = DreamerV3Config(
    obs_shape=(2,),
    action_dim=2,
    action_type="discrete",
    deter_dim=64,
    stoch_dim=16,
    num_categories=4,
    hidden_dim=32,
    mlp_layers=1,
    imagination_horizon=5,
    return_horizon=4,
    precision="float32",
)


def rows(batch_size, length, seed):
    """Action 1 is rewarded with 1; action 0 with 0, and ends the episode. Observations show the previous action."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(0, 2, (batch_size, length)).astype(np.int32)
    previous = np.pad(actions, ((0, 0), (1, 0)))[:, :-1]
    first = np.zeros((batch_size, length), bool)
    first[:, 0] = True
    for t in range(1, length):
        first[:, t] = (previous[:, t - 1] == 0) & ~first[:, t - 1]
    last = ~first & (previous == 0)
    obs = np.where(first[..., None], 0.0, np.eye(2)[previous]).astype(np.float32)
    return {
        "obs": obs,
        "actions": actions,
        "rewards": np.where(first, 0.0, previous).astype(np.float32),
        "is_first": first,
        "is_last": last,
        "is_terminal": last,
    }


@pytest.fixture(scope="module")
def trained():
    training = TrainingConfig(learning_rate=1e-3, grad_clip=0, device="cpu")
    state = dreamer.init_state(DreamerV3WorldModel(CONFIG, device="cpu"), training, jax.random.key(0))
    update = dreamer.make_update(CONFIG, training)
    batches = jax.tree.map(lambda *x: np.stack(x), *[rows(8, 8, seed) for seed in range(STEPS)])

    @jax.jit
    def train(state, batches):
        def step(state, batch):
            state, metrics = update(state, batch, jax.random.fold_in(state.key, state.step))
            return state, metrics["loss"]

        return jax.lax.scan(step, state, batches)

    state, losses = train(state, batches)
    model = DreamerV3WorldModel(CONFIG, device="cpu")
    model.load_params(state.params)
    return model, losses


def test_the_loss_falls(trained):
    _, losses = trained
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])


def test_imagination_knows_the_world(trained):
    model, _ = trained
    start = model.encode(np.zeros((1, 2), np.float32))
    good, bad = model.predict(start, np.array([1])), model.predict(start, np.array([0]))
    np.testing.assert_allclose(model.decode(good)["obs"], [[0, 1]], atol=0.1)
    np.testing.assert_allclose(model.decode(bad)["obs"], [[1, 0]], atol=0.1)
    np.testing.assert_allclose(model.decode(good)["reward"], [1], atol=0.1)
    np.testing.assert_allclose(model.decode(bad)["reward"], [0], atol=0.1)
    gamma = 1 - 1 / CONFIG.return_horizon
    np.testing.assert_allclose(model.decode(good)["continue"], [gamma], atol=0.05)
    assert float(model.decode(bad)["continue"][0]) < 0.1


def test_policy_and_value_solve_it(trained):
    model, _ = trained
    state = model.encode(np.zeros((1, 2), np.float32))
    for _ in range(3):
        probability = jnp.exp(model.actor(state.features)["action"].log_probs[0, 1])
        assert float(probability) > 0.9
        state = model.predict(state, np.array([1]))
    # The optimal policy is worth 1 / (1 − γ) = 4, the random one that filled the rows 0.8. The critic learns from
    # imagined returns of the former and, with a smaller weight, from rows of the latter: about 3 in the limit.
    assert 1.5 < float(model.decode(state)["value"][0]) < 4.0
