"""The learning rate after warm-up: constant, or falling to 0 at the end of the run."""

import logging

import jax
import numpy as np
import optax
import pytest
from online_worlds import ONLINE_CONFIG, toy
from tiny_envs import Walk

from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.models.dreamer import DreamerV3Config
from worldloom.models.dreamer import update as dreamer
from worldloom.models.tdmpc2 import TDMPC2Config
from worldloom.models.tdmpc2 import update as tdmpc2
from worldloom.optim import learning_rate_schedule, warmup_schedule
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import CheckpointCallback, every
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.run_info import on_host


@pytest.mark.parametrize("warmup", [0, 10])
def test_a_schedule_is_the_warm_up_times_a_decay_to_zero(warmup):
    config = TrainingConfig(learning_rate=2.0, warmup_steps=warmup, total_steps=50)
    steps = np.arange(60)
    rise = np.minimum(1, steps / warmup) if warmup else np.ones(60)
    done = np.clip((steps - warmup) / (50 - warmup), 0, 1)
    for name, decay in (("linear", 1 - done), ("cosine", (1 + np.cos(np.pi * done)) / 2)):
        schedule = learning_rate_schedule(config.replace(lr_schedule=name))
        np.testing.assert_allclose([schedule(n) for n in steps], 2 * rise * decay, atol=1e-6)
        assert float(schedule(50)) == pytest.approx(0, abs=1e-6)
    constant, plain = learning_rate_schedule(config), warmup_schedule(2.0, warmup)
    assert [float(constant(n)) for n in steps] == [float(plain(n)) for n in steps]


def test_a_warm_up_as_long_as_the_run_is_no_error():
    config = TrainingConfig(lr_schedule="linear", warmup_steps=50, total_steps=50)
    assert 0 < float(learning_rate_schedule(config)(49)) < config.learning_rate


def test_only_a_schedule_makes_updates_depend_on_the_length_of_a_run():
    one, other = (TrainingConfig(total_steps=n) for n in (10, 20))
    assert one.of_update() == other.of_update()
    one, other = (config.replace(lr_schedule="cosine") for config in (one, other))
    assert one.of_update() != other.of_update()
    assert one.of_update(20) == other.of_update()
    with pytest.raises(ConfigError, match="'constant', 'linear' or 'cosine', not 'exponential'"):
        TrainingConfig(lr_schedule="exponential")


SMALL = TrainingConfig(learning_rate=0.1, lr_schedule="linear", total_steps=4, grad_clip=0.0, device="cpu")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_both_families_step_by_the_schedule(schedule):
    """The optimizers' own steps shrink as the schedule says, given the same gradient every time."""
    training = SMALL.replace(lr_schedule=schedule).of_update()
    expected = [float(learning_rate_schedule(training)(n)) for n in range(4)]
    params = {"encoder": {"kernel": np.ones((2, 2), np.float32)}}
    grads = jax.tree.map(np.ones_like, params)
    shapes = {"obs_shape": (2,), "action_dim": 1}
    optimizers = {
        "dreamer": dreamer.optimizer(DreamerV3Config(**shapes, agc=0.0), training),
        "tdmpc2": tdmpc2._model_optimizer(TDMPC2Config(**shapes, encoder_lr_scale=1.0), training),
        "policy": tdmpc2._policy_optimizer(TDMPC2Config(**shapes), training),
    }
    for name, optimizer in optimizers.items():
        state, sizes = optimizer.init(params), []
        for _ in range(4):
            steps, state = optimizer.update(grads, state, params)
            sizes.append(-float(optax.tree.sum(steps)) / 4)
        # Adam and LaProp divide a constant gradient by itself.
        np.testing.assert_allclose(sizes, expected, rtol=1e-2, err_msg=name)


def rates(folder, *, total, stop=None, resume=False, schedule="linear"):
    """Learning rates by step, and the final state, of an online run with a budget in environment steps."""
    found = {}
    env = make_env(Walk, 1, seed=3)
    config = ONLINE_CONFIG.replace(lr_schedule=schedule, env_steps=total)
    callbacks = [
        every(1, lambda info: found.update({info.step: info.lr})),
        CheckpointCallback(str(folder), 5, keep_last=9, save_best=False),
    ]
    trainer = Trainer(toy(env), config, callbacks)
    trainer.train(env, total_steps=stop, resume=resume)
    return found, flatten_state(on_host(trainer.state))


def test_the_schedule_ends_with_the_budget_of_environment_steps(tmp_path):
    found, _ = rates(tmp_path, total=60)
    assert len(found) == 40  # 20 steps of prefill, then an update each
    expected = [ONLINE_CONFIG.learning_rate * (1 - n / 40) for n in range(40)]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)


def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(tmp_path):
    whole, state = rates(tmp_path / "whole", total=60)
    first, _ = rates(tmp_path / "parts", total=60)
    again, resumed = rates(tmp_path / "parts", total=60, resume=tmp_path / "parts" / "25")
    assert first == whole
    assert again == {step: rate for step, rate in whole.items() if step > 25}
    for name, value in state.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_another_end_of_a_resumed_run_is_told(tmp_path, caplog):
    rates(tmp_path, total=40)
    with caplog.at_level(logging.WARNING, "worldloom"):
        found, _ = rates(tmp_path, total=60, resume=True)
    assert "its learning rate falls to 0 there" in caplog.text
    assert found[40] == pytest.approx(ONLINE_CONFIG.learning_rate / 40, rel=1e-4)
