"""Nothing is lost: exact resume, damaged files, what is kept, and what is refused."""

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

from worldloom import CheckpointError, ConfigError, FileFormatError, NonFiniteError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer
from worldloom.training.callbacks import (
    CheckpointCallback,
    EarlyStoppingCallback,
    EvalCallback,
    LoggingCallback,
)
from worldloom.training.checkpoint import Checkpointer, load_weights


def leaves(state):
    arrays = (state.step, state.params, state.opt_state, jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)]


def assert_same(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


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


def test_a_resumed_run_equals_one_that_was_never_stopped(buffer, held_out, config, tmp_path):
    """20 steps against 10 and 10 more by another trainer: weights, metrics, means across the cut, callback state."""
    whole_means, cut_means = [], []
    whole, whole_callbacks = trainer_in(tmp_path / "whole", config, held_out, whole_means)
    whole.train(buffer)

    first, _ = trainer_in(tmp_path / "cut", config, held_out, cut_means)
    first.train(buffer, total_steps=10)
    second, callbacks = trainer_in(tmp_path / "cut", config, held_out, cut_means)
    second.train(buffer, resume="auto")

    assert_same(whole.state, second.state)
    assert cut_means == whole_means
    assert [step for step, _ in cut_means] == [6, 12, 18]
    for one, other in zip(callbacks, whole_callbacks, strict=True):
        if not isinstance(one, tuple):
            assert one.state_dict() == other.state_dict()
    # The cut run has written one record more: that of its first end.
    ends = [line for line in records(tmp_path / "cut") if line["step"] == 10 and "train/loss" in line]
    assert len(ends) == 1
    assert [line for line in records(tmp_path / "cut") if line not in ends] == records(tmp_path / "whole")


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
        subprocess.run([sys.executable, "-W", "error", "-c", code, *map(str, arguments)], check=True, env=os.environ)

    run(tmp_path / "whole", 20, "fresh")
    run(tmp_path / "cut", 10, "fresh")
    run(tmp_path / "cut", 20, "resume")
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "cut.npz") as cut:
        assert sorted(whole.files) == sorted(cut.files)
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], cut[name])


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
    """Each file of the newest checkpoint in turn: an earlier good state, never a wrong one."""
    run = Trainer(ToyWorldModel(ToyConfig()), config, []).run
    for path in sorted(p for p in (saved / "15").rglob("*") if p.is_file()):
        data = path.read_bytes()
        damage(path, "flipped byte" if data else "missing")
        with pytest.warns(UserWarning, match="Going back"):
            assert Checkpointer(saved).restore(run.state, run.identity()).step == 10
        path.write_bytes(data)
    assert Checkpointer(saved).restore(run.state, run.identity()).step == 15


def test_when_none_is_left_it_says_so(saved, buffer, config):
    for step in (5, 10, 15):
        (saved / str(step) / "run.json").unlink()
    with (
        pytest.warns(UserWarning, match="Going back"),
        pytest.raises(CheckpointError, match=r"No checkpoint in .* can be read"),
    ):
        resume(saved, buffer, config, resume="auto")


def test_resume_names_a_folder_a_step_or_nothing(saved, buffer, config, tmp_path):
    assert resume(saved, buffer, config, resume=saved / "10", total_steps=10).step == 10
    elsewhere = Trainer(ToyWorldModel(ToyConfig()), config, [])
    elsewhere.train(buffer, total_steps=16, resume=str(saved))
    assert elsewhere.step == 16
    fresh = resume(tmp_path / "new", buffer, config, resume="auto", total_steps=2)
    assert fresh.step == 2
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        resume(tmp_path / "newer", buffer, config, resume=True)
    with pytest.raises(ConfigError, match="needs a CheckpointCallback"):
        Trainer(ToyWorldModel(ToyConfig()), config, []).train(buffer, resume=True)


def test_the_layout_is_one_that_orbax_reads(saved):
    manager = ocp.CheckpointManager(saved)
    assert list(manager.all_steps()) == [5, 10, 15]
    manager.close()


def test_another_run_is_not_overwritten(saved, buffer, config):
    with pytest.raises(CheckpointError, match=r"another run, up to step 15.*resume='auto'"):
        resume(saved, buffer, config, resume=False)
    assert Checkpointer(saved).steps() == [5, 10, 15]


def test_the_same_trainer_goes_on_in_its_folder(buffer, config, tmp_path):
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


def test_settings_that_move_no_number_may_change(saved, buffer, config):
    trainer = Trainer(ToyWorldModel(ToyConfig()), config.replace(log_interval=7, updates_per_call=3), [])
    trainer.train(buffer, total_steps=16, resume=saved)
    assert trainer.step == 16


def test_other_data_are_remarked_on(saved, config, caplog):
    Trainer(ToyWorldModel(ToyConfig()), config, []).train(fill(ReplayBuffer(999), episodes=3), resume=saved)
    assert "its batches will not be the same" in caplog.text


def test_keep_last_and_the_best(buffer, config, tmp_path):
    """The best by the mean over the interval stays beside the newest; nothing else does."""
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
    """A run goes on and is judged by something else from there: what was best before is so no more."""
    low = lambda info: {"eval/low": float(info.step)}  # noqa: E731
    high = lambda info: {"eval/high": 1000.0 - info.step}  # noqa: E731
    first = CheckpointCallback(str(tmp_path), save_every=4, keep_last=1, monitor="eval/low")
    Trainer(ToyWorldModel(ToyConfig()), config, [(4, low), first]).train(buffer, total_steps=8)
    assert first.best == tmp_path / "4"
    second = CheckpointCallback(str(tmp_path), save_every=4, keep_last=1, monitor="eval/high")
    Trainer(ToyWorldModel(ToyConfig()), config, [(4, high), second]).train(buffer, resume=True)
    assert second.best == tmp_path / "20"
    assert load_weights(ToyWorldModel(ToyConfig()), tmp_path, "best") == 20


