"""``episodes.jsonl`` has each training episode once, whatever stops the run; rewards never seen are reported."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st
from online_worlds import ONLINE_CONFIG, toy
from tiny_envs import Walk
from toy_family import ALGORITHM, PrefillingToy, ToyWorldModel

from worldloom.envs import make_env
from worldloom.envs.time_step import scalars
from worldloom.training import Trainer
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.callbacks.episodes import EpisodeLog
from worldloom.training.rewards_seen import RewardsSeen


class Reporting(Walk):
    """:class:`Walk` whose ``info`` has numbers, and things that are none."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        info = {"success": terminated, "deep": {"steps": np.int64(self.steps)}, "name": "walk", "obs": obs}
        return obs, reward, terminated, truncated, {**info, "undefined": float("nan")}


def run(folder, *, total, resume=False, num_envs=2, kind=Reporting, config=ONLINE_CONFIG, log_interval=4, seed=3):
    """Train up to ``total`` updates; a checkpoint every 7. Returns the trainer."""
    env = make_env(kind, num_envs, seed=seed)
    callbacks = [EpisodeLog(folder), CheckpointCallback(str(folder / "checkpoints"), 7, keep_last=99, save_best=False)]
    trainer = Trainer(toy(env, PrefillingToy), config.replace(log_interval=log_interval), callbacks)
    trainer.train(env, total_steps=total, resume=resume)
    return trainer


def lines(folder, name="episodes.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_episode_has_a_line(tmp_path):
    trainer = run(tmp_path, total=60)
    found = lines(tmp_path)
    assert [line["episode"] for line in found] == list(range(trainer.run.collector.episodes))
    replayed = [episode for episode in trainer.replay.episodes() if episode["is_last"][-1]]
    assert len(found) >= len(replayed) > 10
    # The same returns as the rows in replay, environment by environment.
    for worker in (0, 1):
        mine = [line for line in found if line["worker"] == worker]
        assert [line["env_steps"] for line in mine] == sorted(line["env_steps"] for line in mine)
        for line in mine:
            assert line["info"] == {"success": float(line["terminated"]), "deep/steps": float(line["length"])}
    returns = sorted(float(np.sum(e["rewards"], dtype=np.float64)) for e in replayed)
    written = sorted(line["return"] for line in found)
    for value in returns:
        assert np.min(np.abs(np.array(written) - value)) < 1e-4
    prefill = [line["env_steps"] for line in found if line.get("prefill")]
    assert prefill
    assert max(prefill) <= ONLINE_CONFIG.prefill < min(x["env_steps"] for x in found if not x.get("prefill"))


@pytest.mark.parametrize("stop", [14, 17])
@pytest.mark.parametrize("log_interval", [4, 1_000])
def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path, stop, log_interval):
    run(tmp_path / "whole", total=40, log_interval=log_interval)
    run(tmp_path / "parts", total=stop, log_interval=log_interval)
    # Killed while writing a line, after a checkpoint that is older than what is in the file.
    with (tmp_path / "parts" / "episodes.jsonl").open("a") as file:
        file.write('{"episode": 99, "env_st')
    run(tmp_path / "parts", total=40, resume=tmp_path / "parts" / "checkpoints" / "7", log_interval=log_interval)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    # From the newest checkpoint, which is that of the end: nothing is left to do or to write.
    run(tmp_path / "parts", total=40, resume="auto", log_interval=log_interval)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_further_call_continues_the_file(tmp_path):
    run(tmp_path / "whole", total=40)
    env = make_env(Reporting, 2, seed=3)
    trainer = Trainer(toy(env, PrefillingToy), ONLINE_CONFIG, [EpisodeLog(tmp_path)])
    for total in (13, 40):
        trainer.train(env, total_steps=total)
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_lines_go_on_in_other_environments(tmp_path):
    env = make_env(Reporting, 2, seed=3)
    callbacks = [EpisodeLog(tmp_path), CheckpointCallback(str(tmp_path / "checkpoints"), 7, save_best=False)]
    trainer = Trainer(toy(env, PrefillingToy), ONLINE_CONFIG, callbacks)
    trainer.train(env, total_steps=20)
    before, taken = lines(tmp_path), trainer.run.env_steps
    for total, resume in ((35, False), (50, True)):
        trainer.train(make_env(Reporting, 2, seed=8), total_steps=total, replay=trainer.replay, resume=resume)
    found = lines(tmp_path)
    assert found[: len(before)] == before
    assert [line["episode"] for line in found] == list(range(trainer.run.collector.episodes))
    assert min(line["env_steps"] for line in found[len(before) :]) > taken


