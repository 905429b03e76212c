"""Environments that do not fit, fail or die: refused with an explanation, or survived without damage."""

import json
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
from online_worlds import (
    ONLINE_CONFIG,
    Glide,
    MeasurementRecorder,
    assert_equal,
    every_row,
    flat,
    rows_of_env,
    shapes,
    toy,
)
from tiny_envs import Walk
from toy_family import PrefillingToy, ToyConfig, ToyWorldModel

from worldloom.envs import episode_seed, make_env
from worldloom.errors import ConfigError, DataError, EnvContractError, EnvError
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, play
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.callbacks.episodes import EpisodeLog
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.run_info import on_host


@pytest.fixture
def config():
    return ONLINE_CONFIG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"obs_shape": (3,)}, r"obs_shape=\(2,\), the model \(3,\)"),
        ({"obs_shape": {"vector": (2,)}}, r"obs_shape=\(2,\), the model \{'vector': \(2,\)\}"),
        ({"action_dim": 3}, "action_dim=2, the model 3"),
        ({"action_dim": {"way": 2}}, "action_dim=2, the model {'way': 2}"),
        ({"action_type": "continuous"}, "action_type='discrete', the model 'continuous'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(config, fields, message):
    env = make_env(Walk)
    model = ToyWorldModel(ToyConfig(**{"obs_shape": (2,), "action_dim": 2, "action_type": "discrete", **fields}))
    trainer = Trainer(model, config, [])
    with pytest.raises(ConfigError, match=message) as caught:
        trainer.train(env)
    assert "Create the model with obs_shape=env.obs_shape" in str(caught.value)
    assert trainer.replay is None


def test_one_action_type_may_stand_for_all_actions_of_a_dict(config):
    class Keys(Walk):
        action_space = gym.spaces.MultiDiscrete([2, 2])

        def step(self, action):
            return super().step(int(action[0]))

    env = make_env(Keys, seed=3)
    model = ToyWorldModel(ToyConfig(obs_shape=(2,), action_dim=env.action_dim, action_type="discrete"))
    trainer = Trainer(model, config, [])
    trainer.train(env, total_steps=3)
    assert trainer.replay.action_type == {"action0": "discrete", "action1": "discrete"}


def test_terminations_need_an_episodic_model(config):
    env = make_env(Walk, seed=3)
    small = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2}
    trainer = Trainer(TDMPC2WorldModel(TDMPC2Config(**shapes(env), **small)), config.replace(prefill=1000), [])
    with pytest.raises(ConfigError, match="Create the model with episodic=True"):
        trainer.train(env)
    assert not every_row(trainer.replay)["is_terminal"].any()
    multitask = TDMPC2WorldModel(TDMPC2Config(**shapes(env), **small, num_tasks=2))
    with pytest.raises(ConfigError, match="multitask model is trained from recorded episodes"):
        Trainer(multitask, config, []).train(env)


def test_invalid_and_closed_environments_are_refused(config):
    env = make_env(Walk)
    trainer = Trainer(toy(env), config, [])
    for wrong in (3, None, [env]):
        with pytest.raises(TypeError):
            trainer.train(wrong)
    with pytest.raises(ConfigError, match="returned a int"):
        trainer.train(lambda: 3)
    with pytest.raises(ConfigError, match="worldloom-nowhere"):
        trainer.train("worldloom-nowhere-v0")
    env.close()
    with pytest.raises(EnvError, match="was closed"):
        trainer.train(env)
    assert trainer.step == 0


def test_a_window_longer_than_all_episodes_is_refused_with_an_explanation(config):
    env = make_env(Walk)
    with pytest.raises(DataError, match=r"A window needs 50 rows; the longest episode held has \d+"):
        Trainer(toy(env), config.replace(sequence_length=50), []).train(env)
    many = make_env(Walk, 10)
    with pytest.raises(DataError, match=r"\d+ decision steps were taken in 10 environments; a larger prefill"):
        Trainer(toy(many), config.replace(sequence_length=4), []).train(many)


