"""Checkpoints: exact resume, damaged files, pruning, and runs that are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy_family import ToyConfig, ToyWorldModel, fill
from trees import assert_same

from worldloom import CheckpointError, ConfigError, FileFormatError, NonFiniteError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer
from worldloom.training import checkpoint_files as files
from worldloom.training.callbacks import (
    CheckpointCallback,
    EarlyStoppingCallback,
    EvalCallback,
    LoggingCallback,
)
from worldloom.training.checkpoint import Checkpointer, load_weights


def trainer_in(folder, config, held_out, means):
    callbacks = [
        CheckpointCallback(str(folder / "checkpoints"), save_every=10, keep_last=2),
        EarlyStoppingCallback(patience=1000, min_delta=0.0),
        EarlyStoppingCallback("eval/loss", patience=1000),
        EvalCallback(held_out, every=5, batches=2),
        (6, lambda info: means.append((info.step, dict(info.means)))),
        LoggingCallback(str(folder), log_to_console=False),
    ]
    return Trainer(ToyWorldModel(ToyConfig()), config, callbacks), callbacks


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "fps/update")} for line in lines]


def test_fields_that_an_older_version_did_not_have_are_at_their_defaults(buffer, held_out, config, tmp_path):
    trainer, _ = trainer_in(tmp_path, config, held_out, [])
    trainer.train(buffer, total_steps=10)
    folder = tmp_path / "checkpoints" / "10"
    record = files.read_record(folder)
    del record["config"]["noise"], record["training"]["lr_schedule"]
    files._write_json(folder / "run.json", record)
    files._write_json(folder / "manifest.json", {})
    files._write_json(folder / "manifest.json", {"files": dict(files.checksums(folder))})
    noisier = Trainer(ToyWorldModel(ToyConfig(noise=0.2)), config, [CheckpointCallback(str(folder.parent))])
    with pytest.raises(ConfigError, match=r"config noise=0\.1; this run has 0\.2"):
        noisier.train(buffer, resume="auto")
    changed, _ = trainer_in(tmp_path, config.replace(lr_schedule="linear"), held_out, [])
    with pytest.raises(ConfigError, match="lr_schedule='constant'"):
        changed.train(buffer, resume="auto")
    again, _ = trainer_in(tmp_path, config, held_out, [])
    again.train(buffer, total_steps=12, resume="auto")
    assert again.step == 12


def test_a_resumed_run_equals_an_uninterrupted_one(buffer, held_out, config, tmp_path):
    """20 steps, against 10 and 10 more by another trainer: weights, metrics, means across the stop, callback state."""
    whole_means, resumed_means = [], []
    whole, whole_callbacks = trainer_in(tmp_path / "whole", config, held_out, whole_means)
    whole.train(buffer)

    first, _ = trainer_in(tmp_path / "resumed", config, held_out, resumed_means)
    first.train(buffer, total_steps=10)
    second, callbacks = trainer_in(tmp_path / "resumed", config, held_out, resumed_means)
    second.train(buffer, resume="auto")

    assert_same(whole.state, second.state)
    assert resumed_means == whole_means
    assert [step for step, _ in resumed_means] == [6, 12, 18]
    for one, other in zip(callbacks, whole_callbacks, strict=True):
        if not isinstance(one, tuple):
            assert one.state_dict() == other.state_dict()
    # The resumed run has one more record, written when its first part ended.
    ends = [line for line in records(tmp_path / "resumed") if line["step"] == 10 and "train/loss" in line]
    assert len(ends) == 1
    assert [line for line in records(tmp_path / "resumed") if line not in ends] == records(tmp_path / "whole")


def test_a_new_process_resumes_bit_for_bit(buffer, config, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax, numpy as np
from toy_family import *
from worldloom.training import *
from worldloom.training.callbacks import *
from worldloom.training.checkpoint_files import flatten_state
folder, steps, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
config = TrainingConfig(batch_size=4, sequence_length=5, learning_rate=1e-2, device="cpu")
trainer = Trainer(ToyWorldModel(ToyConfig()), config, [CheckpointCallback(folder, save_every=5)])
state = trainer.train(fill(ReplayBuffer(10_000)), total_steps=steps, resume=resume)
np.savez(folder + ".npz", **flatten_state(state))
"""

    def run(*arguments):
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        subprocess.run(command, check=True, env=os.environ, timeout=300)

    run(tmp_path / "whole", 20, "begin")
    run(tmp_path / "resumed", 10, "begin")
    run(tmp_path / "resumed", 20, "resume")
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "resumed.npz") as resumed:
        assert sorted(whole.files) == sorted(resumed.files)
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], resumed[name])


