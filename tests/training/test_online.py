"""Training in environments: what replay holds is what happened, updates come when they are due, nothing is lost."""

import json
import os
import signal
from fractions import Fraction

import gymnasium as gym
import jax
import numpy as np
import pytest
from online_worlds import (
    Glide,
    Moody,
    Once,
    assert_equal,
    assert_happened,
    every_row,
    flat,
    leaves,
    stream,
)
from tiny_envs import Corridor, Walk, WalkPicture
from toy_family import PrefillingToy, ToyConfig, ToyWorldModel, fill

from worldloom.envs import episode_seed, make_env
from worldloom.errors import ConfigError, DataError, EnvError
from worldloom.models.dreamer import DreamerV3Config, DreamerV3WorldModel
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training.callbacks import Callback, CheckpointCallback, EvalCallback, LoggingCallback
from worldloom.training.checkpoint_files import flatten_state
from worldloom.training.evaluation import play
from worldloom.training.run_info import on_host


def shapes(env):
    """What a model for ``env`` needs to know."""
    return {"obs_shape": env.obs_shape, "action_dim": env.action_dim, "action_type": env.action_type}


def toy(env, kind=ToyWorldModel, **fields):
    """A toy model for ``env``."""
    return kind(ToyConfig(**shapes(env), **fields))


@pytest.fixture
def config():
    """Updates begin after 20 decision steps; one for each then."""
    return TrainingConfig(batch_size=4, sequence_length=3, learning_rate=1e-2, log_interval=4, device="cpu", prefill=20)


# ---- what is in replay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("kind", [Walk, Glide, WalkPicture])
@pytest.mark.parametrize("family", [ToyWorldModel, PrefillingToy])
def test_replay_holds_what_happened(config, kind, num_envs, family):
    env = make_env(kind, num_envs, seed=3)
    trainer = Trainer(toy(env, family), config, [])
    trainer.train(env, total_steps=100)
    rows = every_row(trainer.replay)
    assert len(rows["rewards"]) % num_envs == 0
    assert trainer.replay.action_dim == env.action_dim
    assert (~rows["is_last"]).sum() >= 120 - num_envs
    ended = [assert_happened(kind, stream(rows, i, num_envs), 3, i) for i in range(num_envs)]
    assert min(map(len, ended)) >= 5
    assert rows["is_terminal"].any()
    assert (rows["is_last"] & ~rows["is_terminal"]).any()


def test_random_prefill_is_uniform_and_other_than_the_policy(config):
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, PrefillingToy), config.replace(prefill=400), [])
    trainer.train(env, total_steps=400)
    rows = every_row(trainer.replay)
    taken = rows["actions"][~rows["is_last"], 0]
    first, later = taken[:400], taken[404:]
    # Uniform in [−1, 1]: Kolmogorov's distance of 400 draws is below 0.08 in 99 of 100 cases; the policy's is not.
    distance = lambda x: np.abs(np.sort(x) - np.linspace(-1, 1, len(x))).max() / 2  # noqa: E731
    assert distance(first) < 0.08 < distance(later)
    assert len(np.unique(first)) == 400


@pytest.mark.parametrize("num_envs", [1, 3])
def test_stored_latents_are_those_of_the_policy_that_acted(config, num_envs):
    """Weights that never change, before any latent is written back."""
    env = make_env(Glide, num_envs, seed=3)
    model = toy(env, latents=True)
    trainer = Trainer(model, config.replace(prefill=60, env_steps=62), [])
    state = jax.device_get(trainer.state.params)
    trainer.train(env)
    rows = every_row(trainer.replay)
    assert_policy_of(model, state, config.seed, rows, num_envs)


