"""The reference program's recorded numbers: components, planner stages, a whole plan, three updates.

All random draws were replaced by their modes: policy noise 0, Q networks 0 and 1, no dropout, no image shift. The
multitask file has three tasks in its batch of the four that the model knows, task embeddings longer than 1, and 8 Qs.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.interop import load_official_tdmpc2, to_official_tdmpc2
from worldloom.models.tdmpc2 import LOSS_TERMS, init_state, make_update, planner
from worldloom.training.config import TrainingConfig
from worldloom.training.update_loop import CompiledUpdate, Learner, NonFiniteGuard

OPTIMIZED = os.environ.get("WORLDLOOM_TEST_OPTIMIZED") == "1"
VARIANTS = ("single", "episodic", "multitask", "image")
VALUES = {"rtol": 1e-4, "atol": 1e-4}
# After three updates: relative errors of metrics, and the share of weights within 1e-5. The gradients of a picture's
# convolutions are sums over its pixels, so rounding is more there: up to 2.1e-5, and 29 of 158,182 weights, which are
# biases of the last two convolutions. In the other files the largest errors are 5.0e-6, and all weights are within.
METRICS = {"image": 3e-5}
CLOSE_WEIGHTS = {"image": 0.9998}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def recorded(variant, golden):
    return golden(f"tdmpc2-{variant}-s0")


@pytest.fixture(scope="module")
def settings(recorded):
    return json.loads(str(recorded["config"]))


def overrides(recorded, settings):
    """Config fields that cannot be inferred from the arrays, from the reference's settings."""
    names = (
        "horizon num_samples num_elites num_pi_trajs iterations temperature min_std max_std episode_length simnorm_dim"
        " rho tau entropy_coef"
    )
    fields = {name: settings[name] for name in names.split()} | {"encoder_lr_scale": settings["enc_lr_scale"]}
    return fields | ({"episode_lengths": settings["episode_lengths"]} if "input/task" in recorded else {})


@pytest.fixture(scope="module")
def model(recorded, settings):
    return load_official_tdmpc2(recorded, precision="float32", **overrides(recorded, settings))


@pytest.fixture(scope="module")
def task(recorded):
    return jnp.asarray(recorded["input/task"]) if "input/task" in recorded else None


@pytest.fixture(scope="module")
def batch(recorded, task):
    return recorded_rows(recorded, task)


def recorded_rows(recorded, task):
    """Rows [B, H+1] by the arrival rule from the recorded transitions [H, B]."""
    arrived = lambda x: np.concatenate([np.zeros_like(x[:1]), x])[..., 0].T  # noqa: E731
    actions = recorded["input/actions"]
    rows = {
        "obs": recorded["input/obs"].swapaxes(0, 1),
        "actions": np.concatenate([actions, np.zeros_like(actions[:1])]).swapaxes(0, 1),
        "rewards": arrived(recorded["input/rewards"]),
        "is_terminal": arrived(recorded["input/terminated"]),
    }
    return rows if task is None else rows | {"task": task}


