"""Weights that Newt's program saved, and its outputs: ``tests/data/make_newt_files.py`` ran it and recorded them.

The file of many tasks has four, with 4, 2, 1 and 3 actions and text embeddings with norms of 3, 15.6, 0.5 and 9. The
single task has 3 actions of 4.
"""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from worldloom.errors import WeightsError
from worldloom.interop import load_official_newt
from worldloom.interop.tdmpc2 import read_official_tdmpc2
from worldloom.models.params import flatten

DATA = Path(__file__).resolve().parents[1] / "data"
OBS = 7
HALF_LOG_2PI = 0.5 * np.log(2 * np.pi)


def path(variant):
    return DATA / f"newt-{variant}-s0.pt"


def outputs(model, recorded):
    """What the file expects, by its names, computed by ``model``."""
    actions = model.config.action_dim
    task = jnp.asarray(recorded["input/task"]) if model.config.multitask else None
    action = jnp.asarray(recorded["input/action"])[:, :actions]
    state = model.encode(recorded["input/obs"], task=task)
    logits = model.reward_logits(state.z, action, task)
    prior = model.prior(state.z, task, noise=jnp.asarray(recorded["input/noise"])[:, :actions])
    found = {
        "z": state.z,
        "next_z": model.predict(state, action, task=task).z,
        "reward_logits": logits,
        "reward": model.decode_scalar(logits),
        "mean_action": prior.mean,
        **{f"pi_{name}": getattr(prior, name) for name in ("action", "mean", "log_std", "entropy", "scaled_entropy")},
    }
    for suffix, target in (("", False), ("_target", True)):
        pair = model.q_values(state.z, action, task, jnp.asarray(recorded["input/pair"]), target=target)
        found[f"q_logits{suffix}"] = model.q_logits(state.z, action, task, target=target)
        found |= {f"q_min{suffix}": pair.min(0), f"q_avg{suffix}": pair.mean(0)}
    return found


@pytest.mark.parametrize("variant", ["multitask", "single"])
def test_outputs_are_those_of_newts_program(variant, golden):
    recorded = golden(f"newt-{variant}-s0")
    expected = {name.removeprefix("expect/"): x for name, x in recorded.items() if name.startswith("expect/")}
    model = load_official_newt(path(variant), obs_dim=OBS, precision="float32")
    if variant == "single":
        # Each action that the task does not have adds a constant to Newt's entropies, and 0 elsewhere.
        cut = 4 - model.config.action_dim
        for name in ("mean_action", "pi_action", "pi_mean", "pi_log_std"):
            np.testing.assert_array_equal(expected[name][:, -cut:], 0)
            expected[name] = expected[name][:, :-cut]
        expected["pi_entropy"] -= cut * HALF_LOG_2PI
        expected["pi_scaled_entropy"] -= model.config.action_dim * cut * HALF_LOG_2PI
    found = outputs(model, recorded)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        reference = expected[name] if expected[name].ndim == value.ndim else expected[name].squeeze(-1)
        largest = np.abs(reference).max()
        assert value.shape == reference.shape, name
        assert 0.1 < largest < np.inf, name
        np.testing.assert_allclose(value, reference, rtol=0, atol=1e-5 * largest, err_msg=name)


