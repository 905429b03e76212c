"""Online, fresh rows are replayed first and episodes in progress are left out, where the algorithm says so."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from online_worlds import ONLINE_CONFIG, assert_equal, small_dreamer, small_tdmpc2, toy
from tiny_envs import Walk
from toy_family import ALGORITHM, ToyConfig, ToyWorldModel, replay_spec

from worldloom.envs import make_env
from worldloom.errors import ConfigError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.checkpoint_files import flatten_state, read_checkpoint, write_checkpoint
from worldloom.training.run_info import on_host
from worldloom.training.sampler import SequenceSampler


def with_spec(**changes):
    """The toy model with another ``ReplaySpec``."""
    spec = lambda config, training: replay_spec(config, training)._replace(**changes)  # noqa: E731
    return type("Changed", (ToyWorldModel,), {"algorithm": dataclasses.replace(ALGORITHM, replay_spec=spec)})


Fresh, Finished = with_spec(cross_episodes=True, fresh_first=True), with_spec(open_episodes=False)


def batches_of(monkeypatch, model, *, total=30, num_envs=2, **options):
    """Row numbers [B, T] of every batch of a run, and its replay."""
    drawn, real = [], SequenceSampler.sample

    def sample(self, *args):
        batch, ids = real(self, *args)
        drawn.append((np.array(ids), len(self.buffer)))
        return batch, ids

    env = make_env(Walk, num_envs, seed=3)
    trainer = Trainer(toy(env, model), ONLINE_CONFIG.replace(**options), [])
    with monkeypatch.context() as patched:
        patched.setattr(SequenceSampler, "sample", sample)
        trainer.train(env, total_steps=total)
    return drawn, trainer.replay


@pytest.mark.parametrize("storage", ["host", "device"])
def test_every_row_is_replayed_before_long(monkeypatch, storage):
    rows = ONLINE_CONFIG.sequence_length
    drawn, replay = batches_of(monkeypatch, Fresh, total=40, train_ratio=3.0, replay_storage=storage)
    seen = set(np.concatenate([ids.ravel() for ids, _ in drawn]).tolist())
    # The newest rows may wait for the rest of their window, or for the next batch.
    assert seen >= set(range(len(replay) - 2 * 2 * rows))
    uniform, replay = batches_of(monkeypatch, ToyWorldModel, total=40, train_ratio=3.0)
    seen = set(np.concatenate([ids.ravel() for ids, _ in uniform]).tolist())
    assert not seen >= set(range(len(replay) - 2 * 2 * rows))


def test_the_places_that_fresh_windows_leave_hold_the_windows_of_a_run_without_them(monkeypatch):
    crossing, _ = batches_of(monkeypatch, with_spec(cross_episodes=True))
    fresh, _ = batches_of(monkeypatch, Fresh)
    assert len(crossing) == len(fresh) == 30
    same = [np.array_equal(a[0][-1], b[0][-1]) for a, b in zip(crossing, fresh, strict=True)]
    assert np.mean(same[5:]) > 0.9


def test_no_window_is_of_an_episode_in_progress(monkeypatch):
    drawn, replay = batches_of(monkeypatch, Finished, total=40)
    last = replay.take(np.arange(len(replay)))["is_last"]
    first = replay.take(np.arange(len(replay)))["is_first"]
    checked = 0
    for ids, held in drawn:
        for stream in (0, 1):
            mine = np.arange(stream, held, 2)
            end = mine[last[mine]].max(initial=-1)  # the last row of a finished episode then
            windows = ids[ids[:, 0] % 2 == stream]
            assert (windows <= end).all()
            checked += len(windows)
    assert checked > 100
    assert first.any()


class Endless(Walk):
    """A walk whose first episode outlasts the prefill."""

    def step(self, action):
        obs, reward, *_, info = super().step(action)
        return obs, reward, False, self.steps >= 50, info


def test_an_episode_that_outlasts_the_prefill_is_replayed_meanwhile_and_said(caplog):
    with make_env(Endless, 1, seed=3) as env, caplog.at_level(logging.WARNING, "worldloom"):
        Trainer(toy(env, Finished), ONLINE_CONFIG, []).train(env, total_steps=60)
    assert caplog.text.count("No finished episode has the 3 rows of a window yet") == 1
    caplog.clear()
    with make_env(Walk, 1, seed=3) as env, caplog.at_level(logging.WARNING, "worldloom"):
        Trainer(toy(env, Finished), ONLINE_CONFIG, []).train(env, total_steps=5)
    assert "No finished episode" not in caplog.text


def test_recorded_data_are_drawn_as_before():
    buffer = ReplayBuffer(1_000)
    rng = np.random.default_rng(0)
    buffer.add_episode(rng.normal(size=(20, 2)), np.zeros((19, 1)), np.zeros(19), truncated=True)
    for number in range(20):  # an episode that has not ended, given as data
        buffer.add_rows(
            rng.normal(size=(1, 2)), np.zeros((1, 1)), np.zeros(1), [number == 0], [False], [False], streams=[5]
        )
    config = ONLINE_CONFIG.replace(batch_size=16, sequence_length=4)
    models = [kind(ToyConfig()) for kind in (Finished, Fresh)]
    ids = [SequenceSampler(buffer, model, config).sample(0, 3)[1] for model in models]
    expected = [buffer.draw(16, 4, seed=0, update=3, cross_episodes=cross) for cross in (False, True)]
    np.testing.assert_array_equal(ids, expected)
    assert max(expected[0].ravel()) >= 20


@pytest.mark.parametrize(("kind", "stop"), [(Fresh, 13), (Finished, 13)])
def test_a_resumed_run_draws_the_same_batches(tmp_path, kind, stop):
    results = []
    for folder, ends in (("whole", [30]), ("parts", [stop, 30])):
        for end in ends:
            env = make_env(Walk, 2, seed=3)
            saver = CheckpointCallback(str(tmp_path / folder), 5, keep_last=99, save_best=False)
            trainer = Trainer(toy(env, kind), ONLINE_CONFIG.replace(train_ratio=5.0), [saver])
            resume = tmp_path / folder / "10" if end != ends[0] else False
            trainer.train(env, total_steps=end, resume=resume)
        results.append((flatten_state(on_host(trainer.state)), trainer.run.collector.queue.drawn))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("make_model", [small_dreamer, small_tdmpc2])
def test_the_families_ask_for_what_their_programs_do(make_model):
    with make_env(Walk, 2, seed=3) as env:
        model = make_model(env)
        spec = model.algorithm.replay_spec(model.config, ONLINE_CONFIG)
    assert (spec.fresh_first, spec.open_episodes) == ((True, True) if make_model is small_dreamer else (False, False))


def test_checkpoints_of_earlier_versions_can_be_resumed(tmp_path):
    """They say nothing of fresh rows, rewards and numbers of episodes, and lack settings that have been added since."""
    env = make_env(Walk, 2, seed=3)
    saver = CheckpointCallback(str(tmp_path), 10, save_best=False)
    Trainer(toy(env), ONLINE_CONFIG, [saver]).train(env, total_steps=10)
    run = Trainer(toy(env), ONLINE_CONFIG, [])
    run.run.use_env(env)
    target = run.run.collector
    counts, _ = target.state_dict()
    old = {name: value for name, value in counts.items() if name not in ("episodes", "seen", "drawn", "env_steps")}
    target.load_state_dict({**old, "decisions": 7, "ends": [[0, 1.5, 4, True, False]]}, {})
    assert (target.episodes, target.ends[0].end.length, target.ends[0].env_steps) == (1, 4, 7)
    assert target.queue.drawn == len(target.replay) - 1
    # The checkpoint's training config without the newest fields.
    run = Trainer(toy(env), ONLINE_CONFIG, [])
    run.run.use_env(env)
    snapshot = read_checkpoint(tmp_path / "10", run.state, run.run.identity())
    for name in ("lr_schedule", "prefill_policy", "eval_episodes"):
        del snapshot.record["training"][name]
    write_checkpoint(tmp_path / "11", snapshot)
    assert "lr_schedule" not in json.loads((tmp_path / "11" / "run.json").read_text())["training"]
    assert read_checkpoint(tmp_path / "11", run.state, run.run.identity()).record["step"] == 10
    run.config = run.config.replace(lr_schedule="cosine")
    with pytest.raises(ConfigError, match="lr_schedule='constant'"):
        read_checkpoint(tmp_path / "11", run.state, run.run.identity())
