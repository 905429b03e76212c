"""Environments in subprocesses: the same time steps, and what happens when processes die, raise or hang."""

import gc
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rollouts import assert_same, rollout
from tiny_envs import Corridor, Faulty, Walk, WalkPicture, broken_build, jax_modules_env

from worldloom.envs import EpisodeEnd, WorkerRestart, make_env
from worldloom.envs.backends import subproc
from worldloom.errors import ConfigError, DataError, EnvError


def worker_pids(env):
    return [worker.pid for worker in env._backend._workers]


def is_gone(pid):
    """Whether no process, not even a zombie, has this id any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("kind", [Walk, WalkPicture])
def test_time_steps_equal_those_of_the_sync_backend(kind):
    with make_env(kind, 2, parallel="subprocess", seed=3) as env:
        assert_same(rollout(env, 60), rollout(make_env(kind, 2, seed=3), 60))


def test_a_state_of_the_sync_backend_is_restored_in_workers():
    env = make_env(Walk, 2, seed=3)
    time_steps = rollout(env, 25)
    with make_env(Walk, 2, parallel="subprocess") as resumed:
        assert_same([resumed.restore(env.state())], [time_steps[-1]._replace(events=())])
        assert_same(rollout(resumed, 20), rollout(env, 20))


def test_lambdas_are_sent_to_workers_and_frames_come_back():
    length = 3
    with make_env(lambda render_mode: WalkPicture(render_mode), parallel="subprocess", render_mode="rgb_array") as env:
        env.reset()
        assert env.render().shape == (16, 16, 3)
    with make_env(lambda: Corridor(length), parallel="subprocess") as env:
        env.reset()
        assert [bool(env.step([1]).is_last[0]) for _ in range(length)] == [False, False, True]


def test_workers_do_not_import_jax():
    with make_env(jax_modules_env, parallel="subprocess") as env:
        assert env.reset().obs[0, 0] == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("kill", "was killed by SIGKILL"),
        ("exit", "exited with code 7"),
        ("raise", "raised ValueError: the simulator exploded"),
        ("hang", "gave no answer within 3 s"),
    ],
)
def test_a_crash_truncates_the_episode_and_the_next_one_starts(fault, reason, tmp_path):
    file = tmp_path / "fault"
    env = make_env(Faulty, 2, parallel="subprocess", seed=1, worker_timeout=3, fault=str(file))
    with env:
        time_step = env.reset()
        while time_step.is_last.any() or not time_step.is_first.any():  # until both have an episode in progress
            time_step = env.step([0, 1])
        before = worker_pids(env)
        file.write_text(fault)  # the first worker that finds it removes it
        crash = env.step([0, 1])
        (victim,) = np.flatnonzero([pid != old for pid, old in zip(worker_pids(env), before, strict=True)])
        assert is_gone(before[victim])
        restart = next(event for event in crash.events if isinstance(event, WorkerRestart))
        end = next(event for event in crash.events if isinstance(event, EpisodeEnd) and event.env == victim)
        assert (restart.env, restart.restarts) == (victim, 1)
        assert reason in restart.reason
        assert end.crashed
        assert not end.terminated
        np.testing.assert_array_equal(crash.obs[victim], time_step.obs[victim])
        assert crash.reward[victim] == 0
        assert crash.is_last[victim]
        assert not crash.is_terminal[victim]
        following = env.step([0, 1])
        assert following.is_first[victim]
        assert not any(isinstance(event, WorkerRestart) for event in following.events)


@pytest.mark.parametrize("fault", ["kill-reset", "raise-reset"])
def test_a_reset_that_crashes_is_retried(fault, tmp_path):
    file = tmp_path / "fault"
    with make_env(Faulty, 2, parallel="subprocess", fault=str(file)) as env:
        file.write_text(fault)
        time_step = env.reset()
        assert time_step.is_first.all()
        assert not time_step.is_last.any()
        assert [type(event) for event in time_step.events] == [WorkerRestart]
        rollout(env, 20)


@pytest.mark.parametrize("fault", ["always-raise"])
def test_an_environment_that_always_crashes_raises(fault, tmp_path):
    file = tmp_path / "fault"
    file.write_text(fault)
    with (
        make_env(Faulty, parallel="subprocess", fault=str(file)) as env,
        pytest.raises(EnvError, match=r"crashed 4 times without completing a step(.|\n)*broken for good"),
    ):
        rollout(env, 20)


def slow_build(seconds, fault):
    """Takes longer to build than a step may take."""
    time.sleep(seconds)
    return Faulty(fault)


def test_building_has_its_own_timeout(tmp_path):
    file = tmp_path / "fault"
    with make_env(slow_build, parallel="subprocess", worker_timeout=0.5, seconds=0.7, fault=str(file)) as env:
        env.reset()
        file.write_text("kill")
        time_steps = [env.step([0]), env.step([0]), env.step([0])]
    assert [
        type(event) for time_step in time_steps for event in time_step.events if isinstance(event, WorkerRestart)
    ] == [WorkerRestart]
    assert time_steps[1].is_first[0]


class Disconnected(Walk):
    """Raises the exception of a closed pipe, though the pipe to the parent is open."""

    def step(self, action):
        raise EOFError("the game server hung up")


def test_an_environments_eof_error_is_not_taken_for_a_closed_pipe():
    with make_env(Disconnected, parallel="subprocess") as env:
        env.reset()
        assert "raised EOFError: the game server hung up" in env.step([0]).events[0].reason


def test_a_crash_while_rendering_truncates_the_episode():
    with make_env(WalkPicture, 2, parallel="subprocess", seed=1) as env:
        time_step = rollout(env, 0)[0]
        os.kill(worker_pids(env)[0], signal.SIGKILL)
        with pytest.raises(EnvError, match=r"could not be rendered: its worker was killed by SIGKILL"):
            env.render()
        action = env.sample_actions(np.random.default_rng(0))
        cut = env.step(action)
        assert cut.is_last[0]
        assert [type(event) for event in cut.events] == [WorkerRestart, EpisodeEnd]
        assert cut.events[0].restarts == 1
        np.testing.assert_array_equal(cut.obs["camera"][0], time_step.obs["camera"][0])
        assert env.step(action).is_first[0]


def test_an_error_while_rendering_leaves_the_episode_in_progress():
    with make_env(Walk, parallel="subprocess") as env:
        env.reset()
        with pytest.raises(ConfigError, match="renders no frames"):
            env.render()
        assert not env.step([0]).is_first[0]


def test_a_crash_while_restoring_starts_the_next_episodes(tmp_path):
    file = tmp_path / "fault"
    with make_env(Faulty, 2, parallel="subprocess", seed=2, fault=str(file)) as env:
        rollout(env, 8)
        state = env.state()
        file.write_text("kill-reset")
        with pytest.warns(RuntimeWarning, match="cannot be replayed"):
            time_steps = env.restore(state)
        assert time_steps.is_first.all()
        rollout(env, 8)


def test_an_error_while_building_is_raised_to_the_caller():
    with pytest.raises(FileNotFoundError, match="no such level: 7"):
        make_env(broken_build, 2, parallel="subprocess")


def test_invalid_actions_are_not_sent_to_workers():
    with make_env(Walk, 2, parallel="subprocess") as env:
        env.reset()
        with pytest.raises(DataError):
            env.step([0, 7])
        assert not env.step([0, 1]).events


def test_no_process_and_no_file_descriptor_is_leaked(tmp_path, monkeypatch):
    """After closing, garbage collection and a worker that does not exit in time; zombies count too."""
    files = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else None
    env = make_env(Walk, 2, parallel="subprocess")
    pids = worker_pids(env)
    env.close()
    env.close()
    assert all(is_gone(pid) for pid in pids)

    env = make_env(Walk, 2, parallel="subprocess")
    pids = worker_pids(env)
    del env
    gc.collect()
    assert all(is_gone(pid) for pid in pids)

    monkeypatch.setattr(subproc, "CLOSE_TIMEOUT", 0.2)
    env = make_env(Walk, 2, parallel="subprocess")
    pids = worker_pids(env)
    os.kill(pids[0], signal.SIGSTOP)
    env.close()
    assert all(is_gone(pid) for pid in pids)
    if files is not None:
        assert len(os.listdir("/proc/self/fd")) == files


def test_systems_other_than_posix_are_refused(monkeypatch):
    monkeypatch.setattr(subproc.os, "name", "nt")
    with pytest.raises(ConfigError, match="POSIX"):
        make_env(Walk, parallel="subprocess")


def test_a_thousand_steps_with_eight_workers_while_some_are_killed():
    """Environments that are not killed equal those of an undisturbed run; episodes of the others stay consistent."""
    num_envs, steps, victims = 8, 1000, (2, 5)
    undisturbed = rollout(make_env(Walk, num_envs, seed=4), steps)
    rng, actions = np.random.default_rng(1), np.random.default_rng(0)
    kill_steps = set(rng.choice(np.arange(10, steps - 10, 10), 12, replace=False))
    with make_env(Walk, num_envs, parallel="subprocess", seed=4) as env:
        start, pids = time.perf_counter(), set(worker_pids(env))
        time_steps = [env.reset()]
        for step in range(steps):
            action = env.sample_actions(actions)
            if step not in kill_steps:
                time_steps.append(env.step(action))
                continue
            # The kill comes before, during or after this step, which takes a few milliseconds.
            pid = worker_pids(env)[rng.choice(victims)]
            timer = threading.Timer(rng.uniform(0, 0.004), os.kill, (pid, signal.SIGKILL))
            timer.start()
            time_steps.append(env.step(action))
            timer.join()
            pids |= set(worker_pids(env))
        seconds = time.perf_counter() - start
        pids |= set(worker_pids(env))
    assert all(is_gone(pid) for pid in pids)

    restarts = [event for time_step in time_steps for event in time_step.events if isinstance(event, WorkerRestart)]
    assert len(restarts) == len(kill_steps)
    assert sorted(event.restarts for event in restarts if event.env == victims[0]) == list(
        range(1, 1 + sum(event.env == victims[0] for event in restarts))
    )
    assert {event.env for event in restarts} == set(victims)
    survivors = [env for env in range(num_envs) if env not in victims]
    for time_step, other in zip(time_steps, undisturbed, strict=True):
        for name in ("obs", "reward", "is_first", "is_last", "is_terminal"):
            np.testing.assert_array_equal(getattr(time_step, name)[survivors], getattr(other, name)[survivors])
    for before, time_step in itertools.pairwise(time_steps):
        np.testing.assert_array_equal(time_step.is_first, before.is_last)
        ended = sorted(event.env for event in time_step.events if isinstance(event, EpisodeEnd))
        np.testing.assert_array_equal(ended, np.flatnonzero(time_step.is_last))
    # A coarse check of throughput, which includes restarting workers.
    assert steps * num_envs / seconds > 100
