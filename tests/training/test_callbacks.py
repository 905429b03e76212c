"""The built-in callbacks: logs, evaluation, early stopping, progress bar."""

import itertools
import json
import math
import re
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from toy_family import ToyConfig, ToyWorldModel

from worldloom import ConfigError
from worldloom.errors import DataError, MissingDependencyError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, evaluate
from worldloom.training.callbacks import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    EvalCallback,
    LoggingCallback,
    ProgressCallback,
    StopTraining,
    every,
    progress,
)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder):
    """{tag: [(step, value)]} of the TensorBoard events in ``folder``, read without TensorBoard."""
    values = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            # A TFRecord: length, its checksum, the event, its checksum.
            length = int.from_bytes(data[offset : offset + 8], "little")
            event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
            offset += 12 + length + 4
            for value in event.summary.value:
                values.setdefault(value.tag, []).append((event.step, value.simple_value))
    return values


def test_the_log_records_means_under_documented_names(model, buffer, config, held_out, tmp_path, capsys):
    means = []
    callbacks = [
        LoggingCallback(str(tmp_path), log_to_tensorboard=True),
        EvalCallback(held_out, every=10, batches=2),
        (4, lambda info: means.append(info.means["loss"])),
    ]
    Trainer(model, config, callbacks).train(buffer)
    trained = [line for line in lines(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in trained] == [4, 8, 12, 16, 20]
    assert [line["train/loss"] for line in trained] == means
    position = {"step", "env_steps", "time"}
    expected = position | {"train/loss", "train/loss/prediction", "train/loss/reward", "train/grad_norm"}
    expected |= {"train/lr", "train/update_norm", "train/first_row", "fps/update", "replay/size"}
    assert set(trained[0]) == expected
    assert trained[0]["replay/size"] == len(buffer)
    assert trained[-1]["fps/update"] > 0
    evaluated = [line for line in lines(tmp_path) if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [10, 20]
    assert set(evaluated[0]) == position | {"eval/loss", "eval/loss/prediction", "eval/loss/reward"}
    assert {line["env_steps"] for line in evaluated} == {0}
    events = scalars(tmp_path)
    assert set(events) == (expected | set(evaluated[0])) - position
    assert events["train/loss"] == [(line["step"], np.float32(line["train/loss"])) for line in trained]
    console = capsys.readouterr().out
    assert "step 4/20  loss " in console
    assert "eval/loss " in console


def test_without_a_folder_nothing_is_written(model, buffer, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Trainer(model, config).train(buffer)
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert "step 20/20" in captured.out
    assert "training: 20 of 20 updates" in captured.err


def test_tensorboard_needs_a_folder():
    with pytest.raises(ConfigError, match=r"log_dir='./logs'"):
        LoggingCallback(log_to_tensorboard=True)


def test_a_new_run_renames_an_existing_log(buffer, config, tmp_path):
    for _ in range(3):
        Trainer(
            ToyWorldModel(ToyConfig()), config.replace(total_steps=4), [LoggingCallback(str(tmp_path), False)]
        ).train(buffer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.1.jsonl",
        "metrics.2.jsonl",
        "metrics.jsonl",
    ]


def test_a_resumed_log_drops_records_after_the_checkpoint(buffer, config, tmp_path):
    def trainer(*more):
        callbacks = [
            LoggingCallback(str(tmp_path / "log"), False, True),
            CheckpointCallback(str(tmp_path / "run"), save_every=8),
        ]
        return Trainer(ToyWorldModel(ToyConfig()), config, [*callbacks, *more])

    def power_cut(info):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        trainer((15, power_cut)).train(buffer)
    with (tmp_path / "log" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "train/lo')
    assert [line["step"] for line in complete_lines(tmp_path / "log")] == [4, 8, 12]
    trainer().train(buffer, resume=True)
    assert [line["step"] for line in lines(tmp_path / "log")] == [4, 8, 12, 16, 20]


def complete_lines(folder):
    """All lines but the last, which is incomplete."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_nonfinite_values_are_logged_as_valid_json(model, buffer, config, tmp_path):
    callbacks = [(4, lambda info: {"eval/ratio": math.nan}), LoggingCallback(str(tmp_path), False)]
    Trainer(model, config.replace(total_steps=4), callbacks).train(buffer)
    strict = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert strict[0]["eval/ratio"] is None


@pytest.mark.parametrize("value", [np.float32(1.5), np.array(1.5), jnp.float32(1.5), 1.5])
def test_numbers_of_any_kind_are_measurements(model, buffer, config, tmp_path, value):
    folder, received = tmp_path / "saved", []

    class Recorder(Callback):
        def on_eval(self, info, measurements):
            received.append(measurements)

    callbacks = [(4, lambda info: {"eval/x": value}), Recorder(), LoggingCallback(str(tmp_path), False)]
    callbacks.append(CheckpointCallback(str(folder), save_every=4, monitor="eval/x"))
    Trainer(model, config.replace(total_steps=8), callbacks).train(buffer)
    assert received == [{"eval/x": 1.5}, {"eval/x": 1.5}]
    assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == ["4", "8"]


def test_measurements_that_are_not_numbers_are_refused(model, buffer, config):
    with pytest.raises(TypeError, match="measurements are numbers"):
        Trainer(model, config, [(4, lambda info: {"eval/x": "high"})]).train(buffer)


def test_held_out_data_that_does_not_fit_is_refused_before_training(model, buffer, config):
    short = ReplayBuffer(100)
    short.add_episode(np.zeros((2, 3), np.float32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32))
    trainer = Trainer(model, config.replace(sequence_length=4), [EvalCallback(short, every=10)])
    with pytest.raises(DataError):
        trainer.train(buffer)
    assert trainer.step == 0
    Trainer(model, config.replace(eval_interval=0, total_steps=2), [EvalCallback(short)]).train(buffer)


def test_evaluation_is_reproducible_and_does_not_change_training(model, buffer, config, held_out):
    published = []

    class Recorder(Callback):
        def on_eval(self, info, measurements):
            published.append((info.step, dict(measurements)))
            assert info.measurements["eval/loss"] == measurements["eval/loss"]

    trainer = Trainer(model, config.replace(eval_interval=10), [EvalCallback(held_out, batches=3), Recorder()])
    trainer.train(buffer)
    assert [step for step, _ in published] == [10, 20]
    again = trainer.evaluate(held_out, batches=3)
    assert {f"eval/loss/{k}" if k != "loss" else "eval/loss": v for k, v in again.items()} == published[-1][1]
    unevaluated = ToyWorldModel(ToyConfig())
    Trainer(unevaluated, config, []).train(buffer)
    np.testing.assert_array_equal(unevaluated.params["dynamics"]["kernel"], model.params["dynamics"]["kernel"])


def test_evaluate_averages_the_loss_terms(model, held_out, config):
    terms = evaluate(model, held_out, config, batches=4, seed=3)
    batches = [held_out.sample(4, 5, seed=3, update=number) for number in range(4)]
    for name, value in terms.items():
        of_batches = []
        for batch in batches:
            batch.pop("row_ids", None)
            of_batches.append(float(model.compute_loss(batch)[name]))
        assert value == pytest.approx(np.mean(of_batches), rel=1e-6)
    assert list(terms) == ["loss", "prediction", "reward"]
    assert terms == evaluate(model, held_out, batches=4, seed=3, batch_size=4, sequence_length=5)


def test_eval_interval_zero_means_never(model, buffer, config, held_out):
    steps = []

    class Recorder(Callback):
        def on_eval(self, info, measurements):
            steps.append(info.step)

    Trainer(model, config.replace(eval_interval=0), [EvalCallback(held_out), Recorder()]).train(buffer)
    assert steps == []


def publish(values):
    """A callback that publishes these values, one every two steps, repeating the last one."""
    stream = itertools.chain(values, itertools.repeat(values[-1]))
    return (2, lambda info: {"eval/score": next(stream)})


@pytest.mark.parametrize(
    ("mode", "values", "stop"),
    [
        ("min", [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 1.0], 12),  # best at 6, patience until 12
        ("max", [5.0, 6.0, 5.0, 5.5, 5.9, 9.0], 10),  # best at 4
        ("min", [5.0, 4.95, 4.93, 4.92], 8),  # changes below min_delta are no improvement: best at 2
        ("min", [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], None),
    ],
)
def test_early_stopping_waits_for_patience(model, buffer, config, mode, values, stop):
    callback = EarlyStoppingCallback("eval/score", patience=6, min_delta=0.1, mode=mode)
    trainer = Trainer(model, config, [callback, publish(values)])
    trainer.train(buffer)
    assert trainer.step == (stop or 20)
    assert (trainer.stop_reason is None) == (stop is None)
    if stop:
        assert f"eval/score has not improved for {stop - callback.best_step} steps" in trainer.stop_reason


def test_early_stopping_on_a_training_metric(model, buffer, config):
    callback = EarlyStoppingCallback("lr", patience=6)
    trainer = Trainer(model, config.replace(log_interval=2), [callback])
    trainer.train(buffer)
    assert trainer.step == 8  # the constant is best at the first comparison, step 2
    assert callback.best == pytest.approx(0.01)


def test_patience_survives_a_resume(buffer, config, tmp_path):
    def trainer():
        stopping = EarlyStoppingCallback("lr", patience=10)
        callbacks = [stopping, CheckpointCallback(str(tmp_path), save_every=6, save_best=False)]
        return Trainer(ToyWorldModel(ToyConfig()), config.replace(log_interval=2), callbacks)

    trainer().train(buffer, total_steps=6)
    second = trainer()
    second.train(buffer, resume=True)
    assert second.step == 12


@pytest.mark.parametrize("name", ["los", "train/loss/predicton", "eval/loss"])
def test_an_unknown_monitor_is_refused_at_the_first_comparison(model, buffer, config, name):
    advice = "need an EvalCallback" if name.startswith("eval") else "Did you mean"
    trainer = Trainer(model, config, [EarlyStoppingCallback(name)])
    with pytest.raises(ConfigError, match=f"monitor='{name}' is not a metric of this run.*{advice}"):
        trainer.train(buffer)
    assert trainer.step == 4


def test_an_unknown_measurement_is_refused_once_its_group_is_published(model, buffer, config, held_out):
    callbacks = [EarlyStoppingCallback("eval/lss"), EvalCallback(held_out, every=8)]
    trainer = Trainer(model, config, callbacks)
    with pytest.raises(ConfigError, match="Did you mean 'eval/loss'"):
        trainer.train(buffer)
    assert trainer.step == 8


def test_a_monitor_waits_for_its_first_measurement_while_others_are_published(model, buffer, config, held_out):
    """Online, returns of collected episodes are published long before the first evaluation."""
    callback = EarlyStoppingCallback("eval/loss", patience=100)
    others = [(4, lambda info: {"collect/return": 1.0}), EvalCallback(held_out, every=16)]
    Trainer(model, config, [callback, *others]).train(buffer)
    assert callback.best is not None


@pytest.mark.parametrize("name", ["prediction", "train/loss/prediction", "grad_norm"])
def test_monitors_accept_metric_names_and_tags(model, buffer, config, name):
    callback = EarlyStoppingCallback(name)
    Trainer(model, config, [callback]).train(buffer)
    assert callback.best is not None


def test_invalid_settings_are_refused():
    for make in (
        lambda: EarlyStoppingCallback(patience=0),
        lambda: EarlyStoppingCallback(min_delta=-1.0),
        lambda: EarlyStoppingCallback(mode="smallest"),
        lambda: CheckpointCallback("x", save_every=0),
        lambda: CheckpointCallback("x", keep_last=0),
        lambda: EvalCallback(None, every=0),
        lambda: every(0, print),
    ):
        with pytest.raises(ConfigError):
            make()


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal."""
    monkeypatch.setattr(progress, "_shows_bars", lambda: True)


def test_progress_starts_at_the_step_of_a_continued_run(buffer, config, model, capsys, terminal):
    trainer = Trainer(model, config, [ProgressCallback("fitting")])
    trainer.train(buffer, total_steps=10)
    trainer.train(buffer)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "fitting:  50%" in shown
    assert "20/20" in shown


def test_a_plain_function_may_stop_training(model, buffer, config):
    trainer = Trainer(model, config, [(3, lambda info: StopTraining("enough") if info.step >= 6 else None)])
    trainer.train(buffer)
    assert trainer.step == 6
    assert trainer.stop_reason.endswith(": enough")


def test_progress_measures_speed_from_the_first_update_on(buffer, config, model, capsys, terminal):
    """The time before it, for collecting and compiling, is labelled and does not affect the remaining time."""
    waiting = every(1, lambda info: time.sleep(1.0 if info.step == 1 else 0.0))
    Trainer(model, config, [waiting, ProgressCallback("fitting")]).train(buffer)
    shown = capsys.readouterr().err
    assert "compiling" in shown
    first = next(line for line in shown.split("\r") if "| 1/20" in line)
    assert "loss " in first
    assert "? updates/s" in first


def test_a_bar_shows_that_time_goes_by_before_the_first_update(capsys):
    bar = progress._Bar("fitting", 0, 10)
    bar.wait("compiling")
    time.sleep(2.5)
    bar.close()
    assert re.search(r"00:0[12]<\?.*compiling", capsys.readouterr().err)


def test_a_file_gets_a_line_at_the_beginning_and_the_end_and_every_30_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress._Lines("fitting", 0, 1_200)
    lines.wait("compiling")
    for step in range(1, 1_201):
        now[0] += 0.125
        if lines.is_due() or step == 1_200:
            lines.show(step, ["loss 1"], last=step == 1_200)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert shown.splitlines() == [
        "fitting: 0 of 1,200 updates, compiling",
        "fitting: 240 of 1,200 updates, 8 updates/s, 2 min left, loss 1",
        "fitting: 480 of 1,200 updates, 8 updates/s, 2 min left, loss 1",
        "fitting: 720 of 1,200 updates, 8 updates/s, 60 s left, loss 1",
        "fitting: 960 of 1,200 updates, 8 updates/s, 30 s left, loss 1",
        "fitting: 1,200 of 1,200 updates, 8 updates/s, loss 1",
    ]


def test_training_into_a_file_writes_few_lines(buffer, config, model, capsys):
    Trainer(model, config, [ProgressCallback()]).train(buffer)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "training: 0 of 20 updates, compiling"
    assert re.fullmatch(r"training: 20 of 20 updates, \S+ updates/s, loss \S+", last)


def wandb_records(path):
    """The records of an offline run: protocol buffers in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left  # A block ends with padding where no header fits.
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + size > len(data):
            return  # It is still being written.
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # A whole record, or its last part.
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(file):
    """The rows that were logged, and the run's settings."""
    found, settings = [], {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
        if record.WhichOneof("record_type") == "run":
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return found, settings


@pytest.mark.parametrize("own_run", [False, True])
def test_records_go_to_wandb_in_its_offline_mode(model, buffer, config, tmp_path, monkeypatch, own_run):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    begun = wandb.init(dir=tmp_path, project="mine") if own_run else None
    callback = LoggingCallback(str(tmp_path), log_to_console=False, log_to_wandb=True)
    Trainer(model, config, [callback]).train(buffer)
    assert (wandb.run is begun) or not own_run, "A run of the user's stays open."
    if begun is not None:
        begun.finish()
    assert wandb.run is None
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (file,) = tmp_path.rglob("*.wandb")
    # The file is written by a process of wandb's own, on a busy machine after ``finish`` has returned.
    end = time.monotonic() + 60
    found, settings = history(file)
    while len(found) < len(written) and time.monotonic() < end:
        time.sleep(0.2)
        found, settings = history(file)
    assert [row["step"] for row in found] == [line["step"] for line in written] == [4, 8, 12, 16, 20]
    assert [row["train/loss"] for row in found] == [line["train/loss"] for line in written]
    if not own_run:
        assert settings["training"]["batch_size"] == config.batch_size
        assert settings["model"]["model_type"] == "toy"


def test_wandb_that_is_not_installed_is_named_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"worldloom\[wandb\]"):
        LoggingCallback(log_to_wandb=True)


@pytest.mark.parametrize("every", [0, 4])
def test_a_callback_that_follows_every_call_is_called_once_at_each(model, buffer, config, every):
    class Follower(Callback):
        after_every_call = True

        def __init__(self):
            self.every, self.steps = every, []

        def on_step(self, info):
            self.steps.append(info.step)

    follower = Follower()
    Trainer(model, config.replace(updates_per_call=5), [follower]).train(buffer)
    assert follower.steps == ([5, 10, 15, 20] if every == 0 else [4, 5, 8, 10, 12, 15, 16, 20])
