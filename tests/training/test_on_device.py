"""The loop on the device computes what the loop on the host computes, and is resumed exactly."""

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax_worlds import (
    CHOICES,
    CONFIG,
    DRIFT,
    KEYED,
    Drift,
    Episodic,
    LikeDreamer,
    LikeTDMPC2,
    Plain,
    assert_same,
    content,
    trained,
    trainer_in,
)

from worldloom.envs import make_env
from worldloom.errors import ConfigError, DataError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig, evaluation, offline_then_online
from worldloom.training.callbacks import Callback, CheckpointCallback, ProgressCallback, StopTraining
from worldloom.training.on_device import fit as loop_module
from worldloom.training.on_device import play as play_module
from worldloom.training.on_device import transfer as transfer_module
from worldloom.training.on_device.episodes import episodes_so_far

SLOW = pytest.mark.slow
CASES = [
    pytest.param(
        LikeDreamer,
        {"latents": True, "num_envs": 3, "updates_per_call": 2, "prefill_updates": 9, "replay_capacity": 47},
        id="across episodes, fresh rows first, latents, groups of updates, rows evicted",
    ),
    pytest.param(
        LikeTDMPC2,
        {"env": CHOICES, "replay_capacity": 60, "prefill_policy": "correlated"},
        id="within finished episodes, random prefill, rows evicted",
    ),
    pytest.param(Episodic, {"replay_capacity": 50}, id="across finished episodes", marks=SLOW),
    pytest.param(Plain, {"num_envs": 1, "train_ratio": 5.0}, id="within any episode", marks=SLOW),
    pytest.param(LikeDreamer, {"latents": True, "train_ratio": 40.0}, id="several updates per step", marks=SLOW),
    pytest.param(LikeTDMPC2, {"replay_capacity": 41, "num_envs": 3}, id="odd streams", marks=SLOW),
]


class Records(Callback):
    """What a callback sees at every log record."""

    order = -2  # before the episodes are cleared

    def __init__(self):
        self.seen = []

    def on_step(self, info):
        ends = [(record.number, record.env_steps, record.prefill, record.end) for record in info.episodes()]
        self.seen.append((info.step, info.env_steps, info.replay_size, dict(info.means), ends, info.episodes_ended))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_both_loops_collect_the_same_rows_and_arrive_at_the_same_weights(kind, options):
    seen = {loop: Records() for loop in ("host", "device")}
    runs = {loop: trained(kind, loop, callbacks=[seen[loop]], **options) for loop in seen}
    assert runs["device"].run.sampler.buffer is runs["device"].replay
    assert_same(content(runs["host"]), content(runs["device"]))
    assert seen["host"].seen == seen["device"].seen
    assert len(seen["device"].seen) == 4
    ends = [end for record in seen["device"].seen for *_, end in record[4]]
    assert len(ends) > 5
    assert all(end.info == {"steps": float(end.length)} for end in ends)


@pytest.mark.parametrize(
    ("before", "after"),
    [("device", "device"), pytest.param("device", "host", marks=SLOW), pytest.param("host", "device", marks=SLOW)],
)
def test_a_run_resumed_on_either_loop_equals_an_uninterrupted_one(tmp_path, before, after):
    options = {"latents": True, "num_envs": 3, "updates_per_call": 2, "prefill_updates": 9, "replay_capacity": 470}
    save = lambda: [CheckpointCallback(str(tmp_path), save_every=7, save_best=False)]  # noqa: E731
    whole = trained(LikeDreamer, "device", **options)
    trained(LikeDreamer, before, callbacks=save(), total_steps=23, **options)
    env = make_env(DRIFT, 3, seed=3)
    changes = {name: value for name, value in options.items() if name not in ("latents", "num_envs")}
    # A call may do other numbers of updates: the groups in which latents are written back stay.
    config = CONFIG.replace(loop=after, **changes | {"updates_per_call": 6})
    resumed = trainer_in(env, LikeDreamer, config, latents=True, callbacks=save())
    resumed.train(env, resume=True)
    assert_same(content(whole), content(resumed))


