"""Exploration by disagreement: what was seen often is worth less than what was not, and the weight falls to 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom import create_world_model
from worldloom.errors import ConfigError
from worldloom.models.disagreement import advance
from worldloom.models.params import flatten
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig

SMALL = {
    "tdmpc2": {
        "latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2, "num_bins": 21, "iterations": 1,
        "num_samples": 8, "num_elites": 4, "num_pi_trajs": 2, "horizon": 2,
    },
    "dreamerv3": {
        "deter_dim": 16, "stoch_dim": 8, "num_categories": 4, "hidden_dim": 16, "mlp_layers": 1, "blocks": 2,
        "imagination_horizon": 3, "bins": 21,
    },
}  # fmt: skip
EXPLORE = {"explore": "disagreement", "explore_updates": 300, "explore_weight": 0.5, "explore_heads": 3}


def make(family, **changes):
    values = SMALL[family] | {"action_type": "discrete", "precision": "float32"} | changes
    return create_world_model(f"{family}:tiny", obs_shape=(4,), action_dim=2, seed=1, device="cpu", **values)


def one_sided(episodes=12, length=10):
    """Episodes in which only action 0 is ever taken; observations are one-hot and walk round."""
    buffer = ReplayBuffer(1_000, obs_shape=(4,), action_dim=2, action_type="discrete")
    for _ in range(episodes):
        obs = np.eye(4, dtype=np.float32)[np.arange(length + 1) % 4]
        buffer.add_episode(obs, np.zeros(length, int), rewards=np.zeros(length), truncated=True)
    return buffer


@functools.cache
def trained_model(family):
    """A model that has been trained for two thirds of the weight's decay."""
    model = make(family, **EXPLORE)
    config = TrainingConfig(total_steps=200, batch_size=8, sequence_length=6, learning_rate=3e-3, device="cpu", seed=0)
    Trainer(model, config, callbacks=[]).train(one_sided())
    return model


@pytest.fixture(params=SMALL)
def trained(request):
    return request.param, trained_model(request.param)


@pytest.fixture
def tdmpc2():
    return trained_model("tdmpc2")


def inputs(family, model):
    """Latent and action side by side of every observation with action 0 and with action 1, [2, 4, ...]."""
    obs = np.eye(4, dtype=np.float32)
    state = model.encode(obs)
    latent = state.features if family == "dreamerv3" else state.z
    actions = jnp.eye(2)[:, None].repeat(4, 1)
    return jnp.concatenate([jnp.broadcast_to(latent, (2, *latent.shape)), actions], -1)


def test_an_action_never_taken_is_worth_more(trained):
    family, model = trained
    seen, unseen = model.explorer.spread(inputs(family, model)).mean(1)
    assert unseen > 1.5 * seen
    seen, unseen = model.explorer.reward(inputs(family, model)).mean(1)
    assert unseen > max(seen, 0)


def test_the_weight_falls_linearly(trained):
    _, model = trained
    np.testing.assert_allclose(model.explorer.weight[...], 0.5 * (1 - 200 / 300), rtol=1e-5)
    assert model.explorer.scale[...] > 0


def test_the_weight_ends_at_zero_and_the_first_average_is_the_first_batch():
    part = {"weight": jnp.asarray(0.5), "scale": jnp.zeros(()), "networks": {}}
    part = advance(part, jnp.asarray(3.0), weight=0.5, updates=2)
    assert (float(part["weight"]), float(part["scale"])) == (0.25, 3.0)
    for _ in range(3):
        part = advance(part, jnp.asarray(1.0), weight=0.5, updates=2)
    assert float(part["weight"]) == 0.0
    assert 2.9 < float(part["scale"]) < 3.0


def test_there_is_no_reward_before_the_first_update():
    for family in SMALL:
        model = make(family, **EXPLORE)
        np.testing.assert_array_equal(model.explorer.reward(inputs(family, model)), 0)


def test_tdmpc2_is_not_paid_for_exploring_when_it_is_evaluated(tdmpc2):
    key, obs = jax.random.key(0), np.eye(4, dtype=np.float32)
    without = make("tdmpc2")
    without.load_params({name: part for name, part in tdmpc2.params.items() if name != "explorer"})
    for explore in (False, True):
        plans = [m.act(None, obs, key, explore=explore)[0] for m in (tdmpc2, without)]
        assert np.array_equal(*plans) == (not explore)


def one_update(model, batch, parts):
    """The explorer's networks by path and all metrics after one update in ``parts``, with the modes of all draws."""
    algorithm = model.algorithm
    rows, columns = batch["rewards"].shape
    config = TrainingConfig(batch_size=rows, sequence_length=columns, learning_rate=3e-3, microbatches=parts)
    state = algorithm.init_state(model, config, jax.random.key(0))
    state, metrics = jax.jit(algorithm.make_update(model.config, config))(state, batch, None)
    return flatten(state.params["explorer"]["networks"]), metrics


@pytest.mark.parametrize("family", SMALL)
def test_the_explorers_loss_is_a_term_of_the_total(family):
    """It is added to the losses of a model that does not explore, and its networks learn by it; in parts too."""
    model, without = make(family, **EXPLORE), make(family)
    assert "explorer" not in without.params
    without.load_params({name: part for name, part in model.params.items() if name != "explorer"})
    batch = one_sided(4).sample(4, 6, seed=0)
    batch = {name: rows for name, rows in batch.items() if name != "row_ids"}
    losses, others = model.compute_loss(batch), without.compute_loss(batch)
    # Nothing is paid before the first update, so that all other terms are those of the model without.
    for name in others.keys() - {"loss"}:
        np.testing.assert_allclose(losses[name], others[name], rtol=1e-5, atol=1e-6, err_msg=name)
    whole, metrics = one_update(model, batch, 1)
    halves, of_halves = one_update(model, batch, 2)
    term = metrics["disagreement"]
    assert term > 0.01 * abs(others["loss"])
    np.testing.assert_allclose(of_halves["disagreement"], term, rtol=1e-5)
    for total in (losses["loss"], metrics["loss"], of_halves["loss"]):
        np.testing.assert_allclose(total, others["loss"] + term, rtol=1e-5)

    for name, weights in flatten(model.params["explorer"]["networks"]).items():
        assert np.abs(whole[name] - weights).max() > 1e-3, name
        np.testing.assert_allclose(halves[name], whole[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["tdmpc2:tiny", "dreamerv3:tiny"])
def test_settings_of_exploration_without_it_are_refused_but_read_from_files(name):
    given = {"obs_shape": (3,), "action_dim": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"explore_weight=3\.0 has no effect without explore='disagreement'"):
        create_world_model(name, **given, explore_weight=3.0)
    config = create_world_model(name, **given, explore="disagreement", explore_weight=3.0).config
    # As versions saved it that did not refuse it.
    saved = config.to_dict() | {"explore": "none"}
    assert type(config).from_dict(saved).explore_weight == 3.0
    assert config.replace(explore="none").explore == "none"


@pytest.mark.parametrize("wrong", [{"explore": "curiosity"}, {"explore_heads": 1}, {"explore_updates": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    for family in SMALL:
        with pytest.raises(ConfigError):
            make(family, **EXPLORE | wrong)
