"""The update: what it changes and what it must not change, in every variant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tdmpc2_variants import VARIANTS, make, observations, random_batch

from worldloom.algorithm import ReplaySpec
from worldloom.errors import ConfigError, DataError
from worldloom.models.tdmpc2 import (
    ALGORITHM,
    LOSS_TERMS,
    init_state,
    initial_carry,
    make_update,
    replay_spec,
    validate_data,
)
from worldloom.models.tdmpc2.networks import project_rows
from worldloom.training.config import TrainingConfig

# Compiling is all the time these tests take.
QUICK = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(0)


@functools.cache
def updating(config, training):
    """The compiled update of a model under a training config."""
    return jax.jit(make_update(config, training), compiler_options=QUICK)


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_change_every_part_and_stay_finite(variant):
    model = make(variant)
    training = TrainingConfig(grad_clip=20.0)
    state, step = init_state(model, training, jax.random.key(0)), updating(model.config, training)
    before = state.params
    for n in range(3):
        state, metrics = step(state, random_batch(model.config, seed=n), jax.random.key(n))
    assert int(state.step) == 3
    assert set(LOSS_TERMS) <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert jax.tree.structure(before) == jax.tree.structure(state.params)
    for name, part in state.params.items():
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before[name], part)
        assert any(jax.tree.leaves(moved)) or name == "scale", name


def test_the_policies_act_as_the_model_does():
    model = make("vector")
    obs, first = observations(model.config, 4), initial_carry(model.config, 4)
    for policy, explore in ((ALGORITHM.policy, True), (ALGORITHM.evaluation_policy, False)):
        act = jax.jit(lambda params, policy=policy: policy(model.rebuild(model.config, params), first, obs, KEY))
        assert_acts_alike(act(model.params), model.act(None, obs, KEY, explore=explore))


def assert_acts_alike(found, expected):
    carry, action = found
    np.testing.assert_allclose(carry, expected[0], atol=1e-5)
    np.testing.assert_allclose(action, expected[1], atol=1e-5)


def test_long_task_embeddings_are_shrunk_where_used_and_written_back():
    table = jnp.array([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0]])
    projected = project_rows(table, jnp.array([0, 1, 0]))
    np.testing.assert_allclose(projected, [[0.6, 0.8], [0.3, 0.4], [6.0, 8.0]], rtol=1e-6)
    model = make("multitask", tau=0.02)  # another config than other tests use: `make` caches, and the weights change
    params = model.params
    params["task_embedding"]["table"] = 10.0 * jnp.ones((3, 4))
    model.load_params(params)
    np.testing.assert_allclose(jnp.linalg.norm(model.task_embedding(jnp.arange(3)), axis=-1), 1.0, rtol=1e-6)
    state = init_state(model, TrainingConfig(learning_rate=1e-6), jax.random.key(0))
    batch = random_batch(model.config) | {"task": np.array([0, 1, 0, 1])}
    after, _ = updating(model.config, TrainingConfig(learning_rate=1e-6))(state, batch, jax.random.key(0))
    norms = jnp.linalg.norm(after.params["task_embedding"]["table"], axis=-1)
    np.testing.assert_allclose(norms, [1.0, 1.0, 20.0], rtol=1e-4)


def test_losses_of_a_new_model_are_known():
    """Zero heads: uniform over 101 bins, so reward and value losses are ln 101 · (1 + 0.5 + 0.25) / 3."""
    model = make(horizon=3)
    losses = model.compute_loss(random_batch(model.config), jax.random.key(0))
    expected = np.log(101) * 1.75 / 3
    np.testing.assert_allclose(expected, 2.69215, atol=5e-6)
    np.testing.assert_allclose([losses["reward"], losses["value"]], expected, rtol=1e-6)
    state = model.encode(observations(model.config, 3))
    np.testing.assert_allclose(model.decode(state)["value"], 0.0, atol=1e-6)
    np.testing.assert_allclose(model.imagine(state, jnp.zeros((2, 3, 2))).rewards, 0.0, atol=1e-6)


def test_first_update_leaves_hidden_reward_and_q_weights():
    """No gradient passes through zero heads; the heads themselves change."""
    model = make()
    state = init_state(model, TrainingConfig(grad_clip=20.0), jax.random.key(0))
    after, _ = updating(model.config, TrainingConfig(grad_clip=20.0))(
        state, random_batch(model.config), jax.random.key(0)
    )
    for part in ("reward", "q"):
        before, now = state.params[part], after.params[part]
        before, now = (x.get("members", x) for x in (before, now))
        for a, b in zip(jax.tree.leaves(before["hidden"]), jax.tree.leaves(now["hidden"]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert np.any(before["head"]["kernel"] != now["head"]["kernel"])


def test_new_targets_are_copies_and_then_follow_slowly():
    model = make()
    jax.tree.map(np.testing.assert_array_equal, model.params["q"], model.params["target_q"])
    state = init_state(model, TrainingConfig(grad_clip=20.0), jax.random.key(0))
    after, _ = updating(model.config, TrainingConfig(grad_clip=20.0))(
        state, random_batch(model.config), jax.random.key(0)
    )
    expected = jax.tree.map(lambda old, new: old + 0.01 * (new - old), state.params["target_q"], after.params["q"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), expected, after.params["target_q"])


def test_a_long_window_is_the_mean_of_its_short_ones():
    """T rows give T − H unrolls; each alone is the published update's batch."""
    model = perturbed(make())
    c, batch = model.config, random_batch(make().config, size=3, rows=6)
    parts = [
        model.compute_loss({name: value[:, t : t + c.horizon + 1] for name, value in batch.items()})
        for t in range(6 - c.horizon)
    ]
    whole = model.compute_loss(batch)
    for name in ("loss", "consistency", "reward", "value"):
        np.testing.assert_allclose(whole[name], np.mean([part[name] for part in parts]), rtol=1e-5)