class Breaking(Glide):
    """Returns NaN observations from its 40th step on, or raises at it."""

    fault, taken = "", 0

    def step(self, action):
        obs, *rest = super().step(action)
        type(self).taken += 1
        if self.taken == 40 and self.fault == "raise":
            raise ValueError("the simulator exploded")
        return (obs * np.nan if self.taken >= 40 and self.fault == "nan" else obs), *rest


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("nan", DataError, r"'obs' came back NaN or infinite from environments \[0\]"),
        ("raise", ValueError, "the simulator exploded"),
    ],
)
def test_a_failing_environment_does_not_damage_the_model(config, tmp_path, monkeypatch, fault, error, message):
    monkeypatch.setattr(Breaking, "fault", fault)
    monkeypatch.setattr(Breaking, "taken", 0)
    saves = CheckpointCallback(str(tmp_path), save_every=7)
    env = make_env(Breaking, seed=3)
    trainer = Trainer(toy(env), config, [saves])
    with pytest.raises(error, match=message):
        trainer.train(env, total_steps=60)
    assert 10 < trainer.step < 20
    assert np.isfinite(every_row(trainer.replay)["obs"]).all()
    intact = make_env(Glide, seed=3)
    whole = Trainer(toy(intact), config, [])
    whole.train(intact, total_steps=trainer.step)
    assert_equal(flat(whole.model.params), flat(trainer.model.params))
    # The environment is closed, but training can continue in another one with the collected rows …
    with pytest.raises(EnvError, match="was closed"):
        trainer.train(env, total_steps=60)
    collected, step = trainer.replay, trainer.step
    another = make_env(Glide, seed=8)
    trainer.train(another, total_steps=step + 3, replay=collected)
    assert trainer.step == step + 3
    assert trainer.replay is collected
    # … or from the last checkpoint.
    again = make_env(Glide, seed=3)
    resumed = Trainer(toy(again), config, [CheckpointCallback(str(tmp_path), save_every=7)])
    resumed.train(again, total_steps=30, resume=tmp_path / "14")
    whole.train(intact, total_steps=30)
    assert_equal(flatten_state(on_host(whole.state)), flatten_state(on_host(resumed.state)))
    assert_equal(every_row(whole.replay), every_row(resumed.replay))


def test_a_killed_worker_loses_its_episode_and_nothing_else(config, caplog):
    """Over 1,000 environment steps in 8 processes, one of which is killed at a random row of the random prefill."""
    config = config.replace(prefill=1_050, log_interval=5)
    intact = make_env(Walk, 8, seed=3)
    undisturbed = Trainer(toy(intact, PrefillingToy), config, [])
    undisturbed.train(intact, total_steps=20)
    expected = every_row(undisturbed.replay)

    rng = np.random.default_rng()
    last_row, victim = (int(n) for n in rng.choice(np.argwhere(~expected["is_last"].reshape(-1, 8)[:125])))
    print(f"environment {victim} is killed after its row {last_row}")

    class Killing(ReplayBuffer):
        def add_rows(self, *args, **options):
            super().add_rows(*args, **options)
            if len(self) == 8 * (last_row + 1):
                os.kill(env._backend._workers[victim].pid, signal.SIGKILL)

    recorder = MeasurementRecorder()
    with make_env(Walk, 8, seed=3, parallel="subprocess") as env:
        trainer = Trainer(toy(env, PrefillingToy), config, [recorder])
        trainer.train(env, total_steps=20, replay=Killing())
    assert trainer.step == 20
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"environment {victim} was killed by SIGKILL" in message
    assert "its episode closed as truncated" in message
    assert {values["collect/restarts"] for _, _, values in recorder.records} == {1.0}

    # The other environments are undisturbed, and so is the victim up to the kill.
    rows = every_row(trainer.replay)
    common = min(len(rows["rewards"]), len(expected["rewards"])) // 8
    assert common >= 131
    for number in set(range(8)) - {victim}:
        pair = rows_of_env(expected, number, 8), rows_of_env(rows, number, 8)
        assert_equal(*({k: v[:125] for k, v in each.items() if k != "row_ids"} for each in pair))
    pair = rows_of_env(expected, victim, 8), rows_of_env(rows, victim, 8)
    before = last_row + 1
    assert_equal(*({k: v[:before] for k, v in each.items() if k != "row_ids"} for each in pair))
    # One row closes the episode as truncated.
    _, victim_rows = pair
    closing = {k: v[before] for k, v in victim_rows.items()}
    np.testing.assert_array_equal(closing["obs"], victim_rows["obs"][last_row])
    assert (closing["rewards"], closing["is_last"], closing["is_terminal"]) == (0, True, False)
    assert not closing["actions"].any()
    # The following episodes are those of the undisturbed run, begun earlier.
    following = {k: v[before + 1 :] for k, v in victim_rows.items()}
    assert following["is_first"][0]
    begun = int(victim_rows["is_first"][: before + 1].sum())
    for at in np.flatnonzero(following["is_first"]):
        world = Walk()
        np.testing.assert_array_equal(
            following["obs"][at], world.reset(seed=episode_seed(3, victim, begun))[0].astype(np.float32)
        )
        begun += 1
    assert begun > int(victim_rows["is_first"][: before + 1].sum())


