"""DreamerV3 against numbers recorded from the reference program, every sample replaced by its mode."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.interop.dreamerv3 import load_official_dreamerv3, official_name, to_official_dreamerv3
from worldloom.models.base import merge
from worldloom.models.dreamer import DreamerV3WorldModel, init_state, make_update
from worldloom.models.dreamer.arrays import prepare_observations
from worldloom.models.dreamer.losses import LOSS_TERMS
from worldloom.models.params import flatten
from worldloom.training.config import TrainingConfig
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard

OPTIMIZED = os.environ.get("WORLDLOOM_TEST_OPTIMIZED") == "1"
VARIANTS = ("image-continuous", "vector-discrete", "vector-free-nats")
TERMS = {
    "reconstruction": "obs",
    "reward": "rew",
    "continue": "con",
    "dynamics": "dyn",
    "representation": "rep",
    "actor": "policy",
    "critic": "value",
    "replay_critic": "repval",
}


class Recorded:
    """One golden file: its model, its batch, its expected values, and the loss and gradients computed here.

    ``benchmarks/accelerator.py`` reads the files by it too, also in other precisions.
    """

    def __init__(self, variant, data, precision="float32"):
        self.variant, self.data = variant, data
        self.config = json.loads(str(data["config"]))
        self.params = {k.removeprefix("params/"): v for k, v in data.items() if k.startswith("params/")}
        self.model = load_official_dreamerv3(
            self.params,
            obs_shape=data["input/obs"].shape[2:],
            action_dim=self.config["action_dim"],
            action_type="discrete" if self.config["discrete"] else "continuous",
            num_categories=self.config["classes"],
            precision=precision,
        )
        names = ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal")
        self.batch = {name: data[f"input/{name}"] for name in names}

        def objective(params):
            out = merge(DreamerV3WorldModel, self.model.config, params).losses(self.batch)
            return out.total, out

        grads, self.out = jax.jit(jax.grad(objective, has_aux=True))(self.model.params)
        self.grads = {official_name(name): np.asarray(g) for name, g in flatten(grads).items()}

    def observations(self):
        return prepare_observations(self.model.config, self.batch["obs"], 2)

    def expect(self, name):
        return self.data[f"expect/{name}"]


@pytest.fixture(scope="module", params=VARIANTS)
def recorded(request, golden):
    return Recorded(request.param, golden(f"dreamerv3-{request.param}-s0"))


def assert_close(actual, expected, tolerance, name=""):
    """Relative to the largest recorded value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def test_losses_per_element(recorded):
    for ours, theirs in TERMS.items():
        value = np.asarray(recorded.out.elements[ours])
        expected = recorded.expect(f"loss/{theirs}")
        if ours in ("actor", "critic"):
            value = value.mean(0).reshape(expected.shape)
        assert_close(value, expected, 1e-5, ours)
        assert_close(recorded.out.terms[ours], expected.mean(), 1e-5, ours)


def test_total_loss(recorded):
    assert_close(recorded.out.total, recorded.expect("total_loss"), 1e-5)


def test_tokens_and_features(recorded):
    latents = recorded.out.latents
    assert_close(recorded.model.encoder(recorded.observations()), recorded.expect("tokens"), 1e-5)
    assert_close(latents.deter, recorded.expect("feat/deter"), 1e-5)
    assert_close(recorded.out.posterior_logits, recorded.expect("feat/logit"), 1e-5)
    np.testing.assert_array_equal(latents.stoch, recorded.expect("feat/stoch"))


def test_gradients_of_every_parameter(recorded):
    expected = {k.removeprefix("expect/grad/"): v for k, v in recorded.data.items() if k.startswith("expect/grad/")}
    assert set(recorded.params) - set(expected) == {
        k for k in recorded.params if k.split("/")[0] in ("slowval", "slowval_count", "retnorm")
    }
    for name, gradient in expected.items():
        if _is_rounding(recorded, name):
            assert np.abs(recorded.grads[name]).max() <= 1e-6
        else:
            assert_close(recorded.grads[name], gradient, 1e-4, name)


def test_no_gradient_reaches_slow_critic_and_return_range(recorded):
    for name, gradient in recorded.grads.items():
        if name.split("/")[0] in ("slowval", "retnorm"):
            assert not np.any(gradient), name


def test_return_range_after_the_loss(recorded):
    for end in ("lo", "hi"):
        assert_close(
            recorded.out.return_range[end], recorded.expect(f"state_after_loss/retnorm/{end}/value"), 1e-5, end
        )