def test_keys_in_the_state_of_an_environment_are_drawn_from_stored_and_resumed_as_on_the_host(tmp_path):
    save = lambda: [CheckpointCallback(str(tmp_path), save_every=7, save_best=False)]  # noqa: E731
    host, device = (trained(LikeTDMPC2, loop, KEYED) for loop in ("host", "device"))
    assert_same(content(host), content(device))
    trained(LikeTDMPC2, "device", KEYED, callbacks=save(), total_steps=11)
    for total, loop in ((23, "host"), (40, "device")):
        resumed = trained(LikeTDMPC2, loop, KEYED, callbacks=save(), total_steps=total, resume=True)
    assert_same(content(host), content(resumed))


def test_neither_further_calls_nor_their_length_change_a_run(monkeypatch):
    whole = trained(LikeTDMPC2, "device")
    env = make_env(DRIFT, 2, seed=3)
    parts = trainer_in(env, LikeTDMPC2, CONFIG.replace(loop="device"))
    monkeypatch.setattr(loop_module, "_MOST_UPDATES", 3)
    monkeypatch.setattr(transfer_module, "_MOST_STEPS", 2)
    for total in (1, 17, 40):
        parts.train(env, total_steps=total)
    assert_same(content(whole), content(parts))


@pytest.mark.parametrize("kind", [LikeDreamer, LikeTDMPC2])
def test_training_goes_on_after_an_error_of_a_callback_as_if_it_had_not_been(kind):
    class Full(Callback):
        every, raised = 13, False

        def on_step(self, info):
            if not self.raised:
                self.raised = True
                raise OSError("no space left")

    latents = kind is LikeDreamer
    whole, full = trained(kind, "device", latents=latents), Full()
    env = make_env(DRIFT, 2, seed=3)
    broken = trainer_in(env, kind, CONFIG.replace(loop="device"), latents=latents, callbacks=[full])
    with pytest.raises(OSError, match="no space"):
        broken.train(env)
    assert broken.step == 13
    broken.train(env)
    assert_same(content(whole), content(broken))


def test_the_pace_of_calls_follows_their_time_but_not_that_of_short_ones():
    pace = loop_module.Pace(64, 1024)
    pace.note(64, 30.0)  # compiles
    assert pace.count == 64
    pace.note(64, 0.25)
    assert pace.count == 256
    pace.note(3, 0.1)  # Had only 3 steps to do, and says nothing about more.
    assert pace.count == 256
    pace.note(100, 0.1)
    assert pace.count == 1000
    pace.note(1000, 4.0)
    assert pace.count == 250
    pace.note(3, 3.0)  # Each takes a second.
    assert pace.count == 1


def test_many_steps_between_two_updates_are_calls_of_their_own(monkeypatch):
    config = {"train_ratio": 0.05, "total_steps": 4}
    whole = trained(LikeTDMPC2, "host", **config)
    steps, train = [], loop_module.Device.train

    def noted(self, end):
        before = int(self.state.actor.calls)
        train(self, end)
        steps.append(int(self.state.actor.calls) - before)

    monkeypatch.setattr(loop_module.Device, "train", noted)
    monkeypatch.setattr(loop_module, "_SECONDS", 0.0)  # Every call takes too long.
    assert_same(content(whole), content(trained(LikeTDMPC2, "device", **config)))
    assert sum(steps) > 300
    assert max(steps) <= 64


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_returns_of_many_steps_are_those_of_one_step_after_the_other(steps, envs, seed):
    rng = np.random.default_rng(seed)
    is_first = rng.random((steps, envs)) < 0.2
    rewards = np.where(is_first, 0, rng.normal(size=(steps, envs))).astype(np.float32)
    returns, lengths = rng.normal(size=envs), rng.integers(0, 9, envs)
    totals, ages = episodes_so_far(is_first, rewards, returns, lengths)
    for step in range(steps):
        for env in range(envs):
            returns[env] = (0.0 if is_first[step, env] else returns[env]) + rewards[step, env]
            lengths[env] = 0 if is_first[step, env] else lengths[env] + 1
        np.testing.assert_array_equal(totals[step], returns)
        np.testing.assert_array_equal(ages[step], lengths)


@SLOW
def test_an_action_repeat_and_a_time_limit_are_those_of_make_env():
    runs = []
    for loop in ("host", "device"):
        env = make_env(DRIFT, 2, seed=3, action_repeat=2, time_limit=5)
        assert (env.action_repeat, env.time_limit, env.episode_length) == (2, 5, 3)
        runs.append(trainer_in(env, Plain, CONFIG.replace(loop=loop, log_interval=1_000)))
        runs[-1].train(env)
    assert_same(content(runs[0]), content(runs[1]))
    assert runs[1].run.env_steps == 2 * runs[1].run.collector.decisions
    assert max(record.end.length for record in runs[1].run.collector.ends) == 3


