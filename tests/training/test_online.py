"""Training in environments: what replay holds is what happened, updates come when they are due, nothing is lost."""

from fractions import Fraction

import jax
import numpy as np
import pytest
from online_worlds import (
    Glide,
    assert_happened,
    every_row,
    leaves,
    stream,
)
from tiny_envs import Walk, WalkPicture
from toy_family import PrefillingToy, ToyConfig, ToyWorldModel

from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import Callback


def toy(env, kind=ToyWorldModel, **fields):
    """A toy model for ``env``."""
    shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}
    return kind(ToyConfig(**shapes, **fields))


@pytest.fixture
def config():
    """Updates begin after 20 decision steps; one for each then."""
    return TrainingConfig(batch_size=4, sequence_length=3, learning_rate=1e-2, log_interval=4, device="cpu", prefill=20)


# ---- what is in replay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("kind", [Walk, Glide, WalkPicture])
@pytest.mark.parametrize("family", [ToyWorldModel, PrefillingToy])
def test_replay_holds_what_happened(config, kind, num_envs, family):
    env = make_env(kind, num_envs, seed=3)
    trainer = Trainer(toy(env, family), config, [])
    trainer.train(env, total_steps=100)
    rows = every_row(trainer.replay)
    assert len(rows["rewards"]) % num_envs == 0
    assert trainer.replay.action_dim == env.action_dim
    assert (~rows["is_last"]).sum() >= 120 - num_envs
    ended = [assert_happened(kind, stream(rows, i, num_envs), 3, i) for i in range(num_envs)]
    assert min(map(len, ended)) >= 5
    assert rows["is_terminal"].any()
    assert (rows["is_last"] & ~rows["is_terminal"]).any()


def test_random_prefill_is_uniform_and_other_than_the_policy(config):
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, PrefillingToy), config.replace(prefill=400), [])
    trainer.train(env, total_steps=400)
    rows = every_row(trainer.replay)
    taken = rows["actions"][~rows["is_last"], 0]
    first, later = taken[:400], taken[404:]
    # Uniform in [−1, 1]: Kolmogorov's distance of 400 draws is below 0.08 in 99 of 100 cases; the policy's is not.
    distance = lambda x: np.abs(np.sort(x) - np.linspace(-1, 1, len(x))).max() / 2  # noqa: E731
    assert distance(first) < 0.08 < distance(later)
    assert len(np.unique(first)) == 400


@pytest.mark.parametrize("num_envs", [1, 3])
def test_stored_latents_are_those_of_the_policy_that_acted(config, num_envs):
    """Weights that never change, before any latent is written back."""
    env = make_env(Glide, num_envs, seed=3)
    model = toy(env, latents=True)
    trainer = Trainer(model, config.replace(prefill=60, env_steps=62), [])
    state = jax.device_get(trainer.state.params)
    trainer.train(env)
    rows = every_row(trainer.replay)
    assert_policy_of(model, state, config.seed, rows, num_envs)


