"""Imagined and replayed actor-critic losses against the recorded ones, with random actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.dreamer.losses import actor_loss, critic_loss, imagine, replay_return, update_return_range
from worldloom.ops.distributions import Categorical, Normal
from worldloom.ops.returns import lambda_return
from worldloom.ops.symexp_twohot import symexp_twohot_mean


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * max(np.max(np.abs(expected)), 1e-30)


@pytest.mark.parametrize("case", ["continuous", "discrete", "continuous-from-range", "discrete-from-range"])
def test_imagined_losses_and_gradients(golden, case):
    data = golden("dreamerv3-actor-critic-s0")
    # Recorded [N, H + 1]; the loss is time-major.
    given = {k.removeprefix("input/"): jnp.swapaxes(v, 0, 1) for k, v in data.items() if k.startswith("input/")}
    start = {"lo": -5.0, "hi": 9.0} if "from-range" in case else {"lo": 0.0, "hi": 0.0}
    discrete = case.startswith("discrete")
    names = ("policy_logits", "value_logits") if discrete else ("mean_raw", "std_raw", "value_logits")

    def objective(raw):
        if discrete:
            policy, actions = Categorical.from_logits(raw["policy_logits"]), given["actions_discrete"]
        else:
            policy, actions = Normal.bounded(raw["mean_raw"], raw["std_raw"]), given["actions"]
        values = symexp_twohot_mean(jax.lax.stop_gradient(raw["value_logits"]))
        continues = given["continues"]
        returns = lambda_return(given["rewards"][1:], continues[1:], values[1:], 0.95)
        moved, scale = update_return_range(start, returns, 0.01)
        weights = jnp.cumprod(continues, 0)[:-1]
        slow = symexp_twohot_mean(given["slow_logits"][:-1])
        advantages = (returns - values[:-1]) / scale
        actor = weights * actor_loss({"action": policy}, {"action": actions}, advantages, 3e-4)
        critic = weights * critic_loss(raw["value_logits"][:-1], returns, slow, 1.0)
        return actor.mean() + critic.mean(), (actor, critic, returns, moved)

    grads, (actor, critic, returns, moved) = jax.grad(objective, has_aux=True)({n: given[n] for n in names})
    expected = {k.removeprefix(f"expect/{case}/"): v for k, v in data.items() if k.startswith(f"expect/{case}/")}
    assert_close(actor.T, expected["policy_loss"])
    assert_close(critic.T, expected["value_loss"])
    assert_close(returns.T, expected["returns"])
    assert_close(moved["lo"], expected["range_lo"])
    assert_close(moved["hi"], expected["range_hi"])
    for name in names:
        assert_close(jnp.swapaxes(grads[name], 0, 1), expected[f"grad/{name}"])


def test_replayed_loss_and_gradients(golden):
    data = golden("dreamerv3-actor-critic-s0")
    given = {k.removeprefix("replay/input/"): jnp.asarray(v) for k, v in data.items() if k.startswith("replay/input/")}
    last = given["is_last"].astype(jnp.float32)
    returns = replay_return(
        given["rewards"], given["is_terminal"].astype(jnp.float32), last, given["bootstrap"], 1 - 1 / 333, 0.95
    )
    slow = symexp_twohot_mean(given["slow_logits"][:, :-1])

    def objective(logits):
        elements = (1 - last[:, :-1]) * critic_loss(logits[:, :-1], returns, slow, 1.0)
        return elements.mean(), elements

    gradient, elements = jax.grad(objective, has_aux=True)(given["value_logits"])
    assert_close(returns, data["replay/expect/returns"])
    assert_close(elements, data["replay/expect/loss"])
    assert_close(gradient, data["replay/expect/grad/value_logits"])


@pytest.mark.parametrize("drawn", [False, True])
def test_imagination_returns_the_actors_first_products(drawn):
    """Actions are samples of the policy at their features; the products are those the loss does not compute again."""
    config = DreamerV3Config(
        obs_shape=(3,), action_dim=2, deter_dim=32, stoch_dim=12, num_categories=4, hidden_dim=8, mlp_layers=2
    )
    model = DreamerV3WorldModel(config, device="cpu", dtype=jnp.float32)
    starts = model.initial_state(5)
    key = jax.random.key(0) if drawn else None
    features, actions, products = imagine(model, starts, 4, key)
    assert features.shape[:2] == actions["action"].shape[:2] == products.shape[:2] == (5, 5)
    np.testing.assert_allclose(products, model.actor.first_matmul(features), rtol=1e-5, atol=1e-6)
    policy = model.actor(features)["action"]
    distance = np.abs(actions["action"] - policy.mean) / np.asarray(policy.std)
    if drawn:
        assert 0 < distance.mean() < 2
        assert len(np.unique(distance)) == distance.size
    else:
        np.testing.assert_allclose(distance, 0, atol=1e-5)