def test_a_new_run_renames_the_file_of_another(tmp_path):
    run(tmp_path / "a", total=10)
    before = lines(tmp_path / "a")
    for checkpoint in (tmp_path / "a" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    run(tmp_path / "a", total=10, seed=4)
    assert lines(tmp_path / "a", "episodes.1.jsonl") == before
    assert lines(tmp_path / "a") != before


def test_numbers_of_an_info_are_those_of_any_package_and_of_dicts_within():
    deep: dict = {"x": 1}
    for _ in range(2_000):
        deep = {"in": deep, "y": 2}
    endless: dict = {"x": 3}
    endless |= {"me": endless, "other": {"back": endless, "z": 4}}
    found = scalars(
        {
            "array": np.array(2.5),
            "jax": jnp.float32(2.0),
            "count": jnp.array(3),
            "flag": np.array(True),
            "one": np.array([3.0]),
            "masked": np.ma.masked,
            "text": np.array("a"),
            "nan": jnp.float32(jnp.nan),
            "huge": 10**400,
            "endless": endless,
        }
    )
    assert found == {
        **{"array": 2.5, "jax": 2.0, "count": 3.0, "flag": 1.0},
        **{"endless/x": 3.0, "endless/other/z": 4.0},
    }
    assert scalars({"deep": deep})["deep/y"] == 2.0
    assert len(scalars({"deep": deep})) < 10


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_numbers_of_a_gymnasium_vector_arrive_too(mode):
    with make_env(SyncVectorEnv([Reporting] * 3, autoreset_mode=mode)) as env:
        env.reset(seed=1)
        ends = [e for _ in range(30) for e in env.step(np.random.default_rng(0).integers(2, size=3)).events]
    assert len(ends) > 5
    for end in ends:
        assert end.info == {"success": float(end.terminated), "deep/steps": float(end.length)}


def test_numbers_of_a_worker_process_arrive_too():
    with make_env(Reporting, 1, parallel="subprocess") as env:
        env.reset(seed=1)
        ends = [event for _ in range(15) for event in env.step(np.array([1])).events]
    assert ends
    assert all(end.info["deep/steps"] == end.length for end in ends)


def seen(prefill, since=()):
    """The statistics of these rewards of the prefill, and of those since."""
    found = RewardsSeen()
    for reward in prefill:
        found.add_rewards(np.array([reward]), prefill=True)
    for reward in since:
        found.add_rewards(np.array([reward]), prefill=False)
    return found


def played(episodes, prefill=1_000):
    """The statistics of whole episodes, each given by its rewards; the first ``prefill`` steps are the prefill."""
    found, steps = RewardsSeen(), 0
    for rewards in episodes:
        for part in np.split(np.asarray(rewards, np.float32), [max(0, prefill - steps)]):
            found.add_rewards(part, prefill=steps < prefill)
            steps += len(part)
        found.add_return(float(np.sum(rewards)), len(rewards))
    return found


def simulated(name, policy, steps, prefill=1_000, seed=0):
    """Whole episodes of a Gymnasium environment: random actions in the prefill, then those of ``policy``."""
    rng, episodes, taken = np.random.default_rng(seed), [], 0
    with make_env(name, seed=seed) as env:
        now = env.reset()
        while taken < steps:
            rewards, over = [], False
            while not over:
                actions = env.sample_actions(rng) if policy is None or taken < prefill else policy(now.obs, rng)
                now = env.step(actions)
                rewards.append(float(now.reward[0]))
                taken, over = taken + 1, bool(now.is_last[0])
            episodes.append(rewards)
            now = env.step(env.sample_actions(rng))  # the next episode's first row
    return played(episodes, prefill)


def swing_up(obs, rng):
    """Swings a pendulum up, and holds it there."""
    angle, speed = np.arctan2(obs[0, 1], obs[0, 0]), obs[0, 2]
    energy = speed**2 / 6 + 5 * (np.cos(angle) - 1)
    torque = -10 * angle - 2 * speed if abs(angle) < 0.6 else -2 * np.sign(energy) * (np.sign(speed) or 1)
    return np.clip([[torque]], -2, 2).astype(np.float32)


COST, NEW, CONSTANT = (
    "MountainCarContinuous-v0",
    "No step since the prefill has paid more",
    "every episode has returned",
)
ZERO = "Every step so far has paid 0: there was nothing to learn from"
SPARSE = {
    "action costs, whatever is done": (lambda rng: simulated(COST, None, 12_000), NEW),
    "action costs, nothing is done": (lambda rng: simulated(COST, lambda o, r: np.zeros((1, 1)), 12_000), NEW),
    "action costs, hardly anything": (
        lambda rng: simulated(COST, lambda o, r: 0.1 * r.normal(size=(1, 1)), 12_000),
        NEW,
    ),
    # An agent that regulates and one that does nothing look alike.
    "errors that are controlled to 0": (
        lambda rng: played(
            [-(np.cumsum(rng.normal(0, 0.3, 100)) ** 2) for _ in range(10)]
            + [-1e-3 * rng.uniform(size=100) ** 2 for _ in range(40)]
        ),
        "If the task has no better one (no error, nothing hit), it is solved; if it pays more at a goal",
    ),
    "action costs, always the largest": (lambda rng: simulated(COST, lambda o, r: np.ones((1, 1)), 12_000), NEW),
    "a goal of the prefill that was never met again": (
        lambda rng: played([[0.0] * 99 + [0.01 * (i < 10 and i % 3 == 0)] for i in range(100)]),
        NEW,
    ),
    "a clump of rewards in one episode of the prefill": (
        lambda rng: played([[0.0] * 90 + [1.0 * (i == 3)] * 10 for i in range(100)]),
        NEW,
    ),
    "a game without a point won": (lambda rng: played([([0.0] * 50 + [-1.0]) * 21] * 12), NEW),
    "penalties that a still agent avoids": (
        lambda rng: played([[0.0] * 99 + [-1.0]] * 10 + [[0.0] * 99 + [-1.0 * (i == 4)] for i in range(90)]),
        NEW,
    ),
    "penalties after a prefill without any": (lambda rng: played([[0.0] * 100] * 10 + [[0.0] * 99 + [-1.0]] * 90), NEW),
    "steps that cost the same": (lambda rng: simulated("MountainCar-v0", None, 4_000), CONSTANT),
    "steps that cost the same, but for one short episode": (
        lambda rng: played([[-1.0] * 100] * 100 + [[-1.0] * 40]),
        "every episode has returned -100, with few exceptions (from -100 to -40)",
    ),
    "zeros": (lambda rng: played([[0.0] * 100] * 30), ZERO),
    "zeros, and episodes of any length": (lambda rng: played([[0.0] * (50 + i) for i in range(60)]), ZERO),
    "zeros, and no episode is over": (lambda rng: seen([0.0] * 9, [0.0] * 90), ZERO),
}
"""Worlds in which nothing was met that the prefill had not, and what is said."""
DENSE = {
    "a pendulum that swings at random": lambda rng: simulated("Pendulum-v1", None, 12_000),
    "a pendulum that hangs": lambda rng: simulated("Pendulum-v1", lambda o, r: np.zeros((1, 1)), 12_000),
    "a pendulum that is held up": lambda rng: simulated("Pendulum-v1", swing_up, 12_000),
    "a pole that falls": lambda rng: simulated("CartPole-v1", None, 4_000),
    "episodes get longer": lambda rng: played([[1.0] * (10 + 5 * i) for i in range(100)]),
    "episodes get longer up to a limit": lambda rng: played([[1.0] * min(500, 20 + i * i) for i in range(60)]),
    "episodes get longer, and actions cost": lambda rng: played(
        [1 - 0.1 * rng.uniform(size=min(500, 20 + i * i)) for i in range(60)]
    ),
    "episodes get shorter": lambda rng: played([[-1.0] * (200 - 3 * min(i, 40)) for i in range(60)]),
    "returns improve": lambda rng: played([rng.normal(-0.3 + 0.05 * i, 0.5, 200) for i in range(60)]),
    "returns improve, but no step pays more": lambda rng: played(
        [np.minimum(rng.normal(-6 + 0.1 * min(i, 50), 4, 200), 0.0) for i in range(60)]
    ),
    "a goal is met": lambda rng: played([[-0.1] * 99 + [100.0 * (i > 30)] for i in range(60)]),
    "a goal is met as often as in the prefill": lambda rng: played(
        [[0.0] * 99 + [1.0 * (i % 3 == 0)] for i in range(60)]
    ),
    "an end that costs, and is avoided": lambda rng: played(
        [[0.0] * int(rng.integers(5, 30)) + [-10.0] for _ in range(60)] + [[0.0] * 100] * 30
    ),
    "the best reward is kept": lambda rng: played([rng.uniform(0.3, 1, 100)] * 10 + [np.full(100, 1.0)] * 30),
    "a path of costs that gets shorter": lambda rng: played([[-1.0] * 300 + [-9.0] * 100] * 10 + [[-1.0] * 13] * 400),
    # Too little to say anything.
    "fewer than ten episodes": lambda rng: played([-0.1 * rng.uniform(size=900) ** 2 for _ in range(9)]),
    "fewer than ten episodes of equal costs": lambda rng: played([[-1.0] * 500] * 9),
    "no episode is over": lambda rng: seen([-1.0] * 9, [-1.0] * 90),
    "the prefill is not over": lambda rng: seen([0.0, 1.0]),
    "nothing yet": lambda rng: seen([]),
}
"""Worlds in which there is something to learn, or nothing to say."""


@pytest.mark.parametrize("world", [*SPARSE, *DENSE])
def test_a_reward_that_was_never_met_is_said(world):
    make, said = SPARSE[world] if world in SPARSE else (DENSE[world], None)
    found = make(np.random.default_rng(0))
    text = found.nothing_new()
    assert (said in text and "prefill_policy='correlated'" in text) if said else text is None
    assert RewardsSeen(**json.loads(json.dumps(found.to_dict()))) == found


def test_a_word_is_never_said_of_a_pendulum_on_its_way():
    rng = np.random.default_rng(0)

    def learning(number):
        return np.minimum(rng.normal(-6 + 0.1 * min(number, 50), 4) + rng.normal(0, 0.5, 200), 0.0)

    episodes = [learning(number) for number in range(80)]
    assert not any(played(episodes[:end]).nothing_new() for end in range(10, 80))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50), st.sets(st.integers(1, 49)))