def test_nan_from_an_environment_stops_the_run_with_the_weights_before(caplog):
    bad = Drift(bad_after=6)
    states = {}
    for loop in ("host", "device"):
        env = make_env(bad, 2, seed=3)
        trainer = trainer_in(env, Plain, CONFIG.replace(loop=loop, prefill=20, train_ratio=3.0, total_steps=5000))
        with pytest.raises(DataError, match=r"'obs' came back NaN or infinite from environments \[\d\]; check"):
            trainer.train(env)
        states[loop] = trainer
        assert env.closed
    assert states["host"].step == states["device"].step
    for one, other in zip(*(jax_leaves(each) for each in states.values()), strict=True):
        np.testing.assert_array_equal(one, other)


def jax_leaves(trainer):
    return [trainer.model.params["dynamics"]["kernel"], trainer.model.params["reward"]["kernel"]]


def test_a_prefill_too_short_for_a_window_is_refused_as_on_the_host():
    with pytest.raises(DataError, match=r"A window needs 9 rows.*\d decision steps.* larger prefill takes more"):
        trained(LikeTDMPC2, "device", prefill=4, sequence_length=9)


def test_terminal_states_are_refused_by_a_family_that_does_not_know_them():
    def validate(config, *, has_terminals, online):
        if has_terminals:
            raise ConfigError("An episode ended in a terminal state.")

    algorithm = dataclasses.replace(LikeTDMPC2.algorithm, validate_data=validate)
    with pytest.raises(ConfigError, match="terminal state"):
        trained(type("Refuses", (LikeTDMPC2,), {"algorithm": algorithm}), "device")


def test_where_the_device_is_impossible_the_host_trains_and_says_why(caplog):
    recorded = ReplayBuffer(1000)
    recorded.add_episode(np.zeros((5, 2), np.float32), np.zeros((4, 1), np.float32), np.zeros(4))
    for replay, options, changes, why in (
        (recorded, {}, {}, "replay holds rows that these environments have not collected"),
        (None, {"on_bad_step": "restart"}, {}, "on_bad_step='restart' needs the host"),
        (None, {}, {"mesh": {"data": 1}}, "it runs on one device, and a mesh divides updates over several"),
    ):
        for loop in ("auto", "device"):
            env = make_env(DRIFT, 2, seed=3, **options)
            trainer = trainer_in(env, Plain, CONFIG.replace(loop=loop, total_steps=2, **changes))
            if loop == "device":
                with pytest.raises(ConfigError, match=f"loop='device' is impossible: {why}"):
                    trainer.train(env, replay=replay)
                continue
            with caplog.at_level(logging.WARNING, "worldloom"):
                trainer.train(env, replay=replay)
            assert f"The loop runs on the host: {why}" in caplog.text
            assert trainer.step == 2


def test_a_share_of_recorded_data_needs_the_host(caplog):
    recorded = ReplayBuffer(1000)
    for _ in range(4):
        recorded.add_episode(np.zeros((9, 2), np.float32), np.zeros((8, 1), np.float32), np.zeros(8), truncated=True)
    env = make_env(DRIFT, 2, seed=3)
    trainer = trainer_in(env, Plain, CONFIG.replace(total_steps=4, offline_updates=2, mix=0.5))
    with caplog.at_level(logging.WARNING, "worldloom"):
        offline_then_online(trainer, recorded, env)
    assert "The loop runs on the host: batches have a share of recorded data" in caplog.text
    assert trainer.step == 4


def test_the_device_is_refused_where_nothing_is_in_jax(buffer, model):
    config = TrainingConfig(total_steps=1, batch_size=2, sequence_length=3, device="cpu", loop="device")
    with pytest.raises(ConfigError, match="loop='device' needs a JAX environment"):
        Trainer(model, config, callbacks=[]).train(buffer)


def test_a_stop_request_ends_the_run_where_the_callback_asked_for_it():
    class Stop(Callback):
        every = 13

        def on_step(self, info):
            return StopTraining("enough")

    trainer = trained(LikeTDMPC2, "device", callbacks=[Stop()])
    assert trainer.step == 13
    assert trainer.stop_reason == "Stop: enough"


