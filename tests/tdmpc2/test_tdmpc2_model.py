"""The interface of the world model in its variants: vectors, images, discrete actions, terminations, tasks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tdmpc2_variants import VARIANTS, make, observations, random_batch, tasks

from worldloom.errors import DataError
from worldloom.models import tdmpc2
from worldloom.models.base import merge
from worldloom.models.tdmpc2 import LOSS_TERMS, TDMPC2WorldModel, initial_carry
from worldloom.models.tdmpc2.networks import FusedDynamicsReward


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_interface(variant):
    model = make(variant)
    c, task = model.config, tasks(model.config, 4)
    obs = observations(c, 4)
    state = model.encode(obs, **task)
    assert state.features.shape == model.initial_state(4).features.shape == (4, c.latent_dim)
    np.testing.assert_allclose(state.z.reshape(4, -1, c.simnorm_dim).sum(-1), 1.0, rtol=1e-5)
    actions = random_batch(c)["actions"].swapaxes(0, 1)
    observed = model.observe(state, actions[0], obs, **task)
    np.testing.assert_array_equal(observed.z, state.z)
    trajectory = model.imagine(state, actions, **task)
    step = model.predict(state, actions[0], **task)
    np.testing.assert_allclose(trajectory.states.z[1], step.z, atol=1e-6)
    assert trajectory.states.z.shape == (7, 4, c.latent_dim)
    assert trajectory.rewards.shape == trajectory.continues.shape == (6, 4)
    decoded = model.decode(state, **task)
    assert set(decoded) == ({"value", "termination", "continue"} if c.episodic else {"value"})
    assert decoded["value"].shape == (4,)
    losses = model.compute_loss(random_batch(c), jax.random.key(0))
    assert set(losses) == set(LOSS_TERMS)
    assert all(np.isfinite(value) and value.dtype == np.float32 for value in losses.values())
    for key in (None, jax.random.key(1)):
        carry, action = model.act(initial_carry(c, 4), obs, key, is_first=jnp.array([True, False, True, False]), **task)
        assert carry.shape == (4, c.horizon, c.action_dim)
        if c.action_type == "discrete":
            assert action.dtype == jnp.int32
            assert action.shape == (4,)
        else:
            assert action.shape == (4, c.action_dim)
            assert jnp.abs(action).max() <= 1.0


def test_actions_that_are_not_time_first_are_refused():
    model = make("discrete")
    state = model.encode(observations(model.config, 4))
    with pytest.raises(DataError, match=r"time first, \[H, B, ...\]; swapaxes"):
        model.imagine(state, jnp.zeros((4, 5), jnp.int32))


def test_act_needs_carry_and_flags_of_as_many_environments():
    model = make("discrete")
    one = np.asarray(observations(model.config, 1))[0]
    with pytest.raises(DataError, match=r"For a single (one|environment): obs\[None\], and action\[0\]"):
        model.act(None, one)
    obs = np.stack([one] * 3)
    with pytest.raises(DataError, match="carry is of 2 environments, obs of 3; give carry=None"):
        model.act(initial_carry(model.config, 2), obs)
    with pytest.raises(DataError, match=r"is_first has shape \(2,\); obs of 3 environments need \(3,\)"):
        model.act(None, obs, is_first=np.ones(2, bool))


def test_discrete_actions_as_integers_or_one_hots():
    model = make("discrete")
    state = model.encode(observations(model.config, 4))
    integers = np.array([0, 2, 1, 1])
    one_hots = np.eye(3, dtype=np.float32)[integers]
    np.testing.assert_array_equal(model.predict(state, integers).z, model.predict(state, one_hots).z)
    batch = random_batch(model.config)
    as_vectors = batch | {"actions": np.eye(3, dtype=np.float32)[batch["actions"]]}
    np.testing.assert_array_equal(model.compute_loss(batch)["loss"], model.compute_loss(as_vectors)["loss"])


def test_channel_last_images_are_the_same_images():
    first, last = make("image"), make("image", obs_shape=(64, 64, 3))
    last.load_params(first.params)
    obs = observations(first.config, 2)
    np.testing.assert_array_equal(first.encode(obs).z, last.encode(obs.transpose(0, 2, 3, 1)).z)
    np.testing.assert_allclose(first.encode(obs).z, first.encode(obs.astype(np.float32) / 255).z, atol=1e-6)


def test_a_dict_of_vectors_is_the_vectors_side_by_side():
    by_name = lambda model: TDMPC2WorldModel(model.config.replace(obs_shape={"b": (3,), "a": (2,)}))  # noqa: E731
    plain = make()
    named = by_name(plain)
    obs = observations(plain.config, 4)
    jax.tree.map(np.testing.assert_array_equal, plain.params, named.params)
    # In the config's order, whatever that of the dict.
    apart = {"a": obs[:, 3:], "b": obs[:, :3]}
    np.testing.assert_array_equal(named.encode(apart).z, plain.encode(obs).z)
    multitask, task = make("multitask"), jnp.array([0, 1, 2, 0])
    np.testing.assert_array_equal(by_name(multitask).encode(apart, task=task).z, multitask.encode(obs, task=task).z)


def test_every_entry_of_a_dict_counts():
    model = make("joint")
    obs = observations(model.config, 3)
    before = np.asarray(model.encode(obs).z)
    for name in obs:
        assert not np.allclose(model.encode(obs | {name: obs[name] // 2}).z, before, atol=1e-5), name


def test_a_dict_that_does_not_fit_is_refused_by_name():
    model = make("joint")
    obs = observations(model.config, 3)
    for change, message in (
        ({name: obs[name] for name in ("pos", "cam")}, r"dict with the names pos, cam, vel, not one of cam, pos\."),
        (obs["pos"], "not a .*Tracer"),
        (obs | {"pos": obs["pos"][:, :2]}, r"'pos' have shape \(3, 2\); the model takes \[\.\.\., 3\]"),
        (obs | {"pos": obs["pos"][:2]}, "different leading axes"),
        (obs | {"cam": obs["cam"].astype(np.int32)}, "'cam' are images of dtype int32; use uint8"),
    ):
        with pytest.raises(DataError, match=message):
            model.encode(change)
    with pytest.raises(DataError, match=r"act takes those of B environments, \[B, 3\]"):
        model.act(None, {name: x[0] for name, x in obs.items()})
    with pytest.raises(DataError, match="one array for this config, not a dict of a"):
        make().encode({"a": obs["pos"]})
    batch = random_batch(model.config)
    with pytest.raises(DataError, match=r"obs\['vel'\] has shape"):
        model.compute_loss(batch | {"obs": batch["obs"] | {"vel": batch["obs"]["vel"][:, :3]}})


@pytest.mark.parametrize("shape", [(5, 5, 1), (3, 7, 12), (31, 70, 1), (84, 84, 4)])
def test_pictures_of_other_sides_are_encoded_and_shifted_in_proportion(shape):
    model = make(obs_shape=shape, latent_dim=16)
    obs = observations(model.config, 2)
    state = model.encode(obs)
    np.testing.assert_allclose(state.z.reshape(2, -1, 8).sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(model.encode(obs / np.float32(255)).z, state.z, atol=1e-6)
    small = max(shape) < 64 and min(s for s in shape if s > 4) <= 10
    assert np.array_equal(model.encode(obs, jax.random.key(0)).z, state.z) == small


def test_images_are_shifted_by_a_key_only():
    model = make("image")
    obs = observations(model.config, 2)
    shifted = model.encode(obs, jax.random.key(0)).z
    assert not np.array_equal(shifted, model.encode(obs).z)
    assert not np.array_equal(shifted, model.encode(obs, jax.random.key(1)).z)


@pytest.mark.parametrize(("simnorm_dim", "sees"), [(8, False), (32, True)])
def test_a_bias_that_simplexes_cannot_see_has_no_gradient(simnorm_dim, sees):
    model = make("image", simnorm_dim=simnorm_dim)
    obs, bias = observations(model.config, 2), model.params["encoder"]["convs"][3]["bias"]

    def latent(bias):
        params = jax.tree.map(lambda x: x, model.params)
        params["encoder"]["convs"][3]["bias"] = bias
        return merge(TDMPC2WorldModel, model.config, params).encode(obs).z

    moved = jnp.abs(latent(bias + 0.1 * jnp.arange(32)) - latent(bias)).max()
    gradient = jax.grad(lambda bias: jnp.sum(jnp.sin(100 * latent(bias))))(bias)
    assert (moved > 1e-3) == sees
    assert bool(jnp.any(gradient != 0)) == sees


def test_multitask_masks_actions_and_distinguishes_tasks():
    model = make("multitask")
    obs, task = observations(model.config, 3), jnp.array([1, 1, 0])
    state = model.encode(np.stack([obs[0]] * 3), task=task)
    np.testing.assert_array_equal(state.z[0], state.z[1])
    assert not np.allclose(state.z[0], state.z[2], atol=1e-7)
    for key in (None, jax.random.key(0)):
        carry, action = model.act(None, obs, key, task=task)
        np.testing.assert_array_equal(action[:2, 1], 0.0)
        np.testing.assert_array_equal(carry[:2, :, 1], 0.0)
        assert np.all(action[2] != 0.0)
    np.testing.assert_allclose(model.gamma(task), [0.95, 0.95, 0.99])
    sample = model.prior(state.z, task, jax.random.key(0))
    np.testing.assert_array_equal(sample.action[:2, 1], 0.0)
    np.testing.assert_array_equal(sample.log_std[:2, 1], 0.0)


def test_task_is_asked_for_and_refused():
    with pytest.raises(DataError, match="3 tasks"):
        make("multitask").encode(np.zeros((2, 5), np.float32))
    with pytest.raises(DataError, match="one task"):
        make().encode(np.zeros((2, 5), np.float32), task=jnp.zeros(2, int))


def test_wrong_shapes_are_refused_with_what_is_needed():
    model = make()
    with pytest.raises(DataError, match=r"\[\.\.\., 5\]"):
        model.encode(np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match="the last of 2"):
        model.predict(model.initial_state(3), np.zeros((3, 1), np.float32))
    batch = random_batch(model.config)
    for change, message in (
        ({"obs": batch["obs"][:, :5]}, "obs has shape"),
        ({"actions": batch["actions"][..., :1]}, "actions has shape"),
        ({"rewards": batch["rewards"][:, :2]}, "horizon=2"),
        ({"is_terminal": batch["is_terminal"][:2]}, "is_terminal has shape"),
    ):
        with pytest.raises(DataError, match=message):
            model.compute_loss(batch | change)
    with pytest.raises(DataError, match="is_terminal"):
        model.compute_loss({name: batch[name] for name in ("obs", "actions", "rewards")})
    with pytest.raises(DataError, match="task"):
        make("multitask").compute_loss(batch)


def test_continues_in_place_of_is_terminal():
    model = make("episodic")
    batch = random_batch(model.config)
    other = {name: value for name, value in batch.items() if name != "is_terminal"}
    other["continues"] = 1.0 - batch["is_terminal"]
    assert model.compute_loss(batch)["loss"] == model.compute_loss(other)["loss"]


@pytest.mark.parametrize("variant", ["vector", "multitask"])
def test_fused_dynamics_and_reward_are_each_alone(variant):
    model = make(variant)
    task = jnp.asarray(2) if model.config.multitask else None
    z, actions = model.encode(observations(model.config, 7), task=task).z, jnp.linspace(-1, 1, 14).reshape(7, 2)
    for latent in (z, z[0]):
        after, reward = model.fused_dynamics_reward(task)(latent, actions)
        each = jnp.broadcast_to(latent, z.shape)
        np.testing.assert_allclose(after, model.next_latent(each, actions, task), atol=1e-6)
        np.testing.assert_allclose(reward, model.reward_logits(each, actions, task), atol=1e-6)
    assert isinstance(model.fused_dynamics_reward(task), FusedDynamicsReward)


@pytest.mark.parametrize("variant", ["multitask", "joint"])
def test_saved_model_predicts_the_same(variant, tmp_path):
    model = make(variant)
    same = TDMPC2WorldModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert same.config == model.config
    obs, task = observations(model.config, 3), tasks(model.config, 3)
    for a, b in zip(model.act(None, obs, **task), same.act(None, obs, **task), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_stays_near_float32():
    full, half = make(), make(precision="bfloat16")
    half.load_params(full.params)
    batch = random_batch(full.config)
    a, b = full.compute_loss(batch), half.compute_loss(batch)
    assert half.params["q"]["members"]["head"]["kernel"].dtype == jnp.float32
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0.05, atol=1e-3, err_msg=name)


class Halved(TDMPC2WorldModel):
    """Losses of its own: half the model's total, and a policy loss that is 7 higher."""

    def model_loss(self, batch, key=None, *, remat=False):
        total, terms, rollouts = super().model_loss(batch, key, remat=remat)
        return tdmpc2.losses.ModelLoss(total / 2, terms, rollouts)

    def policy_loss(self, rollouts, task, key=None, *, scale=None, remat=False):
        loss, metrics = super().policy_loss(rollouts, task, key, scale=scale, remat=remat)
        return tdmpc2.losses.PolicyLoss(loss + 7.0, metrics)


def test_a_subclass_may_have_other_losses():
    model = make()
    other = Halved(model.config)
    other.load_params(model.params)
    batch = random_batch(model.config)
    plain, changed = model.compute_loss(batch, jax.random.key(0)), other.compute_loss(batch, jax.random.key(0))
    assert TDMPC2WorldModel.loss_terms == LOSS_TERMS
    assert set(plain) == set(changed) == set(LOSS_TERMS)
    np.testing.assert_allclose(changed["loss"], plain["loss"] / 2, rtol=1e-6)
    np.testing.assert_allclose(changed["policy"], plain["policy"] + 7.0, rtol=1e-6)
    np.testing.assert_allclose(changed["value"], plain["value"], rtol=1e-6)


def test_losses_and_planner_do_not_import_the_world_model():
    """They state what they use of it as protocols; the world model imports them."""
    folder = Path(tdmpc2.__file__).parent
    for name in ("batch", "config", "losses", "networks", "planner"):
        assert "tdmpc2.world_model" not in (folder / f"{name}.py").read_text(encoding="utf-8"), name