def test_the_statistics_do_not_depend_on_how_rewards_are_divided_into_calls(rewards, cuts):
    found = RewardsSeen()
    for part in np.split(np.array(rewards, np.float32), sorted(cuts)):
        found.add_rewards(part, prefill=True)
    assert found == seen(rewards)


def test_statistics_saved_by_an_earlier_version_are_continued():
    rewards = [3.0, -1.0, 4.0, 1.5, -9.0, 2.0]
    saved = {"steps": 4, "mean": np.mean(rewards[:4]), "spread": 4 * np.var(rewards[:4]), "low": -1.0, "high": 4.0}
    found = RewardsSeen(**saved, since=None, worst=None, best=None)
    found.add_rewards(np.array(rewards[4:]), prefill=True)
    assert (found.steps, found.low, found.high) == (6, -9.0, 4.0)
    assert found.mean == pytest.approx(np.mean(rewards))
    assert found.spread == pytest.approx(6 * np.var(rewards))
    # It did not keep the lengths of episodes: those to come are the first that are known.
    assert RewardsSeen(**saved, since=2.0, worst=-5.0, best=-5.0, recent=[-5.0] * 10).nothing_new() is None
    assert RewardsSeen(**saved, since=2.0).least == 2.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50))
def test_the_statistics_of_the_prefill_are_those_of_its_rewards(rewards):
    found = seen(rewards)
    assert (found.steps, found.low, found.high) == (len(rewards), min(rewards), max(rewards))
    np.testing.assert_allclose(found.mean, np.mean(rewards), atol=1e-6)
    np.testing.assert_allclose(found.spread / found.steps, np.var(rewards), rtol=1e-6, atol=1e-6)


