"""A task of a multitask model as a model of its own: the embedding becomes part of biases, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom import create_world_model
from worldloom.errors import ConfigError, DataError
from worldloom.models.params import flatten, unflatten
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.ops.symlog import symlog

SIZES = {
    "latent_dim": 16,
    "simnorm_dim": 4,
    "hidden_dim": 12,
    "encoder_dim": 8,
    "num_bins": 11,
    "num_q": 2,
    "task_dim": 5,
    "precision": "float32",
    "num_samples": 8,
    "num_elites": 4,
    "num_pi_trajs": 2,
}


@functools.cache
def built():
    """A multitask model, and single-task models of two of its tasks."""
    config = TDMPC2Config(
        obs_shape=(7,), action_dim=4, num_tasks=3, action_dims=(2, 4, 1), episode_lengths=(500, 100, 50), **SIZES
    )
    model = TDMPC2WorldModel(config, seed=1)
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(size=np.shape(array)).astype(np.float32) for name, array in flatten(model.params).items()}
    # Rows inside and outside of the unit ball, to which the embedding is projected.
    flat["task_embedding.table"] *= np.array([[0.1], [1.0], [3.0]], np.float32)
    model.load_params(unflatten(flat))
    return model, {task: model.single_task(task, obs_dim=5) for task in (1, 2)}


@pytest.fixture(scope="module")
def multitask():
    return built()[0]


@pytest.fixture(scope="module")
def singles():
    return built()[1]


def padded(array, width):
    return np.pad(array, [(0, 0), (0, width - array.shape[-1])])


@settings(max_examples=15, deadline=None)
@given(task=st.integers(1, 2), seed=st.integers(0, 2**32 - 1))
def test_every_output_is_that_of_the_multitask_model(task, seed):
    multitask, singles = built()
    single, rng = singles[task], np.random.default_rng(seed)
    actions = single.config.action_dim
    obs = rng.normal(size=(3, 5)).astype(np.float32)
    action = rng.uniform(-1, 1, (3, actions)).astype(np.float32)
    tasks = jnp.full(3, task)
    one = single.encode(obs)
    other = multitask.encode(padded(obs, 7), task=tasks)
    pairs = [(one.features, other.features)]
    one = single.predict(one, action)
    other = multitask.predict(other, padded(action, 4), task=tasks)
    pairs += [(one.features, other.features)]
    # Values in the space in which they are predicted: symexp multiplies rounding by their size.
    values = [symlog(each["value"]) for each in (single.decode(one), multitask.decode(other, task=tasks))]
    embedded = jnp.concatenate([other.features, multitask.task_embedding(tasks), padded(action, 4)], -1)
    rewards = [single.reward(jnp.concatenate([other.features, action], -1)), multitask.reward(embedded)]
    for ours, theirs in [*pairs, values, rewards]:
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(np.asarray(ours) / scale, np.asarray(theirs) / scale, atol=1e-6)


def test_the_policy_acts_as_the_multitask_model_does(multitask, singles):
    obs = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    for task, single in singles.items():
        actions = single.config.action_dim
        z = single.encode(obs).features
        mask = jnp.ones((3, actions))
        ours = vars(single)["policy"](z, mask)
        embedded = jnp.concatenate([z, multitask.task_embedding(jnp.full(3, task))], -1)
        theirs = vars(multitask)["policy"](embedded, jnp.pad(mask, [(0, 0), (0, 4 - actions)]))
        np.testing.assert_allclose(ours.mean, theirs.mean[:, :actions], atol=1e-6)
        np.testing.assert_allclose(ours.log_std, theirs.log_std[:, :actions], atol=2e-6)


def test_discount_and_actions_are_those_of_the_task(multitask, singles):
    for task, single in singles.items():
        assert single.config.discounts == (multitask.config.discounts[task],)
        assert single.config.action_dim == multitask.config.valid_actions[task]
        assert not single.config.multitask


def test_tasks_and_sizes_that_are_not_there_are_refused(multitask, singles):
    for task, message in ((3, "There is no task 3"), (True, "There is no task"), ("walker-run", "has no task")):
        with pytest.raises(ConfigError, match=message):
            multitask.single_task(task)
    with pytest.raises(ConfigError, match="obs_dim=8"):
        multitask.single_task(0, obs_dim=8)
    with pytest.raises(ConfigError, match="single task already"):
        singles[1].single_task(0)


@pytest.mark.parametrize("method", ["encode", "act", "decode", "imagine"])
def test_tasks_that_are_not_there_never_give_the_last_ones_numbers(method, multitask):
    def call(task):
        latent = multitask.initial_state(2)
        arguments = {
            "encode": (np.zeros((2, 7), np.float32),),
            "act": (None, np.zeros((2, 7), np.float32)),
            "decode": (latent,),
            "imagine": (latent, np.zeros((3, 2, 4), np.float32)),
        }
        return getattr(multitask, method)(*arguments[method], task=task)

    for wrong in (np.array([0, 3]), np.array([2, -1]), np.array([0.0, 1.0]), jnp.array([3, 3])):
        with pytest.raises(DataError, match=r"no task|must hold integers"):
            call(wrong)


def test_tasks_that_are_not_there_are_nan_in_compiled_code(multitask):
    encode = jax.jit(lambda task: multitask.encode(jnp.zeros((3, 7)), task=task).z)
    assert jnp.isnan(encode(jnp.array([0, 3, -1]))).all(-1).tolist() == [False, True, True]


def test_a_plan_of_a_single_task_is_the_multitask_models(multitask, singles):
    obs = np.random.default_rng(2).normal(size=(1, 5)).astype(np.float32)
    single = singles[1]
    carry = single.algorithm.initial_carry(single.config, 1), multitask.algorithm.initial_carry(multitask.config, 1)
    _, ours = single.act(carry[0], obs, None)
    _, theirs = multitask.act(carry[1], padded(obs, 7), None, task=jnp.ones(1, int))
    np.testing.assert_allclose(jax.device_get(ours), jax.device_get(theirs)[:, :4], atol=1e-4)


def test_an_intrinsic_reward_is_left_out():
    fields = {"obs_shape": (3,), "action_dim": 2, "num_tasks": 2, "action_dims": (1, 2), "explore": "disagreement"}
    small = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "task_dim": 4, "num_samples": 8, "num_elites": 4}
    model = create_world_model("tdmpc2:tiny", **fields, **small, num_pi_trajs=2, device="cpu")
    single = model.single_task(0)
    assert single.config.explore == "none"
    assert not any("explorer" in name for name in single.params)