def test_the_best_is_judged_by_means_not_by_single_batches(buffer, config, tmp_path):
    means = {}
    callback = CheckpointCallback(str(tmp_path), save_every=5, keep_last=1, monitor="first_row")
    watch = (5, lambda info: means.update({info.step: info.means["first_row"]}))
    Trainer(ToyWorldModel(ToyConfig()), config, [watch, callback]).train(buffer)
    best = min(means, key=means.get)
    assert callback.checkpointer.steps() == sorted({best, 20})
    record = json.loads((tmp_path / str(best) / "run.json").read_text())
    assert record["value"] == means[best]


def test_keep_last_one_without_best(buffer, config, tmp_path):
    callback = CheckpointCallback(str(tmp_path), save_every=5, keep_last=1, save_best=False)
    Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer)
    assert [path.name for path in tmp_path.iterdir()] == ["20"]


def test_a_folder_that_cannot_be_written_stops_before_any_work(buffer, config, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = Trainer(ToyWorldModel(ToyConfig()), config, [CheckpointCallback(str(tmp_path / "file" / "run"))])
    with pytest.raises(CheckpointError, match="cannot be written"):
        trainer.train(buffer)
    assert trainer.step == 0


def test_a_write_that_fails_is_reported_and_what_was_saved_stays(buffer, config, tmp_path, monkeypatch):
    """As on a full disk, from step 10 to step 15."""
    import worldloom.training.checkpoint_files as files

    save = files._save_arrays

    def full(path, arrays):
        if arrays["step"] in (10, 15):
            raise OSError(28, "No space left on device")
        save(path, arrays)

    monkeypatch.setattr(files, "_save_arrays", full)
    callback = CheckpointCallback(str(tmp_path), save_every=5, keep_last=1)
    with pytest.warns(UserWarning, match="step 1[05] could not be written.*No space left.*as they were"):
        Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer)
    assert callback.checkpointer.steps()[-1] == 20
    assert not list(tmp_path.glob("*.partial"))


def test_a_last_write_that_fails_is_an_error(buffer, config, tmp_path, monkeypatch):
    import worldloom.training.checkpoint_files as files

    def full(path, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_save_arrays", full)
    model = ToyWorldModel(ToyConfig())
    trainer = Trainer(model, config, [CheckpointCallback(str(tmp_path))])
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.train(buffer)
    jax.tree.map(np.testing.assert_array_equal, model.params, trainer.state.params)


def test_leftovers_of_a_killed_write_are_cleared(buffer, config, tmp_path):
    (tmp_path / "7.partial" / "state").mkdir(parents=True)
    callback = CheckpointCallback(str(tmp_path), save_every=10)
    Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer, resume="auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_a_bad_loss_names_the_last_good_checkpoint_and_leaves_it(config, tmp_path):
    source = fill(ReplayBuffer(10_000), episodes=20, poison=6)
    seeded = [config.replace(seed=seed) for seed in range(99)]

    def bad(c):
        draws = (source.sample(4, 5, seed=c.seed, update=n)["rewards"].max() > 1e29 for n in range(9))
        return next((n + 1 for n, poisoned in enumerate(draws) if poisoned), 99)

    chosen = next(c for c in seeded if 3 < bad(c) < 9)
    callback = CheckpointCallback(str(tmp_path), save_every=1, keep_last=1, save_best=False)
    with pytest.raises(NonFiniteError, match=rf"The last good checkpoint is .*{bad(chosen) - 1}\."):
        Trainer(ToyWorldModel(ToyConfig()), chosen, [callback]).train(source)
    assert callback.checkpointer.steps() == [bad(chosen) - 1]
    load_weights(ToyWorldModel(ToyConfig()), tmp_path)


def test_reading_weights_checks_the_checksums(saved):
    damage(saved / "15" / "run.json", "flipped byte")
    with pytest.raises(FileFormatError, match=r"run\.json is damaged"):
        load_weights(ToyWorldModel(ToyConfig()), saved)


def test_the_monitor_must_be_a_metric_of_the_run(buffer, config, tmp_path):
    callback = CheckpointCallback(str(tmp_path), save_every=4, monitor="predictoin")
    with pytest.raises(ConfigError, match="Did you mean 'prediction'"):
        Trainer(ToyWorldModel(ToyConfig()), config, [callback]).train(buffer)


def test_save_interval_decides_when_the_callback_does_not(buffer, config, tmp_path):
    """`TrainingConfig.save_interval`, and 0: only at the end."""
    often = CheckpointCallback(str(tmp_path / "often"), keep_last=9)
    Trainer(ToyWorldModel(ToyConfig()), config.replace(save_interval=8), [often]).train(buffer)
    assert often.checkpointer.steps() == [8, 16, 20]
    once = CheckpointCallback(str(tmp_path / "once"))
    Trainer(ToyWorldModel(ToyConfig()), config.replace(save_interval=0), [once]).train(buffer)
    assert once.checkpointer.steps() == [20]
