"""Recorded data first, environments later: shares of batches, and runs that are resumed in either part."""

import logging

import numpy as np
import pytest
from online_worlds import ONLINE_CONFIG, Glide, assert_equal, every_row, small_dreamer, toy
from toy_family import PrefillingToy, ToyWorldModel

from worldloom.envs import make_env
from worldloom.errors import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, collect, offline_then_online
from worldloom.training.callbacks import Callback, CheckpointCallback
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.mixed_replay import DataShare, MixedReplay
from worldloom.training.run_info import on_host

CONFIG = ONLINE_CONFIG.replace(offline_updates=9, mix=0.5, mix_end=0.25, mix_updates=8, batch_size=4)
TOTAL = 19


@pytest.fixture(scope="module")
def data():
    """Episodes without latents, of another agent."""
    with make_env(Glide, 2, seed=77) as env:
        collected = collect(toy(env), env, 120, config=ONLINE_CONFIG.replace(seed=5))
    buffer = ReplayBuffer()
    for episode in collected.episodes():
        if len(episode["rewards"]) > 2:
            ends = {"terminated": bool(episode["is_terminal"][-1]), "layout": "arrival"}
            buffer.add_episode(episode["obs"], episode["actions"], episode["rewards"], **ends)
    return buffer


def make_run(folder, family, *, latents=False, config=CONFIG, extra=()):
    env = make_env(Glide, 2, seed=3)
    save = CheckpointCallback(str(folder / "checkpoints"), save_every=4, keep_last=99, save_best=False)
    return Trainer(toy(env, family, latents=latents), config, [save, *extra]), env


def result(trainer):
    return {
        "state": flatten_state(on_host(trainer.state)),
        "replay": every_row(trainer.replay),
        "pending": trainer.run.writeback.state_arrays(),
        "env_steps": np.array(trainer.run.env_steps),
    }


class Stop(Callback):
    """An error after ``step`` updates, as if the process was killed there."""

    every, order = 1, 2

    def __init__(self, step):
        self.step = step

    def on_step(self, info):
        if info.step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("family", "latents", "offline", "stops"),
    [(PrefillingToy, False, 9, (5, 9, 14)), (ToyWorldModel, True, 0, (6,))],
)
def test_a_run_resumed_in_either_part_equals_an_uninterrupted_one(tmp_path, data, family, latents, offline, stops):
    config = CONFIG.replace(offline_updates=offline)
    options = {"latents": latents, "config": config}
    whole, env = make_run(tmp_path / "whole", family, **options)
    offline_then_online(whole, data, env, total_steps=TOTAL)
    for number, stop in enumerate(stops):
        trainer, env = make_run(tmp_path / "parts", family, extra=[Stop(stop)], **options)
        with pytest.raises(RuntimeError, match="killed"):
            offline_then_online(trainer, data, env, total_steps=TOTAL, resume="auto" if number else False)
    trainer, env = make_run(tmp_path / "parts", family, **options)
    offline_then_online(trainer, data, env, total_steps=TOTAL, resume=True)
    assert_equal(result(whole), result(trainer))


def test_batches_hold_the_share_of_the_data_that_is_due(data):
    with make_env(Glide, 2, seed=1) as env:
        replay = collect(toy(env), env, 60, config=ONLINE_CONFIG)
    mixed = MixedReplay(replay, data, DataShare(1.0, 0.0, 10, first=100))
    for update, expected in ((0, 8), (100, 8), (105, 4), (109, 1), (110, 0), (500, 0)):
        ids = mixed.draw(8, 3, seed=1, update=update)
        assert int((ids[:, 0] < 0).sum()) == expected == mixed.share.windows(8, update)
        batch = mixed.take(ids)
        recorded, collected = ids[ids[:, 0] < 0], ids[ids[:, 0] >= 0]
        for name in ("obs", "actions", "rewards"):
            parts = [replay.take(collected)[name]] if len(collected) else []
            parts += [data.take(-1 - recorded)[name]] if len(recorded) else []
            np.testing.assert_array_equal(batch[name], np.concatenate(parts))
        np.testing.assert_array_equal(batch["row_ids"], ids)


def test_latents_are_written_to_what_was_collected_alone(data):
    with make_env(Glide, 2, seed=1) as env:
        replay = collect(toy(env, latents=True), env, 40, config=ONLINE_CONFIG)
    mixed = MixedReplay(replay, data, DataShare(0.5, 0.5, 1, first=0))
    ids = mixed.draw(4, 3, update=3)
    shapes = {name: (4, 3, *shape) for name, shape in mixed.latents.items()}
    mixed.write_latents(ids, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    context = mixed.take(ids, latents=True)["context"]
    for value in context.values():
        assert (value[:2] == 1).all()
        assert (value[2:] == 0).all()


@pytest.mark.slow
def test_dreamer_trains_on_mixed_batches_with_fresh_rows_first(data, tmp_path):
    env = make_env(Glide, 1, seed=3)
    config = CONFIG.replace(offline_updates=1, prefill=8, train_ratio=12.0, mix_end=None)
    trainer = Trainer(small_dreamer(env), config, [])
    drawn = []
    sample = MixedReplay.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedReplay, "take", lambda self, ids, **k: drawn.append(ids) or sample(self, ids, **k))
        offline_then_online(trainer, data, env, total_steps=4)
    assert len(drawn) == 3
    assert all(((ids[:, 0] < 0) == [False, False, True, True]).all() for ids in drawn)


def test_other_data_are_refused_when_a_run_goes_on(tmp_path, data, caplog):
    trainer, env = make_run(tmp_path, PrefillingToy)
    offline_then_online(trainer, data, env, total_steps=14)
    fewer, _ = data.split(0.5)
    trainer, env = make_run(tmp_path, PrefillingToy)
    with pytest.raises(ConfigError, match="begun with recorded data"):
        offline_then_online(trainer, fewer, env, total_steps=TOTAL, resume=True)
    trainer, env = make_run(tmp_path, PrefillingToy)
    with pytest.raises(ConfigError, match="--data"):
        trainer.train(env, total_steps=TOTAL, resume=True)
    with caplog.at_level(logging.WARNING, "worldloom"):
        offline_then_online(trainer, fewer, env, total_steps=16, resume="continue")
    assert "recorded data {" in caplog.text
    assert trainer.step == 16


def test_what_does_not_fit_is_refused(tmp_path, data):
    trainer, env = make_run(tmp_path, PrefillingToy)
    with pytest.raises(ConfigError, match="env must be an environment"):
        offline_then_online(trainer, data, data)
    with pytest.raises(DataError, match="recorded data is empty"):
        MixedReplay(ReplayBuffer(), ReplayBuffer(), DataShare(0.5, 0.5, 1, 0))
    other = ReplayBuffer()
    other.add_episode(np.zeros((5, 7)), np.zeros((4, 1)), np.zeros(4))
    with pytest.raises(DataError, match="have shape"):
        offline_then_online(trainer, other, env, total_steps=TOTAL)
    config = CONFIG.replace(replay_storage="device")
    trainer, env = make_run(tmp_path / "device", PrefillingToy, config=config)
    with pytest.raises(ConfigError, match="replay_storage"):
        offline_then_online(trainer, data, env, total_steps=TOTAL)