def assert_policy_of(model, params, seed, rows, num_envs):
    """Run the policy over stored rows: it gives the stored actions, and latents."""
    algorithm = model.algorithm
    act = jax.jit(
        lambda params, *args, **options: algorithm.policy(model.rebuild(model.config, params), *args, **options)
    )
    root = jax.random.fold_in(jax.random.key(seed), 0xFFFFFFFF)
    carry = algorithm.initial_carry(model.config, num_envs)
    for call in range(len(rows["rewards"]) // num_envs):
        now = slice(call * num_envs, (call + 1) * num_envs)
        obs = jax.tree.map(lambda x: x[now], rows["obs"])  # noqa: B023
        key = jax.random.fold_in(root, call + 1)
        carry, actions = act(params, carry, obs, key, is_first=rows["is_first"][now])
        taken = ~rows["is_last"][now]
        for name, stored in leaves(rows["actions"]).items():
            chosen = np.asarray(leaves(actions)[name])
            if chosen.ndim == 1:
                chosen = np.eye(stored.shape[-1], dtype=np.float32)[chosen]
            # Rounding differs a little between this program and the trainer's.
            np.testing.assert_allclose(stored[now][taken], np.clip(chosen[taken], -1, 1), atol=1e-5)
        for name, value in algorithm.stored_latents(carry).items():
            np.testing.assert_allclose(rows["latents"][name][now], value, atol=1e-5)


# ---- when updates are due ----------------------------------------------------------------------------------------


def decisions_after_calls(rows, num_envs):
    """Decision steps taken after each step of the environments, by what replay holds."""
    acted = ~rows["is_last"].reshape(-1, num_envs)
    return np.cumsum(acted.sum(-1))


def due(config, rows_per_window, decisions):
    """Updates due after ``decisions``, in exact arithmetic."""
    if decisions < config.prefill:
        return 0
    ratio = Fraction(config.train_ratio) / (config.batch_size * rows_per_window)
    return config.prefill_updates + (decisions - config.prefill) * (ratio or 1) // 1


class Steps(Callback):
    """Notes (updates, environment steps, rows in replay) of every look."""

    every = 1

    def __init__(self):
        self.seen = []

    def on_step(self, info):
        self.seen.append((info.step, info.env_steps, info.replay_size))


@pytest.mark.parametrize(
    ("changes", "num_envs", "repeat"),
    [
        ({}, 1, 1),
        ({"prefill": 30, "prefill_updates": 11}, 3, 1),
        ({"train_ratio": 3.0}, 2, 1),
        ({"train_ratio": 3.0, "prefill_updates": 5}, 1, 3),
        ({"train_ratio": 40.0}, 4, 2),
        ({"train_ratio": 1.0, "batch_size": 7, "sequence_length": 7, "prefill": 61}, 1, 1),  # 49 · (1 / 49) < 1
    ],
)
@pytest.mark.parametrize("latents", [False, True])
def test_updates_come_when_they_are_due(config, changes, num_envs, repeat, latents):
    """After as few steps of the environments as possible; the number of environment steps given decides how many."""
    config = config.replace(**changes)
    config = config.replace(env_steps=(147 + config.prefill) * repeat)
    env = make_env(Walk, num_envs, seed=1, action_repeat=repeat)
    steps = Steps()
    trainer = Trainer(toy(env, latents=latents), config, [steps])
    trainer.train(env)
    assert trainer.step == len(steps.seen) == due(config, config.sequence_length, 147 + config.prefill)
    after = decisions_after_calls(every_row(trainer.replay), num_envs)
    for step, env_steps, size in steps.seen:
        call = next(i for i, d in enumerate(after) if due(config, config.sequence_length, int(d)) >= step)
        assert (env_steps, size) == (after[call] * repeat, (call + 1) * num_envs), f"update {step}"
    assert steps.seen[-1][1] < config.env_steps + num_envs * repeat


def test_total_steps_given_wins_over_env_steps(config):
    env = make_env(Walk, seed=1)
    trainer = Trainer(toy(env), config.replace(env_steps=30, total_steps=3), [])
    trainer.train(env)
    assert trainer.step == 10
    trainer.train(env, total_steps=15)
    assert trainer.step == 15
    assert decisions_after_calls(every_row(trainer.replay), 1)[-1] == 35


@pytest.mark.parametrize("repeat", [1, 3])
def test_too_few_environment_steps_are_answered_with_a_sentence(config, repeat):
    env = make_env(Walk, seed=1, action_repeat=repeat)
    for env_steps in (1, 20 * repeat, 20 * repeat + repeat - 1):
        with pytest.raises(ConfigError, match=r"end before the first update: prefill=20") as caught:
            Trainer(toy(env), config.replace(env_steps=env_steps), []).train(env)
        assert f"env_steps={env_steps} are {env_steps // repeat} decision steps" in str(caught.value)
    assert int(Trainer(toy(env), config.replace(env_steps=21 * repeat), []).train(env).step) == 1


# ---- a run that is stopped and resumed equals one that never was -------------------------------------------------

TOTAL = 40


class Crash(Exception):
    """Stands for whatever goes wrong."""


class Stop(Callback):
    """Ends the run of a process at ``step``, after all other callbacks have looked."""

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


class Measured(Callback):
    """Keeps what was published."""

    every = 0

    def __init__(self):
        self.pages = []

    def on_eval(self, info, measurements):
        self.pages.append((info.step, info.env_steps, dict(measurements)))


def begin(folder, config, family, *, num_envs=2, save_every=7, latents=False, kind=Walk, extra=()):
    """A trainer of the run in ``folder``, and its environment."""
    env = make_env(kind, num_envs, seed=3)
    callbacks = [
        CheckpointCallback(str(folder / "checkpoints"), save_every=save_every, keep_last=99, save_best=False),
        EvalCallback(make_env(kind, 2, seed=9), every=6, episodes=3, seed=9),
        LoggingCallback(str(folder), log_to_console=False),
        *extra,
    ]
    return Trainer(toy(env, family, latents=latents), config, callbacks), env


def result(trainer, folder, leave_out=()):
    """All that a run leaves, for comparison; of the log what says nothing about time."""
    text = (folder / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    log = [{k: v for k, v in line.items() if k not in ("time", "fps/update")} for line in records]
    return {
        "state": flatten_state(on_host(trainer.state)),
        "model": trainer.model.params,
        "replay": every_row(trainer.replay),
        "position": trainer.replay.state_dict(),
        "env_steps": np.array(trainer.run.env_steps),
        "in flight": trainer.run.writeback.state_arrays(),
        "log": {str(n): line for n, line in enumerate(line for line in log if line["step"] not in leave_out)},
    }


FAMILIES = {"latents": (ToyWorldModel, True), "random prefill": (PrefillingToy, False)}


def settings(config, capacity):
    """A burst, more than one update per step of the environments, and none at times."""
    return config.replace(updates_per_call=capacity, prefill=24, prefill_updates=5, train_ratio=15.0, log_interval=4)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Results of whole runs, made when first asked for."""
    found = {}

    def whole(name, config, **options):
        key = name, config, *options.items()
        if key not in found:
            folder = tmp_path_factory.mktemp("whole")
            family, latents = FAMILIES[name]
            trainer, env = begin(folder, config, family, latents=latents, **options)
            trainer.train(env, total_steps=TOTAL)
            found[key] = trainer, folder
        return found[key]

    return whole


def train(trainer, env, stop, resume):
    """One process's part of a run."""
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
def test_a_resumed_run_equals_one_that_was_never_stopped(
    config, tmp_path, never_stopped, name, capacity, stops, resume
):
    config = settings(config, capacity)
    whole, whole_folder = never_stopped(name, config)
    family, latents = FAMILIES[name]
    for number, stop in enumerate(stops):
        extra = [] if isinstance(stop, int) else [Stop(*stop)]
        trainer, env = begin(tmp_path, config, family, latents=latents, extra=extra)
        train(trainer, env, stop, resume if number else False)
    trainer, env = begin(tmp_path, config, family, latents=latents)
    trainer.train(env, total_steps=TOTAL, resume=resume)
    ends = [stop if isinstance(stop, int) else stop[1] for stop in stops if "exception" not in np.atleast_1d(stop)]
    assert_equal(result(whole, whole_folder, ends), result(trainer, tmp_path, ends))


def test_any_checkpoint_can_be_gone_on_from(config, tmp_path, never_stopped):
    config = settings(config, 3)
    whole, folder = never_stopped("latents", config)
    for step in (7, 14, 21, 28, 35, 40):
        trainer, env = begin(tmp_path / str(step), config, ToyWorldModel, latents=True)
        trainer.train(env, total_steps=TOTAL + (step == 40), resume=folder / "checkpoints" / str(step))
        if step < 40:
            one, other = result(whole, folder), result(trainer, tmp_path / str(step))
            kept = [line for line in one.pop("log").values() if line["step"] > step]
            assert kept == list(other.pop("log").values())
            assert_equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_calls_nor_who_looks_change_anything(config, tmp_path, never_stopped, name):
    """Latents are written back in groups of K, so that for them K is part of the run; how calls are cut is not."""
    family, latents = FAMILIES[name]
    for capacity, looking in ((3, 1), (3, 100), (8, 5)):
        whole, _ = never_stopped(name, settings(config, capacity if latents else 1))
        watch = [(looking, lambda info: print(info.read_state().step))]
        config = settings(config, capacity)
        trainer, env = begin(tmp_path / f"{capacity}-{looking}", config, family, latents=latents, extra=watch)
        trainer.train(env, total_steps=TOTAL)
        assert_equal(flatten_state(on_host(whole.state)), flatten_state(on_host(trainer.state)))
        assert_equal(every_row(whole.replay), every_row(trainer.replay))


def test_sigterm_before_the_first_update(config, tmp_path, never_stopped):
    class Killing(Walk):
        calls = 0

        def step(self, action):
            type(self).calls += 1
            if type(self).calls == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    config = settings(config, 1)
    whole, folder = never_stopped("random prefill", config)
    trainer, env = begin(tmp_path, config, PrefillingToy, kind=Killing)
    with pytest.raises(SystemExit) as left:
        trainer.train(env, total_steps=TOTAL)
    assert left.value.code == 128 + signal.SIGTERM
    assert trainer.step == 0
    trainer, env = begin(tmp_path, config, PrefillingToy)
    trainer.train(env, total_steps=TOTAL, resume=True)
    assert len(trainer.replay) == len(whole.replay)
    assert_equal(result(whole, folder), result(trainer, tmp_path))


def with_latents():
    return fill(ReplayBuffer(10_000, latents={"memory": (1,)}), episodes=3, steps=6)


@pytest.mark.parametrize("capacity", [1, 3])
def test_offline_latents_resume_into_a_fresh_buffer(config, tmp_path, capacity):
    """The episodes are the user's; the latents that training wrote beside them come from the checkpoint."""
    config = config.replace(updates_per_call=capacity)

    def run(folder, buffer, **options):
        saves = CheckpointCallback(str(tmp_path / folder), save_every=4)
        trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), config, [saves])
        trainer.train(buffer, **options)
        return {
            "state": flatten_state(on_host(trainer.state)),
            "replay": every_row(buffer),
            "in flight": trainer.run.writeback.state_arrays(),
        }

    whole = run("whole", with_latents(), total_steps=30)
    for stop in (1, 8, 11, 22):
        run("cut", with_latents(), total_steps=stop, resume="auto")
    cut = run("cut", with_latents(), total_steps=30, resume=True)
    assert np.abs(whole["replay"]["latents"]["memory"]).max() > 1
    assert_equal(whole, cut)


