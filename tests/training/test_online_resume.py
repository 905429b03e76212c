"""A run that is stopped and resumed equals an uninterrupted one, or is refused with an explanation."""

import json
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
from online_worlds import (
    ONLINE_CONFIG,
    Glide,
    OneStepEpisodes,
    Unseeded,
    assert_equal,
    assert_rows_match_env,
    buffer_with_latents,
    every_row,
    rows_of_env,
    small_dreamer,
    small_tdmpc2,
    toy,
)
from tiny_envs import Walk
from toy_family import PrefillingToy, ToyConfig, ToyWorldModel, fill

from worldloom.envs import make_env
from worldloom.errors import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer
from worldloom.training.callbacks import Callback, CheckpointCallback, EvalCallback, LoggingCallback
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.run_info import on_host

TOTAL = 40
FAMILIES = {"latents": (ToyWorldModel, True), "random prefill": (PrefillingToy, False)}
"""Model class, and whether it stores latents."""


@pytest.fixture
def config():
    return ONLINE_CONFIG


class Crash(Exception):
    """An error in a callback."""


class StopAt(Callback):
    """Ends the training of a process at ``step``, after all other callbacks have run."""

    every = 1
    order = 2

    def __init__(self, how, step):
        self.how, self.step = how, step

    def on_step(self, info):
        if info.step != self.step:
            return
        if self.how == "exception":
            raise Crash
        if self.how == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)


def make_run(folder, config, family, *, num_envs=2, save_every=7, latents=False, kind=Walk, evaluated=None, extra=()):
    """A trainer of the run in ``folder``, and its environment."""
    env = make_env(kind, num_envs, seed=3)
    callbacks = [
        CheckpointCallback(str(folder / "checkpoints"), save_every=save_every, keep_last=99, save_best=False),
        EvalCallback(make_env(evaluated or kind, 2, seed=9), every=6, episodes=3, seed=9),
        LoggingCallback(str(folder), log_to_console=False),
        *extra,
    ]
    return Trainer(toy(env, family, latents=latents), config, callbacks), env


def run_result(trainer, folder, leave_out=()):
    """Everything that a run produces, for comparison; log records without times and without the steps ``leave_out``."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in ("time", "fps/update")} for line in lines]
    return {
        "state": flatten_state(on_host(trainer.state)),
        "model": trainer.model.params,
        "replay": every_row(trainer.replay),
        "position": trainer.replay.state_dict(),
        "env_steps": np.array(trainer.run.env_steps),
        "pending": trainer.run.writeback.state_arrays(),
        "log": {str(n): record for n, record in enumerate(r for r in log if r["step"] not in leave_out)},
    }


def settings(config, capacity):
    """A burst of updates after the prefill; then some steps of the environments are followed by two, some by none."""
    return config.replace(updates_per_call=capacity, prefill=24, prefill_updates=5, train_ratio=15.0, log_interval=4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Trainer and folder of an uninterrupted run, trained on first use."""
    runs = {}

    def whole(name, config, **options):
        key = name, config, *options.items()
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            family, latents = FAMILIES[name]
            trainer, env = make_run(folder, config, family, latents=latents, **options)
            trainer.train(env, total_steps=TOTAL)
            runs[key] = trainer, folder
        return runs[key]

    return whole


def train_until(trainer, env, stop, resume):
    """Train one process's part of a run, up to ``stop``."""
    if isinstance(stop, int):
        trainer.train(env, total_steps=stop, resume=resume)
        return
    with pytest.raises((Crash, SystemExit)):
        trainer.train(env, total_steps=TOTAL, resume=resume)


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("stops", "resume"),
    [
        ((1, 7, 8, 23), "auto"),
        ((("sigterm", 3), ("sigterm", 14), ("sigterm", 25)), "auto"),
        ((("exception", 7), ("exception", 10), ("exception", 36)), True),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, uninterrupted, name, capacity, stops, resume):
    config = settings(config, capacity)
    whole, whole_folder = uninterrupted(name, config)
    family, latents = FAMILIES[name]
    for number, stop in enumerate(stops):
        extra = [] if isinstance(stop, int) else [StopAt(*stop)]
        trainer, env = make_run(tmp_path, config, family, latents=latents, extra=extra)
        train_until(trainer, env, stop, resume if number else False)
    trainer, env = make_run(tmp_path, config, family, latents=latents)
    trainer.train(env, total_steps=TOTAL, resume=resume)
    ends = [stop if isinstance(stop, int) else stop[1] for stop in stops if "exception" not in np.atleast_1d(stop)]
    assert_equal(run_result(whole, whole_folder, ends), run_result(trainer, tmp_path, ends))


