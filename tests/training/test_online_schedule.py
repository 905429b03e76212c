"""The train ratio: updates are done as soon as environment steps make them due, and no earlier."""

from fractions import Fraction

import numpy as np
import pytest
from online_worlds import ONLINE_CONFIG, Glide, buffer_with_latents, every_row, toy
from tiny_envs import Walk

from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.training import Trainer
from worldloom.training.callbacks import Callback


@pytest.fixture
def config():
    return ONLINE_CONFIG


def decisions_after_calls(rows, num_envs):
    """Decision steps taken after each step of the environments, counted from the rows in replay."""
    acted = ~rows["is_last"].reshape(-1, num_envs)
    return np.cumsum(acted.sum(-1))


def updates_due(config, rows_per_window, decisions):
    """Updates due after ``decisions`` decision steps, in exact arithmetic."""
    if decisions < config.prefill:
        return 0
    ratio = Fraction(config.train_ratio) / (config.batch_size * rows_per_window)
    return config.prefill_updates + (decisions - config.prefill) * (ratio or 1) // 1


class StepRecorder(Callback):
    """Records (updates, environment steps, rows in replay) after every update."""

    every = 1

    def __init__(self):
        self.steps = []

    def on_step(self, info):
        self.steps.append((info.step, info.env_steps, info.replay_size))


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
def test_updates_are_done_as_soon_as_they_are_due(config, changes, num_envs, repeat, latents):
    """Each update follows as few steps of the environments as possible; ``env_steps`` determines the total number."""
    config = config.replace(**changes)
    config = config.replace(env_steps=(147 + config.prefill) * repeat)
    env = make_env(Walk, num_envs, seed=1, action_repeat=repeat)
    recorder = StepRecorder()
    trainer = Trainer(toy(env, latents=latents), config, [recorder])
    trainer.train(env)
    assert trainer.step == len(recorder.steps) == updates_due(config, config.sequence_length, 147 + config.prefill)
    after = decisions_after_calls(every_row(trainer.replay), num_envs)
    for step, env_steps, size in recorder.steps:
        call = next(i for i, d in enumerate(after) if updates_due(config, config.sequence_length, int(d)) >= step)
        assert (env_steps, size) == (after[call] * repeat, (call + 1) * num_envs), f"update {step}"
    assert recorder.steps[-1][1] < config.env_steps + num_envs * repeat


def test_an_explicit_total_steps_takes_precedence_over_env_steps(config):
    env = make_env(Walk, seed=1)
    trainer = Trainer(toy(env), config.replace(env_steps=30, total_steps=3), [])
    trainer.train(env)
    assert trainer.step == 10
    trainer.train(env, total_steps=15)
    assert trainer.step == 15
    assert decisions_after_calls(every_row(trainer.replay), 1)[-1] == 35


@pytest.mark.parametrize("repeat", [1, 3])
def test_too_few_environment_steps_are_refused_with_an_explanation(config, repeat):
    env = make_env(Walk, seed=1, action_repeat=repeat)
    for env_steps in (1, 20 * repeat, 20 * repeat + repeat - 1):
        with pytest.raises(ConfigError, match=r"end before the first update: prefill=20") as caught:
            Trainer(toy(env), config.replace(env_steps=env_steps), []).train(env)
        assert f"env_steps={env_steps} are {env_steps // repeat} decision steps" in str(caught.value)
    assert int(Trainer(toy(env), config.replace(env_steps=21 * repeat), []).train(env).step) == 1


def test_updates_on_recorded_episodes_do_not_count_towards_the_train_ratio(config):
    recorder = StepRecorder()
    env = make_env(Glide, seed=3)
    trainer = Trainer(toy(env, latents=True), config.replace(env_steps=50), [recorder])
    trainer.train(buffer_with_latents(), total_steps=100)
    trainer.train(env)
    assert trainer.step == 130
    assert [env_steps for _, env_steps, _ in recorder.steps[100:]] == list(range(21, 51))
    another = make_env(Glide, seed=4)
    trainer.train(another)
    assert trainer.step == 160
    assert [env_steps for _, env_steps, _ in recorder.steps[130:]] == list(range(21, 51))