def test_components(model, recorded, task):
    expect = {name[7:]: value for name, value in recorded.items() if name.startswith("expect/")}
    state = model.encode(recorded["input/obs"][0], task=task)
    action = jnp.asarray(recorded["input/actions"][0])
    np.testing.assert_allclose(state.z, expect["z"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.predict(state, action, task=task).z, expect["next_z"], rtol=1e-5, atol=1e-6)
    logits = model.reward_logits(state.z, action, task)
    np.testing.assert_allclose(logits, expect["reward_logits"], **VALUES)
    np.testing.assert_allclose(model.decode_scalar(logits), expect["reward"][:, 0], **VALUES)
    np.testing.assert_allclose(model.q_logits(state.z, action, task), expect["q_logits"], **VALUES)
    every = jnp.arange(model.config.num_q)
    for name, target in (("q", False), ("q_target", True)):
        values = model.q_values(state.z, action, task, every, target=target)
        np.testing.assert_allclose(values, expect[name][..., 0], **VALUES)
    if model.config.episodic:
        ended = model.decode(state)["termination"]
        np.testing.assert_allclose(ended, expect["termination"][:, 0], **VALUES)


def test_policy_prior(model, recorded, task):
    sample = model.prior(
        model.encode(recorded["input/obs"][0], task=task).z, task, noise=jnp.asarray(recorded["input/eps"])
    )
    for name in ("action", "mean", "log_std", "entropy", "scaled_entropy"):
        expected = recorded[f"expect/pi_{name}"]
        np.testing.assert_allclose(
            getattr(sample, name), expected.squeeze(-1) if "entropy" in name else expected, **VALUES
        )


def first_latent(model, recorded, task):
    """Latent and task of the first environment, from which the recorded plans start."""
    state = model.encode(recorded["input/obs"][0], task=task)
    return state.z[0], None if task is None else task[0]


def test_planner_stages(model, recorded, task):
    z, task = first_latent(model, recorded, task)
    actions, c = jnp.asarray(recorded["input/plan_actions"]), model.config
    values = planner.score(model, z, actions, task=task)
    np.testing.assert_allclose(values, recorded["expect/plan_values"][:, 0], **VALUES)
    mean, std, elites, weights = planner.refit(
        actions,
        values,
        num_elites=c.num_elites,
        temperature=c.temperature,
        min_std=c.min_std,
        max_std=c.max_std,
    )
    np.testing.assert_array_equal(elites, recorded["expect/plan_elites"])
    np.testing.assert_allclose(weights, recorded["expect/plan_weights"][:, 0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mean, recorded["expect/plan_mean"], **VALUES)
    np.testing.assert_allclose(std, recorded["expect/plan_std"], **VALUES)


def test_whole_plan(model, recorded, task):
    z, task = first_latent(model, recorded, task)
    previous, noise = jnp.asarray(recorded["input/plan_prev_mean"]), jnp.asarray(recorded["input/plan_noise"])
    action, mean = planner.plan(model, z, previous, None, noise=noise, task=task)
    np.testing.assert_allclose(action, recorded["expect/plan_action"], **VALUES)
    np.testing.assert_allclose(mean, recorded["expect/plan_new_mean"], **VALUES)
    # Two environments in one call get the plans that each gets alone.
    twice = lambda x: None if x is None else jnp.stack([x, x])  # noqa: E731
    both = planner.plan(model, twice(z), twice(previous), None, noise=twice(noise), task=twice(task))
    np.testing.assert_allclose(both[0], twice(action), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["one by one", "in one call", "in parts", "rematerialised"])
def trained(request, model, batch, settings, elsewhere):
    """Three updates, however they are computed."""
    few = ("in parts",) if "task" in batch else () if not settings["episodic"] else (request.param,)
    elsewhere(request.param != "one by one" and (OPTIMIZED or request.param not in few))
    return three_updates(model, batch, settings, request.param)


def three_updates(model, batch, settings, way="one by one"):
    """The state after three updates and their metrics by name, computed in one of the ways of the fixture above."""
    batch_size = len(batch["rewards"])
    training = TrainingConfig(
        learning_rate=settings["lr"],
        grad_clip=settings["grad_clip_norm"],
        batch_size=batch_size,
        microbatches=batch_size if way == "in parts" else 1,
        remat=way == "rematerialised",
    )
    state, update = init_state(model, training, jax.random.key(0)), make_update(model.config, training)
    if way == "in one call":
        modes = CompiledUpdate(lambda state, batch, _: update(state, batch, None), LOSS_TERMS, False, False, False)
        batches = jax.tree.map(lambda x: jnp.stack([x] * 3), batch)
        names = modes.metric_names(state, batches)
        learner, output = modes(Learner(state, NonFiniteGuard.create()), batches, 3)
        return learner.state, dict(zip(names, np.asarray(output.metrics).T, strict=True))
    step, metrics = jax.jit(lambda state: update(state, batch, None)), []
    for _ in range(3):
        state, now = step(state)
        metrics.append(now)
    return state, {name: np.array([now[name] for now in metrics]) for name in metrics[0]}


def test_three_updates_report_the_recorded_metrics(trained, recorded, variant):
    names = {"total_loss": "loss", "pi_loss": "policy"}
    for name in (name for name in recorded if name.startswith("expect/metrics/")):
        official = name.removeprefix("expect/metrics/")
        ours = names.get(official, official.removesuffix("_loss"))
        np.testing.assert_allclose(trained[1][ours], recorded[name], rtol=METRICS.get(variant, 7e-6), err_msg=official)


def test_three_updates_leave_the_recorded_parameters(trained, recorded, variant):
    weights = to_official_tdmpc2(trained[0])
    expected = {name.removeprefix("after3/"): value for name, value in recorded.items() if name.startswith("after3/")}
    assert set(expected) <= set(weights)
    errors = {name: np.abs(weights[name] - value).ravel() for name, value in expected.items()}
    targets = np.concatenate([error for name, error in errors.items() if name.startswith("_target")])
    others = np.concatenate([error for name, error in errors.items() if not name.startswith("_target")])
    assert targets.max() < 3e-6
    assert others.max() < 1e-4
    assert np.mean(others < 1e-5) >= CLOSE_WEIGHTS.get(variant, 0.9999)


def test_losses_before_an_update_are_the_first_metrics(model, batch, trained):
    losses = model.compute_loss(batch)
    assert set(losses) == set(LOSS_TERMS)
    for name in LOSS_TERMS[:-1]:
        np.testing.assert_allclose(losses[name], trained[1][name][0], rtol=1e-5)