def test_a_run_can_resume_from_any_checkpoint(config, tmp_path, uninterrupted):
    config = settings(config, 3)
    whole, folder = uninterrupted("latents", config)
    for step in (7, 14, 21, 28, 35, 40):
        trainer, env = make_run(tmp_path / str(step), config, ToyWorldModel, latents=True)
        trainer.train(env, total_steps=TOTAL + (step == 40), resume=folder / "checkpoints" / str(step))
        if step < 40:
            one, other = run_result(whole, folder), run_result(trainer, tmp_path / str(step))
            kept = [line for line in one.pop("log").values() if line["step"] > step]
            assert kept == list(other.pop("log").values())
            assert_equal(one, other)


@pytest.mark.parametrize("parts", [(1, 2, 9, 40), (21, 40)])
def test_several_calls_of_train_equal_a_single_one(config, uninterrupted, tmp_path, parts):
    whole, _ = uninterrupted("latents", settings(config, 3))
    trainer, env = make_run(tmp_path, settings(config, 3), ToyWorldModel, latents=True)
    for total in parts:
        trainer.train(env, total_steps=total)
    assert_equal(flatten_state(on_host(whole.state)), flatten_state(on_host(trainer.state)))
    assert_equal(every_row(whole.replay), every_row(trainer.replay))


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_call_size_nor_callbacks_change_the_results(config, tmp_path, uninterrupted, name):
    """Latents are written back in groups of K, so results with latents depend on K, but not on how calls are split."""
    family, latents = FAMILIES[name]
    for capacity, interval in ((3, 1), (3, 100), (8, 5)):
        whole, _ = uninterrupted(name, settings(config, capacity if latents else 1))
        callbacks = [(interval, lambda info: print(info.read_state().step))]
        config = settings(config, capacity)
        trainer, env = make_run(tmp_path / f"{capacity}-{interval}", config, family, latents=latents, extra=callbacks)
        trainer.train(env, total_steps=TOTAL)
        assert_equal(flatten_state(on_host(whole.state)), flatten_state(on_host(trainer.state)))
        assert_equal(every_row(whole.replay), every_row(trainer.replay))


def test_a_run_stopped_by_sigterm_before_the_first_update_resumes(config, tmp_path, uninterrupted):
    class Killing(Walk):
        calls = 0

        def step(self, action):
            type(self).calls += 1
            if type(self).calls == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    config = settings(config, 1)
    whole, folder = uninterrupted("random prefill", config)
    trainer, env = make_run(tmp_path, config, PrefillingToy, kind=Killing)
    with pytest.raises(SystemExit) as caught:
        trainer.train(env, total_steps=TOTAL)
    assert caught.value.code == 128 + signal.SIGTERM
    assert trainer.step == 0
    trainer, env = make_run(tmp_path, config, PrefillingToy)
    trainer.train(env, total_steps=TOTAL, resume=True)
    assert len(trainer.replay) == len(whole.replay)
    assert_equal(run_result(whole, folder), run_result(trainer, tmp_path))


@pytest.mark.parametrize("step", [1, 20, 40])
def test_an_evaluation_that_a_signal_cuts_off_is_made_up_for(config, tmp_path, uninterrupted, step):
    """No record is missing, and what follows evaluations (the best weights, say) is told of it."""

    class Killing(Walk):
        calls = 0

        def step(self, action):
            type(self).calls += 1
            if type(self).calls == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    config = settings(config, 3)
    whole, folder = uninterrupted("random prefill", config)
    trainer, env = make_run(tmp_path, config, PrefillingToy, evaluated=Killing)
    with pytest.raises(SystemExit):
        trainer.train(env, total_steps=TOTAL)
    stopped = trainer.step
    assert stopped % 6 == 0
    assert stopped < TOTAL
    evaluated = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "eval/return" in line]
    assert len(evaluated) == stopped // 6 - 1
    trainer, env = make_run(tmp_path, config, PrefillingToy)
    trainer.train(env, total_steps=TOTAL, resume=True)
    results = [run_result(*run) for run in ((whole, folder), (trainer, tmp_path))]
    # The stop has records of the means until then, which come before the evaluation.
    logs = [[json.dumps(record) for record in each.pop("log").values()] for each in results]
    assert {*logs[0]} <= {*logs[1]}
    assert {json.loads(record)["step"] for record in {*logs[1]} - {*logs[0]}} <= {stopped}
    assert_equal(*results)