def test_a_resumed_run_collects_into_the_buffer_that_its_user_has(config, tmp_path, never_stopped):
    whole, _ = never_stopped("latents", settings(config, 1))
    for stop in (10, TOTAL):
        buffer = ReplayBuffer(1_000_000)
        trainer, env = begin(tmp_path, settings(config, 1), ToyWorldModel, latents=True)
        trainer.train(env, total_steps=stop, resume="auto", replay=buffer)
        assert trainer.replay is buffer
    assert_equal(every_row(whole.replay), every_row(buffer))


def test_recorded_episodes_and_environments_do_not_go_on_from_each_other(config, tmp_path):
    env = make_env(Glide, seed=3)

    def trainer(folder):
        return Trainer(toy(env), config, [CheckpointCallback(str(tmp_path / folder), save_every=5)])

    trainer("online").train(env, total_steps=5)
    trainer("offline").train(fill(ReplayBuffer(999)), total_steps=5)
    with pytest.raises(ConfigError, match="was trained from environments; it cannot go on from recorded episodes"):
        trainer("online").train(fill(ReplayBuffer(999)), resume=True, total_steps=9)
    with pytest.raises(ConfigError, match="was trained from recorded episodes; it cannot go on from environments"):
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
def test_other_environments_than_a_run_was_collected_from_are_refused(config, tmp_path, change):
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