def assert_policy_of(model, params, seed, rows, num_envs):
    """Run ``act`` over stored rows: it gives the stored actions, and latents."""
    algorithm = model.algorithm
    act = jax.jit(algorithm.act)
    root = jax.random.fold_in(jax.random.key(seed), 0xFFFFFFFF)
    carry = algorithm.initial_carry(model.config, num_envs)
    state = algorithm.init_state(model, TrainingConfig(), jax.random.key(seed)).replace(params=params, opt_state=None)
    for call in range(len(rows["rewards"]) // num_envs):
        now = slice(call * num_envs, (call + 1) * num_envs)
        obs = jax.tree.map(lambda x: x[now], rows["obs"])  # noqa: B023
        key = jax.random.fold_in(root, call + 1)
        carry, actions = act(state, carry, obs, key, is_first=rows["is_first"][now])
        taken = ~rows["is_last"][now]
        for name, stored in leaves(rows["actions"]).items():
            chosen = np.asarray(leaves(actions)[name])
            if chosen.ndim == 1:
                chosen = np.eye(stored.shape[-1], dtype=np.float32)[chosen]
            np.testing.assert_array_equal(stored[now][taken], chosen[taken])
        for name, value in algorithm.stored_latents(carry).items():
            np.testing.assert_array_equal(rows["latents"][name][now], value)


# ---- when updates are due ----------------------------------------------------------------------------------------


def decisions_after_calls(rows, num_envs):
    """Decision steps taken after each step of the environments, by what replay holds."""
    acted = ~rows["is_last"].reshape(-1, num_envs)
    return np.cumsum(acted.sum(-1))


def due(config, rows_per_window, decisions):
    """Updates due after ``decisions``, in exact arithmetic."""
    if decisions < config.prefill:
        return 0
    ratio = Fraction(config.train_ratio) / (config.batch_size * rows_per_window)
    return config.prefill_updates + (decisions - config.prefill) * (ratio or 1) // 1


class Steps(Callback):
    """Notes (updates, environment steps, rows in replay) of every look."""

    every = 1

    def __init__(self):
        self.seen = []

    def on_step(self, info):
        self.seen.append((info.step, info.env_steps, info.replay_size))


@pytest.mark.parametrize(
    ("changes", "num_envs", "repeat"),
    [
        ({}, 1, 1),
        ({"prefill": 30, "prefill_updates": 11}, 3, 1),
        ({"train_ratio": 3.0}, 2, 1),
        ({"train_ratio": 3.0, "prefill_updates": 5}, 1, 3),
        ({"train_ratio": 40.0}, 4, 2),
        ({"train_ratio": 1.0, "batch_size": 7, "sequence_length": 7, "prefill": 61}, 1, 1),  # 49 · (1 / 49) < 1
    ],
)
@pytest.mark.parametrize("latents", [False, True])
def test_updates_come_when_they_are_due(config, changes, num_envs, repeat, latents):
    """After as few steps of the environments as possible; the number of environment steps given decides how many."""
    config = config.replace(**changes)
    config = config.replace(env_steps=(147 + config.prefill) * repeat)
    env = make_env(Walk, num_envs, seed=1, action_repeat=repeat)
    steps = Steps()
    trainer = Trainer(toy(env, latents=latents), config, [steps])
    trainer.train(env)
    assert trainer.step == len(steps.seen) == due(config, config.sequence_length, 147 + config.prefill)
    after = decisions_after_calls(every_row(trainer.replay), num_envs)
    for step, env_steps, size in steps.seen:
        call = next(i for i, d in enumerate(after) if due(config, config.sequence_length, int(d)) >= step)
        assert (env_steps, size) == (after[call] * repeat, (call + 1) * num_envs), f"update {step}"
    assert steps.seen[-1][1] < config.env_steps + num_envs * repeat


def test_total_steps_given_wins_over_env_steps(config):
    env = make_env(Walk, seed=1)
    trainer = Trainer(toy(env), config.replace(env_steps=30, total_steps=3), [])
    trainer.train(env)
    assert trainer.step == 10
    trainer.train(env, total_steps=15)
    assert trainer.step == 15
    assert decisions_after_calls(every_row(trainer.replay), 1)[-1] == 35


@pytest.mark.parametrize("repeat", [1, 3])
def test_too_few_environment_steps_are_answered_with_a_sentence(config, repeat):
    env = make_env(Walk, seed=1, action_repeat=repeat)
    for env_steps in (1, 20 * repeat, 20 * repeat + repeat - 1):
        with pytest.raises(ConfigError, match=r"end before the first update: prefill=20") as caught:
            Trainer(toy(env), config.replace(env_steps=env_steps), []).train(env)
        assert f"env_steps={env_steps} are {env_steps // repeat} decision steps" in str(caught.value)
    assert int(Trainer(toy(env), config.replace(env_steps=21 * repeat), []).train(env).step) == 1
