"""A run resumes from any state that a kill can leave, and one process trains into a folder at a time."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom.errors import CheckpointError
from worldloom.replay import ReplayBuffer
from worldloom.training import RunFolder, Trainer, TrainingConfig
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.run_lock import FILE_NAME, RunLock

CONFIG = TrainingConfig(
    total_steps=8, batch_size=4, sequence_length=5, device="cpu", save_interval=4, log_interval=2, seed=7
)


def train(folder, steps=8, *, resume="auto", config=CONFIG, callbacks=()):
    run = RunFolder(folder)
    model = ToyWorldModel(ToyConfig(latents=True))
    trainer = Trainer(model, config, [*run.callbacks(progress=False), *callbacks])
    trainer.train(fill(ReplayBuffer(500, latents={"memory": (1,)})), total_steps=steps, resume=resume)
    return trainer


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "fps/update")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(folder), folder


@pytest.mark.parametrize(
    "targets", [[2, 9, 17, 26, 40, 55, 70, 90], pytest.param([*range(1, 130)], marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_write_resumes_as_if_nothing_had_happened(whole, tmp_path, targets):
    """The process is killed at the n-th change of a file, in a process of its own for each n."""
    trainer, folder = whole
    script = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_run_states as tests
targets = [int(n) for n in sys.argv[2].split(",")]
for target in targets:
    pid = os.fork()
    if pid == 0:
        count = 0
        def counted(function):
            def call(*args, **options):
                global count
                count += 1
                if count == target:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)
            return call
        for owner, name in [(os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "fsync")]:
            setattr(owner, name, counted(getattr(owner, name)))
        tests.train(pathlib.Path(sys.argv[1]) / str(target))
        os._exit(0)
    os.waitpid(pid, 0)
"""
    # Forked before JAX has threads: the parent only imports.
    command = [sys.executable, "-c", script, str(tmp_path), ",".join(map(str, targets))]
    subprocess.run(command, check=True, capture_output=True, timeout=1000)
    states = set()
    for target in targets:
        run = tmp_path / str(target)
        states.add(tuple(sorted(path.name for path in run.glob("checkpoints/*"))) if run.exists() else None)
        resumed = train(run)
        jax.tree.map(np.testing.assert_array_equal, resumed.state.params, trainer.state.params)
        jax.tree.map(np.testing.assert_array_equal, resumed.state.opt_state, trainer.state.opt_state)
        assert [r for r in records(run) if "train/loss" in r] == records(folder)
        left = {path.name for path in run.rglob("*") if path.name.endswith((".partial", ".tmp", ".lock"))}
        assert not left, target
    assert len(states) > 3


def test_a_run_killed_before_its_first_checkpoint_begins_again_as_the_same_run(tmp_path, whole, caplog):
    shutil.copytree(whole[1], tmp_path / "run")
    folder = tmp_path / "run"
    run_id = RunFolder(folder).settings()["run_id"]
    for step in (4, 8):
        shutil.rmtree(folder / "checkpoints" / str(step))
    (folder / "checkpoints" / "4.partial" / "state").mkdir(parents=True)
    (folder / "checkpoints" / "replay" / "rows-000000000000.partial").write_bytes(b"half")
    (folder / ".config.json.0123abcd.tmp").write_bytes(b"half")
    with caplog.at_level(logging.WARNING, "worldloom"):
        trainer = train(folder)
    assert "stopped before its first checkpoint: the same run begins again from step 0" in caplog.text
    assert RunFolder(folder).settings()["run_id"] == trainer.run.run_id == run_id
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, whole[0].state.params)
    assert records(folder) == records(whole[1])
    names = {path.name for path in folder.rglob("*")}
    assert not [name for name in names if name.endswith((".partial", ".tmp"))]
    assert (folder / "metrics.1.jsonl").exists()  # the log of the part that was lost