@pytest.fixture
def saved(buffer, config, tmp_path):
    """Checkpoints of steps 5, 10 and 15 of one run."""
    callback = CheckpointCallback(str(tmp_path / "run"), save_every=5, keep_last=10, save_best=False)
    Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer, total_steps=15)
    return tmp_path / "run"


def resume(folder, buffer, config, **options):
    trainer = Trainer(ToyWorldModel(ToyConfig()), config, [CheckpointCallback(str(folder), save_every=5)])
    trainer.train(buffer, **{"total_steps": 15, "resume": True, **options})
    return trainer


def damage(path, how):
    data = path.read_bytes()
    if how == "flipped byte":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped byte", "truncated", "missing"])
@pytest.mark.parametrize("what", ["run.json", "manifest.json", "largest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(saved, buffer, config, how, what):
    files = [path for path in (saved / "15").rglob("*") if path.is_file()]
    damage(max(files, key=lambda p: p.stat().st_size) if what == "largest" else saved / "15" / what, how)
    with pytest.warns(UserWarning, match=r"/15.* Going back to the checkpoint before it"):
        trainer = resume(saved, buffer, config, total_steps=10)
    assert trainer.step == 10


def test_any_damaged_file_is_noticed(saved, buffer, config):
    """Damage to any file of the newest checkpoint makes a resume fall back to the previous one."""
    run = Trainer(ToyWorldModel(ToyConfig()), config, []).run
    for path in sorted(p for p in (saved / "15").rglob("*") if p.is_file()):
        data = path.read_bytes()
        damage(path, "flipped byte" if data else "missing")
        with pytest.warns(UserWarning, match="Going back"):
            assert Checkpointer(saved).restore(run.state, run.identity()).step == 10
        path.write_bytes(data)
    assert Checkpointer(saved).restore(run.state, run.identity()).step == 15


def test_a_resume_fails_if_no_checkpoint_can_be_read(saved, buffer, config):
    for step in (5, 10, 15):
        (saved / str(step) / "run.json").unlink()
    with (
        pytest.warns(UserWarning, match="Going back"),
        pytest.raises(CheckpointError, match=r"No checkpoint in .* can be read"),
    ):
        resume(saved, buffer, config, resume="auto")


def test_resume_accepts_a_folder_a_checkpoint_auto_and_true(saved, buffer, config, tmp_path):
    assert resume(saved, buffer, config, resume=saved / "10", total_steps=10).step == 10
    elsewhere = Trainer(ToyWorldModel(ToyConfig()), config, [])
    elsewhere.train(buffer, total_steps=16, resume=str(saved))
    assert elsewhere.step == 16
    new = resume(tmp_path / "new", buffer, config, resume="auto", total_steps=2)
    assert new.step == 2
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        resume(tmp_path / "newer", buffer, config, resume=True)
    with pytest.raises(ConfigError, match="needs a CheckpointCallback"):
        Trainer(ToyWorldModel(ToyConfig()), config, []).train(buffer, resume=True)


def test_orbax_can_read_the_layout(saved):
    manager = ocp.CheckpointManager(saved)
    assert list(manager.all_steps()) == [5, 10, 15]
    manager.close()


def test_checkpoints_of_another_run_are_not_overwritten(saved, buffer, config):
    with pytest.raises(CheckpointError, match=r"another run, up to step 15.*resume='auto'"):
        resume(saved, buffer, config, resume=False)
    assert Checkpointer(saved).steps() == [5, 10, 15]


def test_a_trainer_continues_in_its_own_folder(buffer, config, tmp_path):
    callback = CheckpointCallback(str(tmp_path), save_every=5)
    trainer = Trainer(ToyWorldModel(ToyConfig()), config, [callback])
    trainer.train(buffer, total_steps=5)
    trainer.train(buffer, total_steps=10)
    assert callback.checkpointer.steps() == [5, 10]


@pytest.mark.parametrize(
    ("model_changes", "training_changes", "field"),
    [({"noise": 0.2}, {}, "noise=0.1"), ({}, {"batch_size": 8}, "batch_size=4"), ({}, {"seed": 1}, "seed=42")],
)
def test_another_config_is_refused(saved, buffer, config, model_changes, training_changes, field):
    model = ToyWorldModel(ToyConfig(**model_changes))
    with pytest.raises(ConfigError, match=field):
        Trainer(model, config.replace(**training_changes), []).train(buffer, resume=saved)


def test_settings_that_do_not_affect_results_may_change(saved, buffer, config):
    trainer = Trainer(ToyWorldModel(ToyConfig()), config.replace(log_interval=7, updates_per_call=3), [])
    trainer.train(buffer, total_steps=16, resume=saved)
    assert trainer.step == 16


def test_a_resume_with_other_data_logs_a_warning(saved, config, caplog):
    Trainer(ToyWorldModel(ToyConfig()), config, []).train(fill(ReplayBuffer(999), episodes=3), resume=saved)
    assert "its batches will not be the same" in caplog.text


def test_the_newest_and_the_best_checkpoints_are_kept(buffer, config, tmp_path):
    values = iter([3.0, 1.0, 2.0, 5.0, 4.0])

    def measure(info):
        return {"eval/score_to_lower": next(values)}

    callback = CheckpointCallback(str(tmp_path), save_every=4, keep_last=2, monitor="eval/score_to_lower", mode="min")
    Trainer(ToyWorldModel(ToyConfig()), config, [(4, measure), callback]).train(buffer)
    assert callback.checkpointer.steps() == [8, 16, 20]
    assert callback.best == tmp_path / "8"
    assert callback.latest == tmp_path / "20"
    model = ToyWorldModel(ToyConfig(), seed=1)
    assert load_weights(model, tmp_path, "best") == 8
    again = ToyWorldModel(ToyConfig())
    Trainer(again, config, []).train(buffer, total_steps=8)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert load_weights(model, tmp_path) == 20
    with pytest.raises(CheckpointError, match="no checkpoint of step 12"):
        load_weights(model, tmp_path, 12)


def test_values_of_another_monitor_are_not_compared(buffer, config, tmp_path):
    """A resumed run with another monitor does not keep the checkpoint that was best by the first one."""
    low = lambda info: {"eval/low": float(info.step)}  # noqa: E731
    high = lambda info: {"eval/high": 1000.0 - info.step}  # noqa: E731
    first = CheckpointCallback(str(tmp_path), save_every=4, keep_last=1, monitor="eval/low")
    Trainer(ToyWorldModel(ToyConfig()), config, [(4, low), first]).train(buffer, total_steps=8)
    assert first.best == tmp_path / "4"
    second = CheckpointCallback(str(tmp_path), save_every=4, keep_last=1, monitor="eval/high")
    Trainer(ToyWorldModel(ToyConfig()), config, [(4, high), second]).train(buffer, resume=True)
    assert second.best == tmp_path / "20"
    assert load_weights(ToyWorldModel(ToyConfig()), tmp_path, "best") == 20


def test_the_best_checkpoint_is_chosen_by_means_over_the_interval(buffer, config, tmp_path):
    means = {}
    callback = CheckpointCallback(str(tmp_path), save_every=5, keep_last=1, monitor="first_row")
    record_means = (5, lambda info: means.update({info.step: info.means["first_row"]}))
    Trainer(ToyWorldModel(ToyConfig()), config, [record_means, callback]).train(buffer)
    best = min(means, key=means.get)
    assert callback.checkpointer.steps() == sorted({best, 20})
    record = json.loads((tmp_path / str(best) / "run.json").read_text())
    assert record["value"] == means[best]


def test_a_single_checkpoint_is_kept_without_save_best(buffer, config, tmp_path):
    callback = CheckpointCallback(str(tmp_path), save_every=5, keep_last=1, save_best=False)
    Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer)
    assert [path.name for path in tmp_path.iterdir()] == ["20"]


def test_an_unwritable_folder_is_refused_before_training(buffer, config, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = Trainer(ToyWorldModel(ToyConfig()), config, [CheckpointCallback(str(tmp_path / "file" / "run"))])
    with pytest.raises(CheckpointError, match="cannot be written"):
        trainer.train(buffer)
    assert trainer.step == 0


def test_a_failed_write_is_a_warning_and_leaves_earlier_checkpoints(buffer, config, tmp_path, monkeypatch):
    """The disk is full from step 10 to step 15."""
    import worldloom.training.checkpoint_files as files

    save = files._save_arrays

    def full(path, arrays):
        if arrays["step"] in (10, 15):
            raise OSError(28, "No space left on device")
        save(path, arrays)

    monkeypatch.setattr(files, "_save_arrays", full)
    callback = CheckpointCallback(str(tmp_path), save_every=5, keep_last=1)
    with pytest.warns(UserWarning, match="step 1[05] could not be written.*No space left.*checkpoints are unchanged"):
        Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer)
    assert callback.checkpointer.steps()[-1] == 20
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_final_write_is_an_error(buffer, config, tmp_path, monkeypatch):
    import worldloom.training.checkpoint_files as files

    def full(path, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_save_arrays", full)
    model = ToyWorldModel(ToyConfig())
    trainer = Trainer(model, config, [CheckpointCallback(str(tmp_path))])
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.train(buffer)
    jax.tree.map(np.testing.assert_array_equal, model.params, trainer.state.params)


def test_partial_checkpoints_of_a_killed_process_are_deleted(buffer, config, tmp_path):
    (tmp_path / "7.partial" / "state").mkdir(parents=True)
    callback = CheckpointCallback(str(tmp_path), save_every=10)
    Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer, resume="auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_a_nonfinite_loss_names_the_last_good_checkpoint_and_keeps_it(config, tmp_path):
    source = fill(ReplayBuffer(10_000), episodes=20, poison=6)
    seeded = [config.replace(seed=seed) for seed in range(99)]

    def first_bad_step(c):
        bad = (source.sample(4, 5, seed=c.seed, update=n)["rewards"].max() > 1e29 for n in range(9))
        return next((n + 1 for n, is_bad in enumerate(bad) if is_bad), 99)

    chosen = next(c for c in seeded if 3 < first_bad_step(c) < 9)
    callback = CheckpointCallback(str(tmp_path), save_every=1, keep_last=1, save_best=False)
    with pytest.raises(NonFiniteError, match=rf"The last good checkpoint is .*{first_bad_step(chosen) - 1}\."):
        Trainer(ToyWorldModel(ToyConfig()), chosen, [callback]).train(source)
    assert callback.checkpointer.steps() == [first_bad_step(chosen) - 1]
    load_weights(ToyWorldModel(ToyConfig()), tmp_path)


def test_loading_weights_verifies_checksums(saved):
    damage(saved / "15" / "run.json", "flipped byte")
    with pytest.raises(FileFormatError, match=r"run\.json is damaged"):
        load_weights(ToyWorldModel(ToyConfig()), saved)


def test_an_unknown_monitor_is_refused(buffer, config, tmp_path):
    callback = CheckpointCallback(str(tmp_path), save_every=4, monitor="predictoin")
    with pytest.raises(ConfigError, match="Did you mean 'prediction'"):
        Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer)


def test_save_interval_applies_if_save_every_is_omitted(buffer, config, tmp_path):
    """``TrainingConfig.save_interval`` = 0 saves only at the end."""
    often = CheckpointCallback(str(tmp_path / "often"), keep_last=9)
    Trainer(ToyWorldModel(ToyConfig()), config.replace(save_interval=8), [often]).train(buffer)
    assert often.checkpointer.steps() == [8, 16, 20]
    once = CheckpointCallback(str(tmp_path / "once"))
    Trainer(ToyWorldModel(ToyConfig()), config.replace(save_interval=0), [once]).train(buffer)
    assert once.checkpointer.steps() == [20]