def test_where_environments_are_stepped_does_not_matter_to_a_resumed_run(config, tmp_path):
    for parallel in ("sync", "subprocess"):
        with make_env(Walk, seed=3, parallel=parallel) as env:
            trainer = Trainer(toy(env), config, [CheckpointCallback(str(tmp_path), save_every=5)])
            trainer.train(env, total_steps=trainer.step + 5 if parallel == "sync" else 9, resume="auto")
    assert trainer.step == 9


@pytest.mark.parametrize("num_envs", [1, 2])
def test_environments_that_somebody_else_moved_begin_new_episodes(config, caplog, num_envs):
    env = make_env(Walk, num_envs, seed=3)
    trainer = Trainer(toy(env), config, [])
    trainer.train(env, total_steps=5)
    trainer.train(env, total_steps=6)
    assert "somebody else" not in caplog.text
    middle = len(trainer.replay)
    env.reset(seed=5)
    for _ in range(3):
        env.step(env.sample_actions(np.random.default_rng(0)))
    trainer.train(env, total_steps=20)
    assert "reset or stepped by somebody else" in caplog.text
    rows = every_row(trainer.replay)
    assert not rows["is_first"][middle - num_envs : middle].all()
    assert rows["is_first"][middle : middle + num_envs].all()
    for number in range(num_envs):
        # Until then episodes 0, 1, ... of seed 3, from there on those of seed 5 but for its first.
        of_one = stream(rows, number, num_envs)
        assert_happened(Walk, {k: v[: middle // num_envs] for k, v in of_one.items()}, 3, number)
        later = {k: v[middle // num_envs :] for k, v in of_one.items()}
        np.testing.assert_array_equal(later["obs"][0], first_observation(Walk, episode_seed(5, number, 1)))


def first_observation(kind, seed):
    return kind().reset(seed=seed)[0].astype(np.float32)


def test_environments_of_the_trainer_that_broke_are_made_again(config):
    trainer = Trainer(toy(make_env(Walk)), config, [])
    trainer.train(Walk, total_steps=2)
    trainer._env(Walk).close()
    trainer.train(Walk, total_steps=4)
    assert trainer.step == 4


def vector_of_gymnasium():
    return make_env(gym.vector.SyncVectorEnv([Walk, Walk], autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP), seed=3)


@pytest.mark.parametrize(
    ("make", "count"), [(vector_of_gymnasium, 2), (lambda: make_env(Moody, seed=3), 1), (lambda: make_env(Once), 1)]
)
def test_environments_that_cannot_be_played_again_begin_new_episodes(config, tmp_path, make, count):
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
        # Row and latent belong together: nothing that was chosen at the observation now lost is stored with this one.
        np.testing.assert_array_equal(rows["latents"]["memory"][new], rows["obs"][new, :1])


# ---- returns -----------------------------------------------------------------------------------------------------


def recording(kind):
    """A kind of environment that keeps (instance, return, length) of every finished episode, and a list of those."""
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
    kind, ended = recording(Walk)
    env = make_env(kind, num_envs, seed=3)
    snapshots = []

    class Here(Measured):
        def on_eval(self, info, measurements):
            super().on_eval(info, measurements)
            snapshots.append(len(ended))

    measured = Here()
    trainer = Trainer(toy(env), config.replace(log_interval=10, train_ratio=4.0), [measured])
    trainer.train(env, total_steps=57)
    done = 0
    assert [step for step, *_ in measured.pages] == [10, 20, 30, 40, 50, 57]
    for (_, env_steps, page), upto in zip(measured.pages, snapshots, strict=True):
        assert page["collect/episodes"] == upto - done > 0
        assert page["collect/return"] == pytest.approx(np.mean([r for _, r, _ in ended[done:upto]]), rel=1e-12)
        assert page["collect/length"] == np.mean([n for _, _, n in ended[done:upto]])
        assert page["collect/restarts"] == 0
        assert sum(length for *_, length in ended[:upto]) <= env_steps + num_envs
        done = upto
    # The last page of a call says what the next one says again: its interval is not over.
    trainer.train(env, total_steps=60)
    assert [step for step, *_ in measured.pages[6:]] == [60]
    assert measured.pages[6][2]["collect/episodes"] == snapshots[6] - snapshots[4]


@pytest.mark.parametrize(("episodes", "shares"), [(7, (3, 2, 2)), (2, (1, 1, 0)), (3, (1, 1, 1))])
def test_evaluation_is_the_mean_of_an_equal_share_of_every_environment(config, episodes, shares):
    kind, ended = recording(Walk)
    other = make_env(kind, 3)
    measured = Measured()
    env = make_env(Walk, seed=3)
    evaluation = EvalCallback(other, every=5, episodes=episodes, seed=11)
    Trainer(toy(env), config, [evaluation, measured]).train(env, total_steps=5)
    counted = [one for number, share in enumerate(shares) for one in [e for e in ended if e[0] == number][:share]]
    assert len(counted) == episodes
    (page,) = [page for _, _, page in measured.pages if "eval/return" in page]
    assert page["eval/return"] == pytest.approx(np.mean([r for _, r, _ in counted]), rel=1e-12)
    assert page["eval/return_std"] == pytest.approx(np.std([r for _, r, _ in counted]), rel=1e-12)
    assert page["eval/length"] == np.mean([n for *_, n in counted])


def test_evaluation_leaves_training_as_it_was(config):
    """Neither its environments nor its keys are those of training."""
    found = []
    for callbacks in ([], [EvalCallback(make_env(Glide, 2), every=3, episodes=3)]):
        env = make_env(Glide, 2, seed=3)
        trainer = Trainer(toy(env, latents=True), config, callbacks)
        trainer.train(env, total_steps=20)
        found.append((flatten_state(on_host(trainer.state)), every_row(trainer.replay)))
    assert_equal(*(state for state, _ in found))
    assert_equal(*(rows for _, rows in found))


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


def test_play_films_the_first_episode_of_environment_0():
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


# ---- doors -------------------------------------------------------------------------------------------------------


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


def test_a_name_for_all_types_of_a_dict_of_actions_will_do(config):
    class Keys(Walk):
        action_space = gym.spaces.MultiDiscrete([2, 2])

        def step(self, action):
            return super().step(int(action[0]))

    env = make_env(Keys, seed=3)
    model = ToyWorldModel(ToyConfig(obs_shape=(2,), action_dim=env.action_dim, action_type="discrete"))
    trainer = Trainer(model, config, [])
    trainer.train(env, total_steps=3)
    assert trainer.replay.action_type == {"action0": "discrete", "action1": "discrete"}


def test_terminations_need_a_model_that_knows_of_them(config):
    env = make_env(Walk, seed=3)
    small = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2}
    trainer = Trainer(TDMPC2WorldModel(TDMPC2Config(**shapes(env), **small)), config.replace(prefill=1000), [])
    with pytest.raises(ConfigError, match="Create the model with episodic=True"):
        trainer.train(env)
    assert not every_row(trainer.replay)["is_terminal"].any()
    many = TDMPC2WorldModel(TDMPC2Config(**shapes(env), **small, num_tasks=2))
    with pytest.raises(ConfigError, match="multitask model is trained from recorded episodes"):
        Trainer(many, config, []).train(env)


def test_what_is_no_environment_is_refused(config):
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


def test_a_window_longer_than_anything_collected_is_answered_with_a_sentence(config):
    env = make_env(Walk)
    with pytest.raises(DataError, match=r"A window needs 50 rows; the longest episode held has \d+"):
        Trainer(toy(env), config.replace(sequence_length=50), []).train(env)
    crowd = make_env(Walk, 10)
    with pytest.raises(DataError, match=r"\d+ decision steps were taken in 10 environments; a larger prefill"):
        Trainer(toy(crowd), config.replace(sequence_length=4), []).train(crowd)


class Breaking(Glide):
    """Shows NaN, or raises, at its 40th step of all."""

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
def test_what_an_environment_breaks_is_not_the_model(config, tmp_path, monkeypatch, fault, error, message):
    monkeypatch.setattr(Breaking, "fault", fault)
    monkeypatch.setattr(Breaking, "taken", 0)
    saves = CheckpointCallback(str(tmp_path), save_every=7)
    env = make_env(Breaking, seed=3)
    trainer = Trainer(toy(env), config, [saves])
    with pytest.raises(error, match=message):
        trainer.train(env, total_steps=60)
    assert 10 < trainer.step < 20
    assert np.isfinite(every_row(trainer.replay)["obs"]).all()
    sound = make_env(Glide, seed=3)
    whole = Trainer(toy(sound), config, [])
    whole.train(sound, total_steps=trainer.step)
    assert_equal(flat(whole.model.params), flat(trainer.model.params))
    # Three ways on: the environment is closed; another one, with what was collected; the last checkpoint.
    with pytest.raises(EnvError, match="was closed"):
        trainer.train(env, total_steps=60)
    collected, step = trainer.replay, trainer.step
    another = make_env(Glide, seed=8)
    trainer.train(another, total_steps=step + 3, replay=collected)
    assert trainer.step == step + 3
    assert trainer.replay is collected
    again = make_env(Glide, seed=3)
    resumed = Trainer(toy(again), config, [CheckpointCallback(str(tmp_path), save_every=7)])
    resumed.train(again, total_steps=30, resume=tmp_path / "14")
    whole.train(sound, total_steps=30)
    assert_equal(flatten_state(on_host(whole.state)), flatten_state(on_host(resumed.state)))
    assert_equal(every_row(whole.replay), every_row(resumed.replay))


# ---- what may be given -------------------------------------------------------------------------------------------


def test_ids_functions_and_objects_are_environments(config):
    gym.register("worldloom-tests/Glide-v0", Glide)
    try:
        rows = []
        for source in ("worldloom-tests/Glide-v0", Glide, make_env(Glide, seed=config.seed), Glide()):
            trainer = Trainer(toy(make_env(Glide)), config, [])
            trainer.train(source, total_steps=4)
            # An equal name is the same environment: training goes on in it.
            trainer.train("".join(source) if isinstance(source, str) else source, total_steps=8)
            assert trainer.step == 8
            rows.append(every_row(trainer.replay))
        for other in rows[1:]:
            assert_equal(rows[0], other)
    finally:
        gym.registry.pop("worldloom-tests/Glide-v0")


@pytest.mark.parametrize("parts", [(1, 2, 9, 40), (21, 40)])
def test_going_on_equals_not_stopping(config, never_stopped, tmp_path, parts):
    whole, _ = never_stopped("latents", settings(config, 3))
    trainer, env = begin(tmp_path, settings(config, 3), ToyWorldModel, latents=True)
    for total in parts:
        trainer.train(env, total_steps=total)
    assert_equal(flatten_state(on_host(whole.state)), flatten_state(on_host(trainer.state)))
    assert_equal(every_row(whole.replay), every_row(trainer.replay))


def test_a_buffer_with_episodes_in_it_is_collected_into(config):
    given = fill(ReplayBuffer(10_000))
    before = every_row(given)
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, latents=True), config, [])
    trainer.train(env, total_steps=10, replay=given)
    assert trainer.replay is given
    assert given.latents == {"memory": (1,)}
    rows = every_row(given)
    assert_equal(before, {k: v[: len(before["obs"])] for k, v in rows.items() if k != "latents"})
    new = {k: v[len(before["obs"]) :] for k, v in rows.items() if k != "latents"}
    for i in range(2):
        assert_happened(Glide, stream(new, i, 2), 3, i)
    wide = ReplayBuffer(100)
    wide.add_episode(np.zeros((9, 3), np.float32), np.zeros((8, 1), np.float32), np.zeros(8), np.zeros(8, bool))
    with pytest.raises(DataError, match="observations"):
        Trainer(toy(env), config, []).train(env, replay=wide)


def test_a_small_buffer_forgets(config):
    env = make_env(Glide, 2, seed=3)
    trainer = Trainer(toy(env, latents=True), config.replace(replay_capacity=30), [])
    trainer.train(env, total_steps=60)
    assert len(trainer.replay) == 30
    assert trainer.replay.state_dict()["next_row"] > 80


def test_recorded_episodes_first_then_environments(config):
    """Updates done before do not count as those that the environments make due."""
    steps = Steps()
    env = make_env(Glide, seed=3)
    trainer = Trainer(toy(env, latents=True), config.replace(env_steps=50), [steps])
    trainer.train(with_latents(), total_steps=100)
    trainer.train(env)
    assert trainer.step == 130
    assert [env_steps for _, env_steps, _ in steps.seen[100:]] == list(range(21, 51))
    another = make_env(Glide, seed=4)
    trainer.train(another)
    assert trainer.step == 160
    assert [env_steps for _, env_steps, _ in steps.seen[130:]] == list(range(21, 51))


def test_latents_in_flight_are_those_of_their_buffer(config):
    """Training on another buffer does not write to it what belongs to the rows of the one before."""
    found = []
    for detour in (False, True):
        trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), config.replace(updates_per_call=3), [])
        first, second = with_latents(), fill(ReplayBuffer(999, latents={"memory": (1,)}), episodes=1, steps=6)
        trainer.train(first, total_steps=20)
        if detour:
            trainer.train(second, total_steps=21)
            assert not every_row(second)["latents"]["memory"].any()
        else:
            trainer.run.writeback.switch_buffer(None)
        found.append(every_row(first))
    assert_equal(*found)