def perturbed(model, seed=0):
    """A copy whose weights, zero heads included, are moved at random."""
    from worldloom.models.tdmpc2 import TDMPC2WorldModel

    draw = np.random.default_rng(seed)
    moved = TDMPC2WorldModel(model.config)
    moved.load_params(jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), model.params))
    return moved


def test_dropout_is_on_in_value_and_policy_losses_only():
    """Actions and Q pairs make a loss random too, so all draws but dropout are pinned by the rate alone."""
    batch = random_batch(make().config, seed=3)
    with_dropout, without = perturbed(make(dropout=0.5)), perturbed(make(dropout=0.0))
    for key in (jax.random.key(0), jax.random.key(1)):
        a, b = with_dropout.compute_loss(batch, key), without.compute_loss(batch, key)
        for name in ("consistency", "reward"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6)
        for name in ("value", "policy"):
            assert abs(a[name] - b[name]) > 1e-3
    a, b = with_dropout.compute_loss(batch), without.compute_loss(batch)
    np.testing.assert_allclose(a["value"], b["value"], rtol=1e-6)
    z, action = with_dropout.encode(batch["obs"][:, 0]).z, jnp.asarray(batch["actions"][:, 0])
    masks = with_dropout.q_logits(z, action, None, jax.random.key(0))
    assert not np.allclose(masks, with_dropout.q_logits(z, action, None, jax.random.key(1)))


def test_terminal_transitions_do_not_bootstrap():
    """A change of the target Q networks reaches the loss only where the next row is not terminal."""
    model = make("episodic")
    batch = random_batch(model.config, size=2, rows=3)
    batch["is_terminal"] = np.zeros((2, 3), bool)
    losses = {}
    for head in (0.0, 5.0):
        other = perturbed(model)
        params = other.params
        params["target_q"]["members"]["head"]["bias"] += head * (jnp.arange(101) == 100)
        other.load_params(params)
        for ended in (False, True):
            rows = batch | {"is_terminal": np.array([[False, ended, ended]] * 2)}
            losses[head, ended] = other.compute_loss(rows)["value"]
    assert losses[0.0, True] == losses[5.0, True]
    assert abs(losses[0.0, False] - losses[5.0, False]) > 1e-3


def test_value_scale_clamps_before_averaging():
    """All values are equal: the newest width is clamped to 1, and a scale of 3 moves 1 % of the way to it."""
    model = make(tau=0.01)
    params = model.params
    params["scale"]["value"] = jnp.float32(3.0)
    state = init_state(model, TrainingConfig(), jax.random.key(0)).replace(params=params)
    _, metrics = updating(model.config, TrainingConfig())(state, random_batch(model.config), None)
    np.testing.assert_allclose(metrics["pi_scale"], 3.0 + 0.01 * (1.0 - 3.0), rtol=1e-6)