class SometimesNan(Glide):
    """Returns NaN at the third step of every episode that began left of 0."""

    def reset(self, *, seed=None, options=None):
        answer = super().reset(seed=seed)
        self.began_left = self.position < 0
        return answer

    def step(self, action):
        obs, *rest = super().step(action)
        return (obs * np.nan if self.began_left and self.steps == 3 else obs), *rest


def test_steps_that_return_nan_cut_their_episodes_are_counted_and_do_not_end_the_run(config, tmp_path, caplog):
    config, recorder = config.replace(log_interval=1), MeasurementRecorder()
    saves = CheckpointCallback(str(tmp_path), save_every=1, keep_last=99, save_best=False)
    env = make_env(SometimesNan, 2, seed=3, on_bad_step="restart")
    trainer = Trainer(toy(env), config, [EpisodeLog(tmp_path / "log"), saves, recorder])
    trainer.train(env, total_steps=12)
    rows = every_row(trainer.replay)
    assert all(np.isfinite(rows[name]).all() for name in ("obs", "rewards"))
    cut = rows["is_last"] & ~rows["is_terminal"] & (rows["rewards"] == 0)
    counted = [values["collect/bad_steps"] for _, _, values in recorder.records if "collect/bad_steps" in values]
    assert counted[-1] == cut.sum() > 2
    assert "returned 'obs' NaN or infinite: its episode is closed as truncated" in caplog.text
    # They are marked, and no statistic of returns has them.
    lines = [json.loads(line) for line in (tmp_path / "log" / "episodes.jsonl").read_text().splitlines()]
    whole = [line["return"] for line in lines if not line.get("bad_step")]
    assert len(lines) - len(whole) == cut.sum()
    assert not any(line["terminated"] or line.get("crashed") for line in lines if line.get("bad_step"))
    parts = [(v["collect/return"], v["collect/episodes"]) for _, _, v in recorder.records if "collect/return" in v]
    assert sum(number for _, number in parts) == len(whole)
    assert sum(mean * number for mean, number in parts) == pytest.approx(sum(whole))
    seen = trainer.run.collector.seen
    assert (seen.worst, seen.best) == (min(whole), max(whole))
    # Exactly resumable, whether or not an episode was just cut.
    for step in range(1, 12, 2):
        again = make_env(SometimesNan, 2, seed=3, on_bad_step="restart")
        resumed = Trainer(toy(again), config, [])
        resumed.train(again, total_steps=12, resume=tmp_path / str(step))
        assert_equal(flatten_state(on_host(trainer.state)), flatten_state(on_host(resumed.state)))
        assert_equal(rows, every_row(resumed.replay))


def test_an_evaluation_says_which_of_its_episodes_nan_has_cut(caplog):
    env = make_env(SometimesNan, 2, on_bad_step="restart")
    ends = play(toy(env), env, episodes=30)
    cut = sum(end.bad_step for end in ends)
    assert len(ends) == 30 > cut > 0
    assert f"{cut} of 30 evaluated episodes were cut at NaN or infinity" in caplog.text


def test_a_run_that_nan_has_stopped_goes_on_from_its_checkpoint_by_restarting(config, tmp_path):
    saves = CheckpointCallback(str(tmp_path), save_every=1, keep_last=99, save_best=False)
    env = make_env(SometimesNan, seed=6)
    trainer = Trainer(toy(env), config.replace(prefill=4), [saves])
    with pytest.raises(DataError, match="--on-bad-step restart"):
        trainer.train(env, total_steps=60)
    again = make_env(SometimesNan, seed=6, on_bad_step="restart")
    resumed = Trainer(toy(again), config.replace(prefill=4), [CheckpointCallback(str(tmp_path), save_every=50)])
    resumed.train(again, total_steps=60, resume="auto")
    assert resumed.step == 60


def test_an_environment_that_breaks_its_contract_ends_the_run_with_the_sentence(config):
    class Broken(Glide):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, reward, ("False" if self.steps == 3 else terminated), truncated, info

    for parallel in ("sync", "subprocess"):
        with make_env(Broken, 2, parallel=parallel) as env:
            trainer = Trainer(toy(env), config, [])
            with pytest.raises(EnvContractError, match="terminated is 'False'"):
                trainer.train(env, total_steps=5)