class Inert(Walk):
    """A walk that costs as much as it moves: nothing pays more than the cheapest step of the prefill."""

    def step(self, action):
        obs, *_, info = super().step(action)
        return obs, -float(self.steps), False, self.steps >= 5, info


@pytest.mark.parametrize(("offline_updates", "said"), [(0, 1), (5, 0)])
def test_the_log_says_so_once_but_not_after_recorded_data(tmp_path, caplog, offline_updates, said):
    config = ONLINE_CONFIG.replace(prefill=20, offline_updates=offline_updates)
    with caplog.at_level(logging.WARNING, "worldloom"):
        trainer = run(tmp_path, total=240, kind=Inert, num_envs=1, config=config)
    assert caplog.text.count("No step since the prefill has paid more") == said
    found = trainer.run.collector.seen
    assert (found.low, found.high, found.since, found.least) == (-5.0, -1.0, -1.0, -5.0)
    assert (found.worst, found.best, found.lengths) == (-15.0, -15.0, [5] * 10)


class Failing(Walk):
    """A walk in which every step costs 1, and the fourth breaks the simulator."""

    def step(self, action):
        obs, *_, info = super().step(action)
        return (obs * np.nan if self.steps == 4 else obs), -1.0, False, False, info


def test_where_an_episode_was_cut_nothing_was_paid():
    with make_env(Failing, 2, seed=3, on_bad_step="restart") as env:
        trainer = Trainer(toy(env, PrefillingToy), ONLINE_CONFIG.replace(prefill=20), [])
        trainer.train(env, total_steps=20)
    collector = trainer.run.collector
    assert collector.bad_steps >= 10
    assert (collector.seen.low, collector.seen.high, collector.seen.since) == (-1.0, -1.0, -1.0)