@pytest.mark.parametrize("world", [CHOICES, KEYED], ids=["discrete actions", "keys in the state"])
def test_an_evaluation_on_the_device_plays_the_episodes_of_the_host(monkeypatch, world):
    env = make_env(world, 3, seed=1)
    model = trainer_in(env, LikeTDMPC2, CONFIG).model
    for options in ({"episodes": 8}, {"episodes": 3, "explore": True}):
        monkeypatch.setattr(evaluation, "is_on_device", lambda env: False)
        on_host = evaluation.play(model, env, seed=7, **options)
        monkeypatch.setattr(evaluation, "is_on_device", lambda env: True)
        assert evaluation.play(model, env, seed=7, **options) == on_host
        assert len({end.length for end in on_host}) > 1


def test_an_evaluation_on_the_device_is_compiled_once(monkeypatch):
    made, program = [], play_module._program
    monkeypatch.setattr(play_module, "_MOST", 4)  # several calls
    monkeypatch.setattr(play_module, "_program", lambda *key: made.append(program(*key)) or made[-1])
    env = make_env(DRIFT, 3, seed=1)
    evaluation.play(trainer_in(env, Plain, CONFIG).model, env, episodes=7)
    assert [each._cache_size() for each in made] == [1]


def test_an_evaluation_on_the_device_stops_where_the_last_episode_ends(monkeypatch):
    env = make_env(DRIFT, 3, seed=1)
    model = trainer_in(env, Plain, CONFIG).model
    seen, steps_on_device = [], evaluation.steps_on_device

    def noted(*arguments):
        for step in steps_on_device(*arguments):
            seen.append(step)
            yield step

    monkeypatch.setattr(evaluation, "steps_on_device", noted)
    ends = evaluation.play(model, env, episodes=7)
    # Resets between an environment's episodes are steps, too.
    steps = [sum(end.length + 1 for end in ends if end.env == i) - 1 for i in range(3)]
    assert len(seen) == max(steps)
    assert sum(len(step.events) for step in seen) >= 7


def test_nan_in_an_evaluation_is_refused():
    env = make_env(Drift(bad_after=3), 3, seed=1)
    with pytest.raises(DataError, match="came back NaN or infinite"):
        evaluation.play(trainer_in(env, Plain, CONFIG).model, env, episodes=6)


@pytest.mark.parametrize("how", ["reset", "stepped"])
def test_environments_moved_in_between_begin_new_episodes_on_either_loop(how, caplog):
    """Otherwise a row would join an observation with the action for another."""
    left = {}
    for loop in ("host", "device"):
        world = make_env(DRIFT, 2, seed=3)
        trainer = trainer_in(world, LikeDreamer, CONFIG.replace(loop=loop), latents=True)
        trainer.train(world, total_steps=20)
        if how == "reset":
            world.reset()
        else:
            world.step(np.zeros((2, 1), np.float32))
        caplog.clear()
        trainer.train(world, total_steps=40)
        assert "reset or stepped outside of training" in caplog.text
        left[loop] = content(trainer)
    assert_same(left["host"], left["device"])


def test_a_run_that_is_continued_compiles_nothing_anew():
    env = make_env(DRIFT, 2, seed=3)
    trainer = trainer_in(env, LikeTDMPC2, CONFIG.replace(loop="device"))
    trainer.train(env)
    compiled = loop_module._compiled_loop.cache_info().misses
    for more in (1, 5):
        trainer.train(env, total_steps=trainer.step + more)
    assert loop_module._compiled_loop.cache_info().misses == compiled


def test_a_progress_bar_costs_the_loop_no_calls(monkeypatch):
    downloads = []
    download = loop_module.Device.download
    monkeypatch.setattr(loop_module.Device, "download", lambda self: downloads.append(1) or download(self))
    counts = []
    for callbacks in ([], [ProgressCallback()]):
        downloads.clear()
        trained(LikeTDMPC2, "device", callbacks=callbacks, log_interval=20)
        counts.append(len(downloads))
    assert counts[0] == counts[1]


def test_a_finished_run_takes_no_further_step(tmp_path):
    save = lambda: [CheckpointCallback(str(tmp_path))]  # noqa: E731
    end = trained(LikeDreamer, "device", latents=True, callbacks=save()).replay.state_dict()["next_row"]
    env = make_env(DRIFT, 2, seed=3)
    again = trainer_in(env, LikeDreamer, CONFIG.replace(loop="device"), latents=True, callbacks=save())
    again.train(env, resume=True)
    assert again.replay.state_dict()["next_row"] == end