def test_training_settings_reach_the_optimizers():
    model = make()
    batch = random_batch(model.config)

    def change(training):
        return updating(model.config, training)(init_state(model, training, jax.random.key(0)), batch, None)

    warm, metrics = change(TrainingConfig(warmup_steps=10))
    assert metrics["lr"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, warm.params["encoder"], model.params["encoder"])

    after, metrics = change(TrainingConfig(learning_rate=1e-3, grad_clip=0.0))
    np.testing.assert_allclose(metrics["lr"], 1e-3)
    move = lambda state, part: jax.tree.leaves(jax.tree.map(jnp.subtract, state.params[part], model.params[part]))  # noqa: E731
    # Adam's first step is the learning rate times the gradient's sign; the encoder's rate is 0.3 of the others'.
    np.testing.assert_allclose(max(np.abs(x).max() for x in move(after, "dynamics")), 1e-3, rtol=1e-2)
    np.testing.assert_allclose(max(np.abs(x).max() for x in move(after, "encoder")), 3e-4, rtol=1e-2)

    decayed, _ = change(TrainingConfig(learning_rate=1e-3, grad_clip=0.0, weight_decay=0.1))
    kernel = lambda state: state.params["dynamics"]["head"]["affine"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(kernel(decayed), kernel(after) - 1e-4 * kernel(state_of(model)), atol=1e-7)
    np.testing.assert_array_equal(*(x.params["dynamics"]["head"]["affine"]["bias"] for x in (decayed, after)))


def state_of(model):
    return init_state(model, TrainingConfig(), jax.random.key(0))


def test_window_holds_whole_rollouts_of_one_episode():
    config = make(horizon=3).config
    assert replay_spec(config, TrainingConfig(sequence_length=50)) == ReplaySpec(50, False, open_episodes=False)
    assert replay_spec(config, TrainingConfig(sequence_length=1)).rows == 4


def test_windows_of_terminating_episodes_run_over_their_ends():
    spec = replay_spec(make("episodic").config, TrainingConfig(sequence_length=5))
    assert spec == ReplaySpec(5, True, open_episodes=False)


def test_terminal_rows_need_an_episodic_model():
    for online, error in ((False, DataError), (True, ConfigError)):
        validate_data(make().config, has_terminals=False, online=online)
        validate_data(make("episodic").config, has_terminals=True, online=online)
        with pytest.raises(error, match="episodic=True"):
            validate_data(make().config, has_terminals=True, online=online)


def test_many_tasks_need_recorded_episodes():
    validate_data(make("multitask").config, has_terminals=False, online=False)
    with pytest.raises(ConfigError, match="recorded episodes"):
        validate_data(make("multitask").config, has_terminals=False, online=True)


def test_nothing_after_an_episode_counts():
    """The losses of a window over an episode's end are those of the rollout steps inside, whatever follows."""
    model = perturbed(make("episodic"))
    batch, other = random_batch(model.config, size=3, rows=6), random_batch(model.config, size=3, rows=6, seed=1)
    batch["is_terminal"], first = np.zeros((3, 6), bool), np.zeros((3, 6), bool)
    batch["is_terminal"][:, 3], first[:, 4] = True, True
    batch |= {"is_first": first}
    swapped = {
        name: np.concatenate([value[:, :4], other[name][:, 4:]], axis=1)
        if name in ("obs", "actions", "rewards")
        else value
        for name, value in batch.items()
    }
    a, b = model.compute_loss(batch), model.compute_loss(swapped)
    for name in ("loss", "consistency", "reward", "value", "termination"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6)
    # Without is_first what follows does count.
    unmarked = [model.compute_loss(rows | {"is_first": np.zeros((3, 6), bool)}) for rows in (batch, swapped)]
    assert abs(unmarked[0]["loss"] - unmarked[1]["loss"]) > 1e-3
    # Step h is averaged over the rollouts that have it: starts 0, 1, 2 for h = 0 and starts 0, 1 for h = 1.
    z = model.encode(batch["obs"].reshape(18, -1)).z.reshape(3, 6, -1)
    action = jnp.asarray(batch["actions"])
    one = model.next_latent(z[:, :3], action[:, :3], None)
    two = model.next_latent(one[:, :2], action[:, 1:3], None)
    error = jnp.mean((one - z[:, 1:4]) ** 2) + 0.5 * jnp.mean((two - z[:, 2:4]) ** 2)
    np.testing.assert_allclose(a["consistency"], error / 2, rtol=1e-4)


def test_updates_are_a_function_of_their_key():
    model = make()
    batch = random_batch(model.config)
    step = updating(model.config, TrainingConfig())
    runs = [step(state_of(perturbed(model)), batch, jax.random.key(seed))[0].params for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), runs[0]["q"], runs[2]["q"])))