def test_by_default_ten_episodes_are_evaluated_where_environments_can_be_made_again(config, caplog, capsys):
    config = config.replace(eval_interval=5, log_interval=5)
    env = make_env(Glide, seed=3)
    Trainer(toy(env), config).train(Glide, total_steps=5)
    assert "eval/return" in capsys.readouterr().out
    assert not caplog.records
    Trainer(toy(env), config).train(Glide(), total_steps=5)
    assert "eval/return" not in capsys.readouterr().out
    assert "There will be no evaluation" in caplog.text


# ---- a process dies ----------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_its_episode_and_nothing_else(config, caplog):
    """Over 1,000 environment steps in 8 processes, of which one is killed at a random moment of the random prefill."""
    config = config.replace(prefill=1_050, log_interval=5)
    calm = make_env(Walk, 8, seed=3)
    undisturbed = Trainer(toy(calm, PrefillingToy), config, [])
    undisturbed.train(calm, total_steps=20)
    expected = every_row(undisturbed.replay)

    rng = np.random.default_rng()
    moment, victim = (int(n) for n in rng.choice(np.argwhere(~expected["is_last"].reshape(-1, 8)[:125])))
    print(f"environment {victim} is killed after its row {moment}")

    class Killing(ReplayBuffer):
        def add_rows(self, *args, **options):
            super().add_rows(*args, **options)
            if len(self) == 8 * (moment + 1):
                os.kill(env._backend._workers[victim].pid, signal.SIGKILL)

    measured = Measured()
    with make_env(Walk, 8, seed=3, parallel="subprocess") as env:
        trainer = Trainer(toy(env, PrefillingToy), config, [measured])
        trainer.train(env, total_steps=20, replay=Killing())
    assert trainer.step == 20
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"environment {victim} was killed by SIGKILL" in message
    assert "its episode closed as truncated" in message
    assert {page["collect/restarts"] for _, _, page in measured.pages} == {1.0}

    rows = every_row(trainer.replay)
    same = min(len(rows["rewards"]), len(expected["rewards"])) // 8
    assert same >= 131
    for number in set(range(8)) - {victim}:
        told, held = stream(expected, number, 8), stream(rows, number, 8)
        assert_equal(*({k: v[:125] for k, v in one.items() if k != "row_ids"} for one in (told, held)))
    told, held = stream(expected, victim, 8), stream(rows, victim, 8)
    before = moment + 1
    assert_equal(*({k: v[:before] for k, v in one.items() if k != "row_ids"} for one in (told, held)))
    cut = {k: v[before] for k, v in held.items()}
    np.testing.assert_array_equal(cut["obs"], held["obs"][moment])
    assert (cut["rewards"], cut["is_last"], cut["is_terminal"]) == (0, True, False)
    assert not cut["actions"].any()
    # The episodes after it are those that would have come then, begun earlier.
    following = {k: v[before + 1 :] for k, v in held.items()}
    assert following["is_first"][0]
    begun = int(held["is_first"][: before + 1].sum())
    for at in np.flatnonzero(following["is_first"]):
        world = Walk()
        np.testing.assert_array_equal(
            following["obs"][at], world.reset(seed=episode_seed(3, victim, begun))[0].astype(np.float32)
        )
        begun += 1
    assert begun > int(held["is_first"][: before + 1].sum())