def test_a_run_that_begins_again_with_other_settings_says_so(tmp_path, caplog):
    train(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints")
    train(tmp_path, 2, config=CONFIG.replace(batch_size=2))
    assert "begins again with other settings than before: batch_size" in caplog.text


def test_a_run_killed_after_its_last_checkpoint_gets_its_last_files(tmp_path, whole, caplog):
    folder = shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(folder / "model")
    (folder / "learning_curve.png").unlink()
    before = records(folder)
    train(folder)
    assert "Nothing to train" in caplog.text
    assert (folder / "model" / "model.safetensors").exists()
    assert (folder / "learning_curve.png").exists()
    assert records(folder) == before


def test_a_folder_that_holds_another_run_is_refused_before_its_first_checkpoint_is_lost(tmp_path, whole):
    folder = shutil.copytree(whole[1], tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds another run"):
        train(folder, resume=False)
    assert not (folder / FILE_NAME).exists()


# ---- other checkpoints ------------------------------------------------------------------------------------------


def spoil(path, how):
    record = json.loads((path / "run.json").read_text())
    if how == "replay":
        record["replay"] = {"format": "nonsense"}
    elif how == "value":
        record |= {"value": "high", "monitor": "loss", "mode": 3}
    elif how == "run_id":
        record["run_id"] = "another"
    (path / "run.json").write_text("[]" if how == "list" else "{" if how == "half" else json.dumps(record))


@pytest.mark.parametrize("how", ["replay", "value", "run_id", "list", "half", "gone"])
def test_no_older_checkpoint_ends_a_training(tmp_path, how):
    """The checkpoint of step 2 is spoiled while training goes on."""

    def damage(info):
        if info.step == 3:
            callback.checkpointer.wait()
            shutil.rmtree(tmp_path / "2") if how == "gone" else spoil(tmp_path / "2", how)

    callback = CheckpointCallback(str(tmp_path), save_every=2, keep_last=2)
    buffer = fill(ReplayBuffer(500, latents={"memory": (1,)}))
    Trainer(ToyWorldModel(ToyConfig(latents=True)), CONFIG, [(1, damage), callback]).train(buffer)
    assert callback.checkpointer.steps()[-1] == 8
    # Nor one that is found when the run is resumed.
    if (tmp_path / "6").exists():
        spoil(tmp_path / "6", how if how != "gone" else "list")
    again = CheckpointCallback(str(tmp_path), save_every=2, keep_last=2)
    trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), CONFIG, [again])
    trainer.train(buffer, total_steps=10, resume=True)
    assert again.checkpointer.steps()[-1] == 10


def test_replay_files_are_kept_while_a_checkpoint_that_may_need_them_cannot_be_read(tmp_path, caplog):
    callback = CheckpointCallback(str(tmp_path), save_every=2, keep_last=2, save_best=False)

    def damage(info):
        callback.checkpointer.wait()
        spoil(tmp_path / "4", "half")

    buffer = fill(ReplayBuffer(500, latents={"memory": (1,)}))
    Trainer(ToyWorldModel(ToyConfig(latents=True)), CONFIG, [(5, damage), callback]).train(buffer, total_steps=6)
    needed = json.loads((tmp_path / "6" / "run.json").read_text())["replay"]["chunks"]
    assert len(list((tmp_path / "replay").iterdir())) > sum(len(kind["files"]) for kind in needed.values())
    assert "Old checkpoints in" in caplog.text
    assert caplog.text.count("are kept, since one cannot be handled") == 1


# ---- the lock ---------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_with_host_and_pid_of_the_first(tmp_path):
    code = "import sys, time; from pathlib import Path; from worldloom.training.run_lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        host = socket.gethostname()
        with pytest.raises(
            CheckpointError, match=rf"being trained by process {process.pid} on host {host} since .*Stop"
        ):
            train(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / FILE_NAME).exists()
        train(tmp_path, 2)  # The lock of a process that is gone does not count.
        assert not (tmp_path / FILE_NAME).exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_trainer_in_this_process_is_refused(tmp_path):
    refused = []

    def second(info):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on host") as caught:
            train(tmp_path / "run", resume="auto")
        refused.append(caught.value)

    train(tmp_path / "run", 4, callbacks=[(3, second)])
    assert len(refused) == 1
    assert not (tmp_path / "run" / FILE_NAME).exists()


def test_a_lock_of_another_host_names_the_file_to_delete(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps({"host": "elsewhere", "pid": 12, "since": "2026-01-01"}))
    with pytest.raises(CheckpointError, match=rf"process 12 on host elsewhere since 2026.*delete .*{FILE_NAME}"):
        RunLock(tmp_path).check()
    assert (tmp_path / FILE_NAME).exists()
    (tmp_path / FILE_NAME).unlink()
    RunLock(tmp_path).check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', '{"pid": -1}', "\x00" * 20])
def test_a_strange_lock_file_is_refused_or_replaced(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    lock = RunLock(tmp_path)
    if "host" in content or "pid" in content:
        with pytest.raises(CheckpointError, match="delete"):
            lock.acquire()
        return
    lock.acquire()
    assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / FILE_NAME).exists()


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE_NAME).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(tmp_path / "run").acquire()
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_lock_held_through_a_forked_process_of_one_that_is_gone_is_replaced(tmp_path):
    """The owner is killed; its child still has the file open."""
    code = "import os, sys, time; from pathlib import Path; from worldloom.training.run_lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1])).acquire()\n"
    code += "pid = os.fork()\nif pid: print(pid, flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_lock_waits_for_an_owner_that_is_just_writing_it(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    (tmp_path / FILE_NAME).write_text("")
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    rewritten = threading.Timer(0.03, (tmp_path / FILE_NAME).write_text, [owner])
    rewritten.start()
    with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        second.acquire()
    rewritten.join()
    first.release()
