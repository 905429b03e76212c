"""Returns of collected and evaluated episodes, and whole episodes played by ``play``."""

import numpy as np
import pytest
from online_worlds import ONLINE_CONFIG, Glide, MeasurementRecorder, assert_equal, every_row, flat, toy
from tiny_envs import Corridor, Walk, WalkPicture

from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.training import Trainer
from worldloom.training.callbacks import EvalCallback
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.evaluation import play
from worldloom.training.run_info import on_host


@pytest.fixture
def config():
    return ONLINE_CONFIG


def recording_env(kind):
    """A subclass of the environment ``kind``, and its list of (instance, return, length) of every finished episode."""
    ended = []

    class Recording(kind):
        count = 0

        def __init__(self, **options):
            super().__init__(**options)
            self.number, Recording.count = Recording.count, Recording.count + 1

        def reset(self, **options):
            self.total, self.length = 0.0, 0
            return super().reset(**options)

        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            self.total, self.length = self.total + float(np.float32(reward)), self.length + 1
            if terminated or truncated:
                ended.append((self.number, self.total, self.length))
            return obs, reward, terminated, truncated, info

    return Recording, ended


@pytest.mark.parametrize("num_envs", [1, 3])
def test_returns_of_collected_episodes_are_counted_once_each(config, num_envs):
    kind, ended = recording_env(Walk)
    env = make_env(kind, num_envs, seed=3)
    counts = []

    class CountingRecorder(MeasurementRecorder):
        def on_eval(self, info, measurements):
            super().on_eval(info, measurements)
            counts.append(len(ended))

    recorder = CountingRecorder()
    trainer = Trainer(toy(env), config.replace(log_interval=10, train_ratio=4.0), [recorder])
    trainer.train(env, total_steps=57)
    published = 0
    assert [step for step, *_ in recorder.records] == [10, 20, 30, 40, 50, 57]
    for (_, env_steps, values), count in zip(recorder.records, counts, strict=True):
        new = ended[published:count]
        assert values["collect/episodes"] == count - published > 0
        assert values["collect/return"] == pytest.approx(np.mean([r for _, r, _ in new]), rel=1e-12)
        assert values["collect/length"] == np.mean([n for _, _, n in new])
        assert values["collect/restarts"] == 0
        assert sum(length for *_, length in ended[:count]) <= env_steps + num_envs
        published = count
    # The interval that began at step 50 is published at the end of the first call, and again when it is complete.
    trainer.train(env, total_steps=60)
    assert [step for step, *_ in recorder.records[6:]] == [60]
    assert recorder.records[6][2]["collect/episodes"] == counts[6] - counts[4]


@pytest.mark.parametrize(("episodes", "shares"), [(7, (3, 2, 2)), (2, (1, 1, 0)), (3, (1, 1, 1))])
def test_evaluation_is_the_mean_of_an_equal_share_of_every_environment(config, episodes, shares):
    kind, ended = recording_env(Walk)
    eval_env = make_env(kind, 3)
    recorder = MeasurementRecorder()
    env = make_env(Walk, seed=3)
    evaluation = EvalCallback(eval_env, every=5, episodes=episodes, seed=11)
    Trainer(toy(env), config, [evaluation, recorder]).train(env, total_steps=5)
    counted = [end for number, share in enumerate(shares) for end in [e for e in ended if e[0] == number][:share]]
    assert len(counted) == episodes
    (values,) = [values for _, _, values in recorder.records if "eval/return" in values]
    assert values["eval/return"] == pytest.approx(np.mean([r for _, r, _ in counted]), rel=1e-12)
    assert values["eval/return_std"] == pytest.approx(np.std([r for _, r, _ in counted]), rel=1e-12)
    assert values["eval/length"] == np.mean([n for *_, n in counted])


def test_evaluation_does_not_change_training(config):
    """It uses its own environments and keys."""
    results = []
    for callbacks in ([], [EvalCallback(make_env(Glide, 2), every=3, episodes=3)]):
        env = make_env(Glide, 2, seed=3)
        trainer = Trainer(toy(env, latents=True), config, callbacks)
        trainer.train(env, total_steps=20)
        results.append((flatten_state(on_host(trainer.state)), every_row(trainer.replay)))
    assert_equal(*(state for state, _ in results))
    assert_equal(*(rows for _, rows in results))


def test_by_default_ten_episodes_are_evaluated_if_environments_can_be_recreated(config, caplog, capsys):
    config = config.replace(eval_interval=5, log_interval=5)
    env = make_env(Glide, seed=3)
    Trainer(toy(env), config).train(Glide, total_steps=5)
    assert "eval/return" in capsys.readouterr().out
    assert not caplog.records
    Trainer(toy(env), config).train(Glide(), total_steps=5)
    assert "eval/return" not in capsys.readouterr().out
    assert "There will be no evaluation" in caplog.text


def test_play_is_a_function_of_model_and_seed():
    env = make_env(WalkPicture, 2)
    model = toy(env)
    before = flat(model.params)
    for explore in (False, True):
        first, again = (play(model, env, episodes=5, seed=4, explore=explore) for _ in range(2))
        elsewhere = play(model, make_env(WalkPicture, 2, seed=7), episodes=5, seed=4, explore=explore)
        assert first == again == elsewhere != play(model, env, episodes=5, seed=5, explore=explore)
        assert sorted(end.env for end in first) == [0, 0, 0, 1, 1]
    assert first != play(model, env, episodes=5, seed=4)
    assert_equal(before, flat(model.params))


def test_play_records_the_first_episode_of_environment_0():
    env = make_env(WalkPicture, 2, render_mode="rgb_array")
    frames = []
    ends = play(toy(env), env, episodes=5, seed=4, frames=frames)
    first = next(end for end in ends if end.env == 0)
    assert [int(frame[0, 0, 0]) for frame in frames] == list(range(first.length + 1))
    with pytest.raises(ConfigError, match="render=True"):
        play(toy(env), make_env(WalkPicture, 2), frames=[])


def test_play_checks_its_arguments():
    env = make_env(Walk)
    with pytest.raises(ConfigError, match="obs_shape"):
        play(toy(make_env(Corridor)), env)
    for wrong in (0, 2.0, -1):
        with pytest.raises(ConfigError, match="episodes must be an integer ≥ 1"):
            play(toy(env), env, episodes=wrong)