def test_what_was_seen_survives_a_resume(tmp_path):
    whole = run(tmp_path / "whole", total=30)
    run(tmp_path / "parts", total=14)
    parts = run(tmp_path / "parts", total=30, resume=True)
    assert parts.run.collector.seen == whole.run.collector.seen
    assert None not in parts.run.collector.seen.to_dict().values()


# ---- actions of the prefill ---------------------------------------------------------------------------------------


def prefill_actions(policy, *, model=PrefillingToy, num_envs=2, steps=400):
    """Rows [N, ...] of the prefill of a run, by environment."""
    env = make_env(Walk, num_envs, seed=3)
    config = ONLINE_CONFIG.replace(prefill=steps, prefill_policy=policy)
    trainer = Trainer(toy(env, model), config, [])
    trainer.train(env, total_steps=1)
    rows = trainer.replay.take(np.arange(num_envs * (steps // num_envs - 2)))
    return [{name: rows[name][i::num_envs] for name in ("actions", "is_first", "is_last")} for i in range(num_envs)]


def test_correlated_actions_are_kept_for_ten_steps_on_average():
    same = []
    for rows in prefill_actions("correlated"):
        within = ~rows["is_first"][1:] & ~rows["is_last"][1:]
        kept = (rows["actions"][1:] == rows["actions"][:-1]).all(-1)
        same.append(kept[within])
    # Two classes: a new draw is the old action half of the time.
    assert abs(np.mean(np.concatenate(same)) - 0.95) < 0.05
    uniform = []
    for rows in prefill_actions("random"):
        within = ~rows["is_first"][1:] & ~rows["is_last"][1:]
        uniform.append((rows["actions"][1:] == rows["actions"][:-1]).all(-1)[within])
    assert abs(np.mean(np.concatenate(uniform)) - 0.5) < 0.15


def test_another_policy_of_the_prefill_acts_from_the_next_call_on():
    env = make_env(Walk, 2, seed=3)
    trainer = Trainer(toy(env, PrefillingToy), ONLINE_CONFIG.replace(prefill_policy="random"), [])
    trainer.train(env, total_steps=4)
    begin = len(trainer.replay)
    trainer.config = trainer.config.replace(prefill=600, prefill_policy="correlated")
    trainer.train(env, total_steps=5)
    rows = trainer.replay.take(np.arange(begin, len(trainer.replay) - 2))
    same = (rows["actions"][2:] == rows["actions"][:-2]).all(-1)[~rows["is_first"][2:] & ~rows["is_last"][2:]]
    assert len(same) > 300
    assert same.mean() > 0.9  # two classes: 0.95 is expected, and 0.5 of "random"


def test_auto_is_the_choice_of_the_family():
    for model, policy in ((PrefillingToy, "random"), (ToyWorldModel, "initial")):
        for one, other in zip(prefill_actions("auto", model=model), prefill_actions(policy, model=model), strict=True):
            np.testing.assert_array_equal(one["actions"], other["actions"])
    assert ALGORITHM.random_prefill is False
    assert dataclasses.replace(ALGORITHM, random_prefill=True).random_prefill


def test_correlated_actions_are_the_same_after_a_resume(tmp_path):
    config = ONLINE_CONFIG.replace(prefill=50, prefill_policy="correlated", prefill_updates=3)
    whole = run(tmp_path / "whole", total=20, config=config)
    run(tmp_path / "parts", total=9, config=config)
    parts = run(tmp_path / "parts", total=20, config=config, resume=tmp_path / "parts" / "checkpoints" / "7")
    ids = np.arange(len(whole.replay))
    np.testing.assert_array_equal(whole.replay.take(ids)["actions"], parts.replay.take(ids)["actions"])
