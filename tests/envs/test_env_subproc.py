"""Environments in processes of their own: same rows, and what happens when processes die, raise or hang."""

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


def processes(env):
    return [worker.pid for worker in env._backend._workers]


def gone(pid):
    """Whether no process, not even a zombie, has this id any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("kind", [Walk, WalkPicture])
def test_rows_are_those_of_this_process(kind):
    with make_env(kind, 2, parallel="subprocess", seed=3) as env:
        assert_same(rollout(env, 60), rollout(make_env(kind, 2, seed=3), 60))


def test_state_travels_between_this_process_and_workers():
    env = make_env(Walk, 2, seed=3)
    rows = rollout(env, 25)
    with make_env(Walk, 2, parallel="subprocess") as resumed:
        assert_same([resumed.restore(env.state())], [rows[-1]._replace(events=())])
        assert_same(rollout(resumed, 20), rollout(env, 20))


def test_functions_of_the_moment_and_pictures():
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
def test_a_crash_closes_the_episode_and_the_next_one_begins(fault, reason, tmp_path):
    file = tmp_path / "fault"
    env = make_env(Faulty, 2, parallel="subprocess", seed=1, worker_timeout=3, fault=str(file))
    with env:
        row = env.reset()
        while row.is_last.any() or not row.is_first.any():  # until both are under way
            row = env.step([0, 1])
        before = processes(env)
        file.write_text(fault)  # whoever looks first removes it
        crash = env.step([0, 1])
        (victim,) = np.flatnonzero([pid != old for pid, old in zip(processes(env), before, strict=True)])
        assert gone(before[victim])
        restart = next(event for event in crash.events if isinstance(event, WorkerRestart))
        end = next(event for event in crash.events if isinstance(event, EpisodeEnd) and event.env == victim)
        assert (restart.env, restart.restarts) == (victim, 1)
        assert reason in restart.reason
        assert end.crashed
        assert not end.terminated
        np.testing.assert_array_equal(crash.obs[victim], row.obs[victim])
        assert crash.reward[victim] == 0
        assert crash.is_last[victim]
        assert not crash.is_terminal[victim]
        following = env.step([0, 1])
        assert following.is_first[victim]
        assert not any(isinstance(event, WorkerRestart) for event in following.events)


@pytest.mark.parametrize("fault", ["kill-reset", "raise-reset"])
def test_a_crash_while_resetting_is_tried_again(fault, tmp_path):
    file = tmp_path / "fault"
    with make_env(Faulty, 2, parallel="subprocess", fault=str(file)) as env:
        file.write_text(fault)
        row = env.reset()
        assert row.is_first.all()
        assert not row.is_last.any()
        assert [type(event) for event in row.events] == [WorkerRestart]
        rollout(env, 20)


@pytest.mark.parametrize("fault", ["always-raise"])
def test_an_environment_that_never_works_is_given_up(fault, tmp_path):
    file = tmp_path / "fault"
    file.write_text(fault)
    with (
        make_env(Faulty, parallel="subprocess", fault=str(file)) as env,
        pytest.raises(EnvError, match=r"crashed 4 times without completing a step(.|\n)*broken for good"),
    ):
        rollout(env, 20)


def slow_build(seconds, fault):
    """Slower to build than a step may take."""
    time.sleep(seconds)
    return Faulty(fault)


def test_building_has_a_timeout_of_its_own(tmp_path):
    file = tmp_path / "fault"
    with make_env(slow_build, parallel="subprocess", worker_timeout=0.5, seconds=0.7, fault=str(file)) as env:
        env.reset()
        file.write_text("kill")
        rows = [env.step([0]), env.step([0]), env.step([0])]
    assert [type(event) for row in rows for event in row.events if isinstance(event, WorkerRestart)] == [WorkerRestart]
    assert rows[1].is_first[0]


class Disconnected(Walk):
    """Loses its own connection, which is not the one to the parent."""

    def step(self, action):
        raise EOFError("the game server hung up")


def test_errors_of_pipes_are_errors_of_the_environment():
    with make_env(Disconnected, parallel="subprocess") as env:
        env.reset()
        assert "raised EOFError: the game server hung up" in env.step([0]).events[0].reason


def test_a_picture_that_kills_its_worker_costs_the_episode():
    with make_env(WalkPicture, 2, parallel="subprocess", seed=1) as env:
        row = rollout(env, 0)[0]
        os.kill(processes(env)[0], signal.SIGKILL)
        with pytest.raises(EnvError, match=r"could not be rendered: its worker was killed by SIGKILL"):
            env.render()
        action = env.sample_actions(np.random.default_rng(0))
        cut = env.step(action)
        assert cut.is_last[0]
        assert [type(event) for event in cut.events] == [WorkerRestart, EpisodeEnd]
        assert cut.events[0].restarts == 1
        np.testing.assert_array_equal(cut.obs["camera"][0], row.obs["camera"][0])
        assert env.step(action).is_first[0]


def test_a_picture_that_raises_costs_nothing():
    with make_env(Walk, parallel="subprocess") as env:
        env.reset()
        with pytest.raises(ConfigError, match="renders no frames"):
            env.render()
        assert not env.step([0]).is_first[0]


def test_a_replay_that_crashes_starts_the_next_episodes(tmp_path):
    file = tmp_path / "fault"
    with make_env(Faulty, 2, parallel="subprocess", seed=2, fault=str(file)) as env:
        rollout(env, 8)
        state = env.state()
        file.write_text("kill-reset")
        with pytest.warns(RuntimeWarning, match="cannot be replayed"):
            rows = env.restore(state)
        assert rows.is_first.all()
        rollout(env, 8)


def test_what_building_raises_reaches_the_caller():
    with pytest.raises(FileNotFoundError, match="no such level: 7"):
        make_env(broken_build, 2, parallel="subprocess")


def test_wrong_actions_leave_the_workers_alone():
    with make_env(Walk, 2, parallel="subprocess") as env:
        env.reset()
        with pytest.raises(DataError):
            env.step([0, 7])
        assert not env.step([0, 1]).events


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """Closing, forgetting and failing to close in time: no process, no zombie, no open file."""
    files = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else None
    env = make_env(Walk, 2, parallel="subprocess")
    pids = processes(env)
    env.close()
    env.close()
    assert all(gone(pid) for pid in pids)

    env = make_env(Walk, 2, parallel="subprocess")
    pids = processes(env)
    del env
    gc.collect()
    assert all(gone(pid) for pid in pids)

    monkeypatch.setattr(subproc, "CLOSE_TIMEOUT", 0.2)
    env = make_env(Walk, 2, parallel="subprocess")
    pids = processes(env)
    os.kill(pids[0], signal.SIGSTOP)
    env.close()
    assert all(gone(pid) for pid in pids)
    if files is not None:
        assert len(os.listdir("/proc/self/fd")) == files


def test_not_everywhere(monkeypatch):
    monkeypatch.setattr(subproc.os, "name", "nt")
    with pytest.raises(ConfigError, match="POSIX"):
        make_env(Walk, parallel="subprocess")


def test_a_thousand_steps_with_eight_workers_while_some_are_killed():
    """Environments that no one kills give the very rows of an undisturbed run; the victims' episodes stay whole."""
    num_envs, steps, victims = 8, 1000, (2, 5)
    undisturbed = rollout(make_env(Walk, num_envs, seed=4), steps)
    rng, actions = np.random.default_rng(1), np.random.default_rng(0)
    doomed = set(rng.choice(np.arange(10, steps - 10, 10), 12, replace=False))
    with make_env(Walk, num_envs, parallel="subprocess", seed=4) as env:
        start, pids = time.perf_counter(), set(processes(env))
        rows = [env.reset()]
        for step in range(steps):
            action = env.sample_actions(actions)
            if step not in doomed:
                rows.append(env.step(action))
                continue
            # Before, during or after the work of this step: a step takes a few milliseconds.
            pid = processes(env)[rng.choice(victims)]
            timer = threading.Timer(rng.uniform(0, 0.004), os.kill, (pid, signal.SIGKILL))
            timer.start()
            rows.append(env.step(action))
            timer.join()
            pids |= set(processes(env))
        seconds = time.perf_counter() - start
        pids |= set(processes(env))
    assert all(gone(pid) for pid in pids)

    restarts = [event for row in rows for event in row.events if isinstance(event, WorkerRestart)]
    assert len(restarts) == len(doomed)
    assert sorted(event.restarts for event in restarts if event.env == victims[0]) == list(
        range(1, 1 + sum(event.env == victims[0] for event in restarts))
    )
    assert {event.env for event in restarts} == set(victims)
    spared = [env for env in range(num_envs) if env not in victims]
    for row, other in zip(rows, undisturbed, strict=True):
        for name in ("obs", "reward", "is_first", "is_last", "is_terminal"):
            np.testing.assert_array_equal(getattr(row, name)[spared], getattr(other, name)[spared])
    for before, row in itertools.pairwise(rows):
        np.testing.assert_array_equal(row.is_first, before.is_last)
        ended = sorted(event.env for event in row.events if isinstance(event, EpisodeEnd))
        np.testing.assert_array_equal(ended, np.flatnonzero(row.is_last))
    # Sanity of throughput only; starting workers again is part of it.
    assert steps * num_envs / seconds > 100