# ---- both families ------------------------------------------------------------------------------------------------


def small_dreamer(env):
    sizes = {"deter_dim": 32, "stoch_dim": 16, "num_categories": 4, "hidden_dim": 16, "mlp_layers": 1, "bins": 5}
    dreams = {"imagination_starts": 2, "imagination_horizon": 3, "blocks": 4}
    return DreamerV3WorldModel(DreamerV3Config(**shapes(env), **sizes, **dreams))


def small_tdmpc2(env):
    sizes = {"latent_dim": 16, "hidden_dim": 16, "encoder_dim": 16, "num_q": 2, "num_bins": 5, "episodic": True}
    plans = {"num_samples": 8, "num_elites": 3, "num_pi_trajs": 2, "iterations": 2}
    return TDMPC2WorldModel(TDMPC2Config(**shapes(env), **sizes, **plans))


@pytest.mark.parametrize("make", [small_dreamer, small_tdmpc2])
def test_either_family_resumes_bit_for_bit(config, tmp_path, make):
    """Calls of three updates; a stop by total_steps, one by SIGTERM, one by an error after a save."""
    config = config.replace(updates_per_call=3, train_ratio=8.0, prefill=30, prefill_updates=4, sequence_length=4)

    def begin(folder, *extra):
        env = make_env(Glide, 2, seed=3)
        callbacks = [
            CheckpointCallback(str(tmp_path / folder / "checkpoints"), save_every=5, save_best=False),
            EvalCallback(make_env(Glide, 2), every=6, episodes=3),
            LoggingCallback(str(tmp_path / folder), log_to_console=False),
            *extra,
        ]
        return Trainer(make(env), config, callbacks), env

    whole, env = begin("whole")
    whole.train(env, total_steps=20)
    trainer, env = begin("cut")
    trainer.train(env, total_steps=4)
    for stop in (("sigterm", 8), ("exception", 12)):
        trainer, env = begin("cut", Stop(*stop))
        with pytest.raises((Crash, SystemExit)):
            trainer.train(env, total_steps=20, resume="auto")
    trainer, env = begin("cut")
    trainer.train(env, total_steps=20, resume="auto")
    assert_equal(result(whole, tmp_path / "whole", (4, 8)), result(trainer, tmp_path / "cut", (4, 8)))
    for number in range(2):
        assert_happened(Glide, stream(every_row(trainer.replay), number, 2), 3, number)


def test_dreamer_stores_the_latents_it_acted_from(config):
    env = make_env(Glide, 2, seed=3)
    model = small_dreamer(env)
    params = model.params
    trainer = Trainer(model, config.replace(prefill=60, env_steps=62), [])
    trainer.train(env)
    assert_policy_of(model, params, config.seed, every_row(trainer.replay), 2)