@pytest.mark.parametrize("capacity", [1, 3])
def test_an_offline_run_restores_its_latents_in_a_new_buffer(config, tmp_path, capacity):
    """The user provides the episodes again; the latents that training wrote to their rows come from the checkpoint."""
    config = config.replace(updates_per_call=capacity)

    def run(folder, buffer, **options):
        saves = CheckpointCallback(str(tmp_path / folder), save_every=4)
        trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), config, [saves])
        trainer.train(buffer, **options)
        return {
            "state": flatten_state(on_host(trainer.state)),
            "replay": every_row(buffer),
            "pending": trainer.run.writeback.state_arrays(),
        }

    whole = run("whole", buffer_with_latents(), total_steps=30)
    for stop in (1, 8, 11, 22):
        run("resumed", buffer_with_latents(), total_steps=stop, resume="auto")
    resumed = run("resumed", buffer_with_latents(), total_steps=30, resume=True)
    assert np.abs(whole["replay"]["latents"]["memory"]).max() > 1
    assert_equal(whole, resumed)


def test_pending_latents_are_written_only_to_their_own_buffer(config):
    """Training on another buffer in between does not write latents of the first buffer to the second."""
    rows = []
    for detour in (False, True):
        trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), config.replace(updates_per_call=3), [])
        first, second = buffer_with_latents(), fill(ReplayBuffer(999, latents={"memory": (1,)}), episodes=1, steps=6)
        trainer.train(first, total_steps=20)
        if detour:
            trainer.train(second, total_steps=21)
            assert not every_row(second)["latents"]["memory"].any()
        else:
            trainer.run.writeback.switch_buffer(None)
        rows.append(every_row(first))
    assert_equal(*rows)


def test_a_resumed_run_collects_into_the_given_buffer(config, tmp_path, uninterrupted):
    whole, _ = uninterrupted("latents", settings(config, 1))
    for stop in (10, TOTAL):
        buffer = ReplayBuffer(1_000_000)
        trainer, env = make_run(tmp_path, settings(config, 1), ToyWorldModel, latents=True)
        trainer.train(env, total_steps=stop, resume="auto", replay=buffer)
        assert trainer.replay is buffer
    assert_equal(every_row(whole.replay), every_row(buffer))


def test_an_offline_run_cannot_be_resumed_online_nor_the_reverse(config, tmp_path):
    env = make_env(Glide, seed=3)

    def trainer(folder):
        return Trainer(toy(env), config, [CheckpointCallback(str(tmp_path / folder), save_every=5)])

    trainer("online").train(env, total_steps=5)
    trainer("offline").train(fill(ReplayBuffer(999)), total_steps=5)
    with pytest.raises(ConfigError, match="was trained from environments; it cannot continue from recorded episodes"):
        trainer("online").train(fill(ReplayBuffer(999)), resume=True, total_steps=9)
    with pytest.raises(ConfigError, match="was trained from recorded episodes; it cannot continue from environments"):
        trainer("offline").train(env, resume=True, total_steps=9)


def test_another_number_of_environments_is_refused(config, tmp_path):
    for count in (2, 3):
        env = make_env(Walk, count, seed=3)
        trainer = Trainer(toy(env), config, [CheckpointCallback(str(tmp_path), save_every=5)])
        if count == 2:
            trainer.train(env, total_steps=5)
    with pytest.raises(DataError, match="of 2 environments; there are 3"):
        trainer.train(env, total_steps=9, resume="auto")