@pytest.mark.parametrize("way", ["one by one", "in one call", "in parts", "rematerialised"])
def test_three_optimizer_steps(recorded, way, elsewhere):
    """However they are computed."""
    few = {"image-continuous": ("one by one", "in parts"), "vector-discrete": ("one by one",)}
    elsewhere(way != "one by one" and (OPTIMIZED or way not in few.get(recorded.variant, (way,))))
    state, losses = three_updates(recorded, way)
    assert_close(losses, recorded.expect("train_losses"), 1e-5)
    ours = to_official_dreamerv3(state)
    expected = {k.removeprefix("expect/after3/"): v for k, v in recorded.data.items() if k.startswith("expect/after3/")}
    assert set(ours) == set(expected) | {"slowval_count/value"}
    off = {
        name: np.abs(ours[name] - value) > 1e-5 for name, value in expected.items() if not _is_rounding(recorded, name)
    }
    wrong = sum(int(mask.sum()) for mask in off.values())
    total = sum(mask.size for mask in off.values())
    assert wrong <= 1e-4 * total, {name: int(mask.sum()) for name, mask in off.items() if mask.any()}


def three_updates(recorded, way="one by one"):
    """The state after three updates and their losses, computed in one of the ways of the test above."""
    batch_size = len(recorded.batch["rewards"])
    training = TrainingConfig(
        learning_rate=recorded.config["lr"],
        warmup_steps=recorded.config["warmup"],
        grad_clip=0,
        device="cpu",
        batch_size=batch_size,
        microbatches=batch_size if way == "in parts" else 1,
        remat=way == "rematerialised",
    )
    state = init_state(recorded.model, training, jax.random.key(0))
    update = make_update(recorded.model.config, training)
    if way == "in one call":
        return three_at_once(update, state, recorded.batch)
    step = jax.jit(lambda state: update(state, recorded.batch, None))
    losses = []
    for _ in range(3):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    return state, losses


def three_at_once(update, state, batch):
    """The state after three updates in one compiled call, and their losses."""
    modes = CompiledUpdate(lambda state, batch, _: update(state, batch, None), LOSS_TERMS, False, False, False)
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3), batch)
    learner, output = modes(Learner(state, NonFiniteGuard.create()), batches, 3)
    return learner.state, output.metrics[:, 0]


def test_open_loop(recorded):
    model, expected = recorded.model, recorded.expect
    start = jax.tree.map(lambda x: x[:, -1], recorded.out.latents)
    actions = np.swapaxes(expected("openloop/actions"), 0, 1)
    states, rewards, continues = model.imagine(start, actions)
    later = jax.tree.map(lambda x: jnp.swapaxes(x[1:], 0, 1), states)
    assert_close(later.deter, expected("openloop/deter"), 1e-5)
    assert_close(model.rssm.prior(later.deter), expected("openloop/logit"), 1e-5)
    np.testing.assert_array_equal(later.stoch, expected("openloop/stoch"))
    assert_close(rewards.T, expected("openloop/reward"), 1e-5)
    assert_close(continues.T, expected("openloop/cont"), 1e-5)
    decoded = model.decode(later)
    assert_close(decoded["value"], expected("openloop/value"), 1e-5)
    assert_close(next(iter(model.decoder(later).values())), expected("openloop/obs"), 1e-5)
    policy = model.actor(recorded.out.latents.features)["action"]
    if recorded.config["discrete"]:
        np.testing.assert_array_equal(policy.sample(None), expected("openloop/policy_mode"))
        raw = model.actor.outputs["action"].logits(model.actor.mlp(recorded.out.latents.features))
        assert_close(raw, expected("openloop/policy_logits"), 1e-5)
    else:
        assert_close(policy.mean, expected("openloop/policy_mode"), 1e-5)
        assert_close(policy.std, expected("openloop/policy_std"), 1e-5)


def test_stepping_equals_the_sequence(recorded):
    """encode, then observe row by row, gives the states of the scan over the whole window."""
    model, batch = recorded.model, recorded.batch
    episode = 3  # rows before the first seam
    state = model.encode(batch["obs"][:, 0])
    for t in range(1, episode):
        state = model.observe(state, batch["actions"][:, t - 1], batch["obs"][:, t])
    assert_close(state.deter, recorded.expect("feat/deter")[:, episode - 1], 1e-5)


def _is_rounding(recorded, name):
    # With actions equal to the mean, the mean's gradient is 0 but for rounding (the golden README says to leave it).
    return not recorded.config["discrete"] and name.startswith("pol/head/action/mean")
