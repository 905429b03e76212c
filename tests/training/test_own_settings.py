"""What a user sets is what holds: callbacks' methods, intervals, and another config between two calls of ``train``."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from online_worlds import Walk
from toy_family import ToyConfig, ToyWorldModel
from trees import assert_same, changed, leaves

from worldloom import ConfigError
from worldloom.envs import make_env
from worldloom.replay import ReplayBuffer
from worldloom.training import RunFolder, Trainer, TrainingConfig, TrainState
from worldloom.training.callbacks import Callback, CheckpointCallback, LoggingCallback

REFUSED = (ConfigError, TypeError)


class Trace(Callback):
    """Keeps (step, env_steps, lr) of every update."""

    every = 1

    def __init__(self):
        self.rows = []

    def on_step(self, info):
        self.rows.append((info.step, info.env_steps, round(float(info.metrics["lr"]), 8)))


def toy(config, callbacks=()):
    return Trainer(ToyWorldModel(ToyConfig()), config, list(callbacks))


def run_of(tmp_path):
    return [CheckpointCallback(str(tmp_path / "checkpoints"))]


# --- Callbacks -------------------------------------------------------------------------------------------------------


def with_method(name, method, bases=(Callback,)):
    return type("Mine", bases, {name: method})()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("on_step_end", "on_step"),
        ("on_training_start", "on_train_begin"),
        ("on_train_start", "on_train_begin"),
        ("on_training_end", "on_train_end"),
        ("on_evaluate", "on_eval"),
        ("on_evaluation", "on_eval"),
        ("on_Step", "on_step"),
    ],
)
def test_a_method_that_is_never_called_is_refused_and_the_right_name_given(config, wrong, right):
    callback = with_method(wrong, lambda self, step, losses: None)
    with pytest.raises(REFUSED) as caught:
        toy(config, [callback])
    words = str(caught.value).replace(wrong, "").replace("(", " ").replace(",", " ").replace("?", " ").split()
    assert wrong in str(caught.value)
    assert any(word.strip(".:;'`\"") == right for word in words), str(caught.value)


def test_a_method_that_is_never_called_is_refused_wherever_it_comes_from(config):
    class Mixin:
        def on_batch_end(self, info):
            """Of another library."""

    for bases in ((Mixin, Callback), (Mixin, LoggingCallback)):
        with pytest.raises(REFUSED, match="on_batch_end"):
            toy(config, [type("Mine", bases, {})()])
    with pytest.raises(REFUSED, match="on_batch_end"):
        toy(config, [with_method("on_batch_end", staticmethod(lambda info: None))])


WRONG = {
    "on_step": [
        lambda self, step, losses: None,
        lambda self: None,
        lambda self, info, *, losses: None,
        lambda self, info, extra, more=1: None,
    ],
    "on_eval": [lambda self, info: None, lambda self, info, measurements, more: None, lambda self: None],
    "on_train_begin": [lambda self: None, lambda self, info, config: None],
    "on_train_end": [lambda self: None, lambda self, info, state: None],
}
RIGHT = {
    "on_step": [
        lambda self, info: None,
        lambda self, record, extra=None: None,
        lambda self, *args: None,
        lambda *args, **options: None,
        lambda self, info, *, quiet=True: None,
        staticmethod(lambda info: None),
        classmethod(lambda cls, info: None),
    ],
    "on_eval": [
        lambda self, info, measurements: None,
        lambda self, info, measurements, more=1: None,
        lambda self, *args: None,
        lambda self, info, *args: None,
    ],
    "on_train_begin": [lambda self, info, more=1: None, lambda self, *args: None],
    "on_train_end": [lambda self, info, more=1: None, lambda self, *args: None],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, found in WRONG.items() for i in range(len(found))])
def test_a_method_with_wrong_arguments_is_refused(config, name, number):
    with pytest.raises(REFUSED, match=name):
        toy(config, [with_method(name, WRONG[name][number])])


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, found in RIGHT.items() for i in range(len(found))])
def test_a_method_with_further_defaults_is_accepted(config, name, number):
    toy(config, [with_method(name, RIGHT[name][number])])


@pytest.mark.parametrize("name", ["once", "_on_step_end", "only", "ongoing", "report", "step_end"])
def test_helpers_of_a_callback_are_its_own(config, name):
    toy(config, [with_method(name, lambda self, anything, more: None)])


def test_callbacks_that_were_accepted_are_called(buffer, config):
    calls = []

    class Mine(Callback):
        every = 2

        def on_train_begin(self, info, extra="default"):
            calls.append(("begin", extra))

        def on_step(self, *args):
            calls.append(("step", *[info.step for info in args]))
            return {"mine/number": 1.0}

        def on_eval(self, info, measurements, extra=3):
            calls.append(("eval", measurements["mine/number"], extra))

        measures = True

        def on_train_end(self, *args, **options):
            calls.append(("end", len(args)))

    toy(config.replace(total_steps=4), [Mine()]).train(buffer)
    assert calls[0] == ("begin", "default")
    assert calls[-1] == ("end", 1)
    assert [call for call in calls if call[0] == "step"] == [("step", 2), ("step", 4)]
    assert ("eval", 1.0, 3) in calls


@pytest.mark.parametrize("callback", [None, 3, "log", object(), Callback, LoggingCallback])
def test_what_is_no_callback_is_refused(config, callback):
    with pytest.raises(REFUSED, match=r"callback|Callback"):
        toy(config, [callback])


# --- save_every ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "interval"),
    [
        ({}, 500),
        ({"save_every": 10_000}, 10_000),
        ({"save_every": int("10000")}, 10_000),
        ({"save_every": 7}, 7),
    ],
)
def test_save_every_is_what_was_given_or_the_configs(config, tmp_path, given, interval):
    assert CheckpointCallback(str(tmp_path), **given).interval(config.replace(save_interval=500)) == interval
    assert CheckpointCallback(str(tmp_path), *given.values()).interval(config.replace(save_interval=500)) == interval


def test_the_signature_of_save_every_shows_the_default():
    default = inspect.signature(CheckpointCallback).parameters["save_every"].default
    assert default == 10_000
    assert str(default) == "10000"
    assert repr(default) == "10000"
    assert "save_every: 'int' = 10000" in str(inspect.signature(CheckpointCallback))


@pytest.mark.parametrize(
    ("given", "steps"), [({}, [4, 8, 10]), ({"save_every": 10_000}, [10]), ({"save_every": 5}, [5, 10])]
)
def test_checkpoints_are_written_as_often_as_said(buffer, config, tmp_path, given, steps):
    callback = CheckpointCallback(str(tmp_path), keep_last=10, save_best=False, **given)
    toy(config.replace(total_steps=10, save_interval=4), [callback]).train(buffer)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == steps


# --- Another config between two calls of train -----------------------------------------------------------------------

EFFECTIVE = {
    "learning_rate": 5e-2,
    "batch_size": 7,
    "sequence_length": 3,
    "grad_clip": 1e-3,
    "warmup_steps": 100,
    "microbatches": 2,
}


def by_hand(state, buffer, config, update):
    """Update number ``update`` from ``state`` as ``make_update`` defines it."""
    step = jax.jit(toy_family.make_update(ToyConfig(), config, model_class=ToyWorldModel))
    batch = buffer.sample(config.batch_size, config.sequence_length, seed=config.seed, update=update)
    batch.pop("row_ids")
    return step(state, batch, jax.random.fold_in(state.key, update))[0]


@pytest.mark.parametrize("field", EFFECTIVE)
def test_a_setting_that_changes_between_two_calls_takes_effect(buffer, config, field):
    new = config.replace(**{field: EFFECTIVE[field]})
    trainer = toy(config)
    trainer.train(buffer, total_steps=2)
    before = jax.tree.map(jnp.copy, trainer.state)
    trainer.config = trainer.config.replace(**{field: EFFECTIVE[field]})
    assert trainer.config == new
    trainer.train(buffer, total_steps=3)
    expected, old = by_hand(before, buffer, new, 2), by_hand(before, buffer, config, 2)
    for path, leaf in leaves(expected.params).items():
        np.testing.assert_allclose(leaves(trainer.state.params)[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path)
    if field != "microbatches":  # which this family does not read
        assert changed(expected.params, old.params)
    assert trainer.step == 3


def test_two_changes_and_the_way_back(buffer, config):
    """A, B and A again equal the same updates by hand; nothing of B is left."""
    other = config.replace(learning_rate=5e-2, batch_size=7)
    trainer = toy(config)
    trainer.train(buffer, total_steps=1)
    state = jax.tree.map(jnp.copy, trainer.state)
    for step, now in ((1, other), (2, config), (3, other)):
        trainer.config = now
        trainer.train(buffer, total_steps=step + 1)
        state = by_hand(state, buffer, now, step)
    for path, leaf in leaves(state.params).items():
        np.testing.assert_allclose(leaves(trainer.state.params)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_log_gives_the_rate_that_was_used(buffer, config, tmp_path):
    trainer = toy(config.replace(log_interval=1), [LoggingCallback(str(tmp_path), log_to_console=False)])
    trainer.train(buffer, total_steps=2)
    trainer.config = trainer.config.replace(learning_rate=5e-2)
    trainer.train(buffer, total_steps=4)
    rows = [
        json.loads(line) for path in sorted(tmp_path.glob("metrics*.jsonl")) for line in path.read_text().splitlines()
    ]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert {step: round(rate, 6) for step, rate in rates.items()} == {1: 0.01, 2: 0.01, 3: 0.05, 4: 0.05}


def test_intervals_that_change_between_two_calls_take_effect(buffer, config, tmp_path):
    seen = []

    class Follows(Callback):
        def on_step(self, info):
            seen.append(info.step)

    saver = CheckpointCallback(str(tmp_path), keep_last=20, save_best=False)
    trainer = toy(config.replace(log_interval=2, save_interval=4), [Follows(), saver])
    trainer.train(buffer, total_steps=4)
    trainer.config = trainer.config.replace(log_interval=3, save_interval=5)
    trainer.train(buffer, total_steps=12)
    assert seen == [2, 4, 6, 9, 12]
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [4, 5, 10, 12]


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"device": "auto"}, {"weight_decay": 0.1}, {"updates_per_call": 3}],
    ids=lambda c: next(iter(c)),
)
def test_what_cannot_change_within_a_run_is_refused_and_changes_nothing(buffer, config, change):
    trainer, plain = toy(config), toy(config)
    plain.train(buffer, total_steps=4)
    trainer.train(buffer, total_steps=2)
    with pytest.raises(ConfigError, match=next(iter(change))):
        trainer.config = trainer.config.replace(**change)
    assert trainer.config == config
    trainer.train(buffer, total_steps=4)
    assert_same(trainer.state, plain.state)


def test_weight_decay_is_not_turned_off_within_a_run(buffer, config):
    trainer = toy(config.replace(weight_decay=0.1))
    trainer.train(buffer, total_steps=2)
    with pytest.raises(ConfigError, match="weight_decay"):
        trainer.config = trainer.config.replace(weight_decay=0.0)


SOME = {
    "total_steps": 6,
    "env_steps": 9,
    "eval_interval": 1,
    "eval_episodes": 3,
    "eval_at_start": True,
    "eval_at_end": False,
    "eval_greedy": True,
    "lr_schedule": "linear",
    "max_episode_steps": 100,
    "mesh": {"data": 1},
    "prefill": 3,
    "prefill_updates": 5,
    "prefill_policy": "correlated",
    "train_ratio": 3.0,
    "replay_capacity": 500,
    "remat": True,
    "replay_storage": "host",
    "latent_dtype": "bfloat16",
    "loop": "host",
    "skip_nonfinite": True,
    "weight_decay": 0.2,
    "seed": 1,
    "device": "auto",
    "updates_per_call": 2,
    "offline_updates": 1,
    "mix": 0.25,
    "mix_end": 0.75,
    "mix_updates": 5,
    "log_interval": 1,
    "save_interval": 3,
    **EFFECTIVE,
}


def test_every_setting_has_been_thought_of():
    assert SOME.keys() == {field.name for field in dataclasses.fields(TrainingConfig)}


@pytest.mark.parametrize("field", SOME)
def test_every_setting_takes_effect_or_is_refused(buffer, config, field):
    trainer = toy(config.replace(weight_decay=0.1))
    trainer.train(buffer, total_steps=2)
    old = trainer.config
    new = old.replace(**{field: SOME[field]})
    try:
        trainer.config = new
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = field
        assert trainer.config == new
        trainer.train(buffer, total_steps=3)
        assert trainer.step == 3
    assert field in refusal


@pytest.mark.parametrize("value", [None, {}, {"learning_rate": 0.1}, ToyConfig(), TrainingConfig])
def test_what_is_no_config_is_refused(config, value):
    trainer = toy(config)
    with pytest.raises(REFUSED):
        trainer.config = value
    assert trainer.config == config


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"learning_rate": 5e-2}, {"updates_per_call": 3}, {"weight_decay": 0.1}]
)
@pytest.mark.parametrize("read", [False, True], ids=["untouched", "state read"])
def test_before_the_first_update_a_change_is_that_of_a_new_trainer_or_refused(buffer, config, change, read):
    trainer, plain = toy(config), toy(config.replace(**change))
    if read:
        assert int(trainer.state.step) == 0
    try:
        trainer.config = config.replace(**change)
    except ConfigError:
        return
    plain.train(buffer, total_steps=3)
    trainer.train(buffer, total_steps=3)
    assert_same(trainer.state, plain.state)


def test_a_change_during_a_call_waits_for_the_next(buffer, config):
    plain = toy(config)
    plain.train(buffer, total_steps=4)

    class Impatient(Callback):
        every = 2

        def on_step(self, info):
            trainer.config = config.replace(learning_rate=5e-2)

    trace = Trace()
    trainer = toy(config, [Impatient(), trace])
    trainer.train(buffer, total_steps=4)
    assert_same(trainer.state, plain.state)
    trainer.train(buffer, total_steps=5)
    assert [rate for *_, rate in trace.rows] == [0.01] * 4 + [0.05]


def test_a_checkpoint_records_the_config_that_was_used(buffer, config, tmp_path):
    """Resumed with it, the run equals one that went on; with the first config, or another, it is refused."""
    second = config.replace(learning_rate=5e-2, batch_size=7)
    trainer = toy(config, run_of(tmp_path))
    trainer.train(buffer, total_steps=2)
    trainer.config = second
    trainer.train(buffer, total_steps=3)
    for wrong in (config, config.replace(learning_rate=5e-2), second.replace(grad_clip=3.0), second.replace(seed=8)):
        with pytest.raises(ConfigError):
            toy(wrong, run_of(tmp_path)).train(buffer, resume="auto")
    again = toy(second, run_of(tmp_path))
    again.train(buffer, total_steps=6, resume="auto")
    whole = toy(config)
    whole.train(buffer, total_steps=2)
    whole.config = second
    whole.train(buffer, total_steps=6)
    assert_same(again.state, whole.state)


def test_a_run_folder_records_the_config_that_was_used(buffer, config, tmp_path):
    run = RunFolder(tmp_path / "run")
    trainer = toy(config, run.callbacks(None, progress=False))
    trainer.train(buffer, total_steps=2)
    trainer.config = config.replace(learning_rate=5e-2)
    trainer.train(buffer, total_steps=3)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["training"]["learning_rate"] == 5e-2


def test_state_holds_arrays_only(buffer, config):
    state = toy(config).train(buffer, total_steps=1)
    assert isinstance(state, TrainState)
    assert list(vars(state)) == ["step", "params", "opt_state", "key"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


# --- Online ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(config):
    """A function (changes of the config) → trainer, trace, environment; an update takes 20 rows, one a decision."""
    envs = []

    def make(**changes):
        settings = config.replace(prefill=20, train_ratio=20.0, total_steps=1000, **changes)
        env = make_env(Walk, seed=1)
        envs.append(env)
        trace = Trace()
        model = ToyWorldModel(ToyConfig(action_dim=2, action_type="discrete"))
        return Trainer(model, settings, [trace]), trace, env

    yield make
    for env in envs:
        env.close()


def rates(rows, begin):
    """Updates at each number of environment steps, after update ``begin``."""
    counts = {}
    for step, env_steps, _ in rows:
        if step > begin:
            counts[env_steps] = counts.get(env_steps, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("changes", "per_step"),
    [
        ({"train_ratio": 80.0}, 4.0),
        ({"train_ratio": 5.0}, 0.25),
        ({"batch_size": 1}, 4.0),
        ({"batch_size": 16}, 0.25),
        ({"sequence_length": 2, "batch_size": 2}, 5.0),
        ({"learning_rate": 5e-2}, 1.0),
        ({"prefill": 1}, 1.0),
    ],
    ids=str,
)
def test_another_ratio_causes_no_burst_and_no_pause(online, changes, per_step):
    trainer, trace, env = online()
    trainer.train(env, total_steps=40)
    at = trace.rows[-1][1]
    trainer.config = trainer.config.replace(**changes)
    trainer.train(env, total_steps=80)
    counts = rates(trace.rows, 40)
    assert max(counts.values()) <= max(1, np.ceil(per_step)) + 1, counts
    done, steps = sum(counts.values()), max(counts) - at
    assert done == 40
    assert steps == pytest.approx(40 / per_step, abs=1 / min(per_step, 1) + 1)


def test_capacity_is_refused_online_once_there_is_a_buffer(online):
    trainer, _, env = online()
    trainer.train(env, total_steps=5)
    with pytest.raises(ConfigError, match="replay_capacity"):
        trainer.config = trainer.config.replace(replay_capacity=77)
    assert trainer.replay.capacity != 77


def test_a_rate_changed_online_is_in_the_checkpoint_and_resumes_bit_for_bit(config, tmp_path):
    def start(folder, settings):
        model = ToyWorldModel(ToyConfig(action_dim=2, action_type="discrete"))
        return Trainer(model, settings, [CheckpointCallback(str(tmp_path / folder))])

    first = config.replace(prefill=20, train_ratio=20.0, total_steps=1000)
    second = first.replace(learning_rate=5e-2, train_ratio=40.0)
    with make_env(Walk, seed=1) as env:
        whole = start("whole", first)
        whole.train(env, total_steps=10)
        whole.config = second
        whole.train(env, total_steps=20)
    with make_env(Walk, seed=1) as env:
        cut = start("cut", first)
        cut.train(env, total_steps=10)
        cut.config = second
        cut.train(env, total_steps=14)
    with make_env(Walk, seed=1) as env, pytest.raises(ConfigError, match=r"learning_rate|train_ratio"):
        start("cut", first).train(env, total_steps=20, resume="auto")
    with make_env(Walk, seed=1) as env:
        again = start("cut", second)
        again.train(env, total_steps=20, resume="auto")
    assert_same(again.state, whole.state)


def test_a_buffer_of_the_users_own_keeps_its_capacity(online):
    trainer, _, env = online()
    mine = ReplayBuffer(300, obs_shape=(2,), action_dim=2, action_type="discrete")
    trainer.train(env, total_steps=5, replay=mine)
    assert trainer.replay is mine