def test_sizes_actions_and_discounts_are_newts(golden):
    recorded = golden("newt-multitask-s0")
    lengths = tuple(int(n) for n in recorded["episode_lengths"])
    config = load_official_newt(path("multitask"), obs_dim=OBS, episode_lengths=lengths).config
    sizes = (config.obs_shape, config.latent_dim, config.encoder_dim, config.hidden_dim, config.num_bins)
    assert sizes == ((OBS,), 24, 12, 16, 101)
    assert (config.num_tasks, config.task_dim, config.num_q, config.dropout) == (4, 6, 3, 0.0)
    assert config.valid_actions == tuple(recorded["action_dims"])
    np.testing.assert_allclose(config.discounts, recorded["discounts"], rtol=1e-7)
    single = load_official_newt(path("single"), obs_dim=OBS, dropout=0.1).config
    assert (single.multitask, single.action_dim, single.dropout) == (False, 3, 0.1)
    np.testing.assert_allclose(single.discounts[0], golden("newt-single-s0")["discounts"], rtol=1e-7)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_several_gpus_and_of_compiling_are_read(prefix):
    named = {prefix + name: array for name, array in read_official_tdmpc2(path("multitask")).items()}
    one, other = (flatten(load_official_newt(x, obs_dim=OBS).params) for x in (path("multitask"), {"model": named}))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_embeddings_may_be_given_as_an_array():
    arrays = read_official_tdmpc2(path("multitask"))
    table = arrays.pop("_task_emb.weight")
    with pytest.raises(WeightsError, match="give task_embeddings"):
        load_official_newt(arrays, obs_dim=OBS)
    one = load_official_newt(arrays, obs_dim=OBS, task_embeddings=table)
    other = load_official_newt(path("multitask"), obs_dim=OBS)
    np.testing.assert_array_equal(one.task_embedding.table[...], other.task_embedding.table[...])


def test_one_task_of_many_computes_the_same(golden):
    recorded = golden("newt-multitask-s0")
    rows = recorded["input/task"] == 1
    single = load_official_newt(path("multitask"), obs_dim=OBS, precision="float32").single_task(1)
    assert single.config.action_dim == 2
    z = single.encode(recorded["input/obs"][rows]).z
    np.testing.assert_allclose(z, recorded["expect/z"][rows], rtol=0, atol=1e-5)
    mean = recorded["expect/mean_action"][rows, :2]
    np.testing.assert_allclose(single.prior(z, None).mean, mean, rtol=0, atol=1e-5 * np.abs(mean).max())


@pytest.mark.parametrize(
    ("variant", "without", "changes", "message"),
    [
        ("multitask", "_Qs", {}, "not weights of Newt"),
        ("multitask", r"_Qs\.target\._Qs\.1", {}, r"_Qs\.target\._Qs\.\*\..* do not belong together"),
        ("multitask", r"_reward\.0\.weight", {}, r"_reward\.0\.weight is missing"),
        ("multitask", "none", {"_dynamics.0.weight": np.zeros(3)}, r"_dynamics\.0\.weight has shape \(3,\); 2 axes"),
        ("single", r"_pi\.0\.weight", {}, r"_pi\.0\.weight is missing"),
        ("single", r"_pi\.2\.bias", {}, r"_pi\.2\.bias is missing"),
        ("single", "none", {"_pi.2.bias": np.zeros(6)}, r"_pi\.2\.bias has shape \(6,\), .* 4 _action_masks"),
        ("single", "none", {"_action_masks": np.tri(2, 4)}, "_action_masks are not"),
        ("single", "none", {"_action_masks": np.zeros((2, 4))}, "_action_masks are not"),
        ("single", "none", {"_action_masks": np.array([[0, 1, 1, 0]])}, "_action_masks are not"),
        ("single", "none", {"_action_masks": np.ones(4)}, "_action_masks are not"),
        ("single", "none", {"_action_masks": np.zeros((0, 4))}, "_action_masks are not"),
    ],
)
def test_what_is_no_newt_is_refused(variant, without, changes, message):
    arrays = {n: a for n, a in read_official_tdmpc2(path(variant)).items() if not re.match(without, n)}
    with pytest.raises(WeightsError, match=message):
        load_official_newt(arrays | changes, obs_dim=OBS)


@pytest.mark.parametrize(
    ("variant", "message"), [("multitask", "obs_dim=4 and 6 of the task"), ("single", "reads 7 numbers, not obs_dim=4")]
)
def test_another_width_of_observations_is_refused(variant, message):
    with pytest.raises(WeightsError, match=message):
        load_official_newt(path(variant), obs_dim=4)