@pytest.mark.parametrize("change", [{"time_limit": 3}, {"action_repeat": 2}])
def test_environments_other_than_those_of_the_run_are_refused(config, tmp_path, change):
    for fields in ({}, change):
        env = make_env(Walk, seed=3, **fields)
        trainer = Trainer(toy(env), config, [CheckpointCallback(str(tmp_path), save_every=5)])
        if not fields:
            trainer.train(env, total_steps=5)
    name = "episode_length" if "time_limit" in change else "action_repeat"
    with pytest.raises(ConfigError, match=f"collected from environments with {name}="):
        trainer.train(env, total_steps=9, resume="auto")
    assert trainer.step == 0
    assert len(trainer.replay) == 0


def test_a_resumed_run_may_step_its_environments_in_other_processes(config, tmp_path):
    for parallel in ("sync", "subprocess"):
        with make_env(Walk, seed=3, parallel=parallel) as env:
            trainer = Trainer(toy(env), config, [CheckpointCallback(str(tmp_path), save_every=5)])
            trainer.train(env, total_steps=trainer.step + 5 if parallel == "sync" else 9, resume="auto")
    assert trainer.step == 9


def vector_of_gymnasium():
    return make_env(gym.vector.SyncVectorEnv([Walk, Walk], autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP), seed=3)


@pytest.mark.parametrize(
    ("make", "count"),
    [(vector_of_gymnasium, 2), (lambda: make_env(Unseeded, seed=3), 1), (lambda: make_env(OneStepEpisodes), 1)],
)
def test_environments_that_cannot_be_replayed_begin_new_episodes(config, tmp_path, make, count):
    env = make()
    saves = CheckpointCallback(str(tmp_path), save_every=1, keep_last=99, save_best=False)
    Trainer(toy(env, latents=True), config.replace(sequence_length=1), [saves]).train(env, total_steps=6)
    for step in (1, 2, 3, 4):
        env = make()
        trainer = Trainer(toy(env, latents=True), config.replace(sequence_length=1), [])
        with pytest.warns(RuntimeWarning, match="their next episodes begin instead"):
            trainer.train(env, total_steps=step + 2, resume=tmp_path / str(step))
        assert trainer.step == step + 2
        rows = every_row(trainer.replay)
        record = json.loads((tmp_path / str(step) / "run.json").read_text())
        new = slice(record["replay_size"], record["replay_size"] + count)
        assert rows["is_first"][new].tolist() == [True] * count
        assert rows["is_last"][record["replay_size"] - count : record["replay_size"]].all()
        # The latent belongs to its row: those saved for the lost observation are not stored with the new one.
        np.testing.assert_array_equal(rows["latents"]["memory"][new], rows["obs"][new, :1])


@pytest.mark.parametrize("make", [small_dreamer, small_tdmpc2])
def test_either_family_resumes_bit_for_bit(config, tmp_path, make):
    """Calls of three updates; a stop by total_steps, one by SIGTERM, one by an error after a save."""
    config = config.replace(updates_per_call=3, train_ratio=8.0, prefill=30, prefill_updates=4, sequence_length=4)

    def make_trainer(folder, *extra):
        env = make_env(Glide, 2, seed=3)
        callbacks = [
            CheckpointCallback(str(tmp_path / folder / "checkpoints"), save_every=5, save_best=False),
            EvalCallback(make_env(Glide, 2), every=6, episodes=3),
            LoggingCallback(str(tmp_path / folder), log_to_console=False),
            *extra,
        ]
        return Trainer(make(env), config, callbacks), env

    whole, env = make_trainer("whole")
    whole.train(env, total_steps=20)
    trainer, env = make_trainer("resumed")
    trainer.train(env, total_steps=4)
    for stop in (("sigterm", 8), ("exception", 12)):
        trainer, env = make_trainer("resumed", StopAt(*stop))
        with pytest.raises((Crash, SystemExit)):
            trainer.train(env, total_steps=20, resume="auto")
    trainer, env = make_trainer("resumed")
    trainer.train(env, total_steps=20, resume="auto")
    assert_equal(run_result(whole, tmp_path / "whole", (4, 8)), run_result(trainer, tmp_path / "resumed", (4, 8)))
    for number in range(2):
        assert_rows_match_env(Glide, rows_of_env(every_row(trainer.replay), number, 2), 3, number)
