"""No environment makes an evaluation or a resume wait without bound, and the first Ctrl-C is heeded there too."""

import logging
import os
import signal

import numpy as np
import pytest
from tiny_envs import Walk
from toy_family import ToyConfig, ToyWorldModel

from worldloom.envs import make_env
from worldloom.training import Trainer, TrainingConfig, play
from worldloom.training.callbacks import CheckpointCallback, EvalCallback


class Endless(Walk):
    """:class:`Walk` whose episodes never end."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


class SometimesEndless(Walk):
    """:class:`Walk` of which every second episode never ends."""

    made = 0

    def reset(self, **options):
        self.made += 1
        return super().reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        odd = self.made % 2 == 1
        return obs, reward, terminated and odd, truncated and odd, info


def toy(env):
    return ToyWorldModel(ToyConfig(obs_shape=env.obs_shape, action_dim=env.action_dim, action_type=env.action_type))


ONLINE = TrainingConfig(batch_size=4, sequence_length=3, device="cpu", prefill=20, eval_interval=0, log_interval=50)


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_episodes_that_do_not_end_are_cut_and_counted(num_envs, caplog):
    with make_env(Endless, num_envs) as env:
        ends = play(toy(env), env, episodes=4, max_steps=30)
    assert [end.length for end in ends] == [30] * 4
    assert not any(end.terminated or end.crashed for end in ends)
    assert np.isfinite([end.episode_return for end in ends]).all()
    assert "4 of 4 evaluated episodes did not end and were cut after 30 decision steps" in caplog.text


def test_the_next_episode_follows_one_that_was_cut(caplog):
    with make_env(SometimesEndless, 2) as env:
        ends = play(toy(env), env, episodes=8, max_steps=40)
    assert len(ends) == 8
    assert {env: sum(end.env == env for end in ends) for env in (0, 1)} == {0: 4, 1: 4}
    assert "cut after 40 decision steps" in caplog.text
    assert any(end.length < 40 for end in ends)


def test_episodes_that_end_are_not_cut(caplog):
    with make_env(Walk, 2) as env:
        whole = play(toy(env), env, episodes=6, seed=1)
        longest = max(end.length for end in whole)
        assert play(toy(env), env, episodes=6, seed=1, max_steps=longest) == whole
    assert "cut" not in caplog.text


def test_an_evaluation_during_training_has_the_limit_of_the_config(caplog):
    with make_env(Endless) as env, make_env(Endless, 2) as other:
        config = ONLINE.replace(eval_interval=5, max_episode_steps=25)
        callback = EvalCallback(other, episodes=2)
        trainer = Trainer(toy(env), config, [callback])
        trainer.train(env, total_steps=5)
    assert "2 of 2 evaluated episodes did not end and were cut after 25" in caplog.text


def test_ctrl_c_ends_an_evaluation_at_once_and_saves(tmp_path, monkeypatch):
    """The evaluation would take 10^9 steps."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupting(Endless):
        def step(self, action):
            if self.steps == 50:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(action)

    monkeypatch.setattr(Walk, "steps", 0, raising=False)
    try:
        with make_env(Endless) as env, make_env(Interrupting) as other:
            config = ONLINE.replace(eval_interval=5, max_episode_steps=10**9)
            checkpoints = CheckpointCallback(str(tmp_path), save_best=False)
            trainer = Trainer(toy(env), config, [EvalCallback(other, episodes=1), checkpoints])
            with pytest.raises(KeyboardInterrupt):
                trainer.train(env, total_steps=20)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert checkpoints.checkpointer.steps() == [5]


def test_a_long_evaluation_says_how_far_it_is(caplog, monkeypatch):
    monkeypatch.setattr("worldloom.training.evaluation._SECONDS_BETWEEN_MESSAGES", 0.0)
    with make_env(Endless) as env, caplog.at_level(logging.INFO, "worldloom"):
        play(toy(env), env, episodes=1, max_steps=5)
    assert "0 of 1 episodes done, step 1; an episode has at most 5" in caplog.text


@pytest.mark.parametrize(("limit", "exact"), [(1_000, True), (30, False)])
def test_a_resumed_run_replays_episodes_up_to_the_limit(tmp_path, limit, exact):
    config = ONLINE.replace(max_episode_steps=limit)

    def train(steps, resume):
        with make_env(Endless) as env:
            trainer = Trainer(toy(env), config, [CheckpointCallback(str(tmp_path), save_best=False)])
            trainer.train(env, total_steps=steps, resume=resume)
            return trainer, int(env.state()["episodes"][0])

    train(40, False)
    if exact:
        assert train(45, True)[1] == 0
    else:
        with pytest.warns(RuntimeWarning, match="up to 60 steps; at most 30 are replayed; their next episodes begin"):
            assert train(45, True)[1] == 1
