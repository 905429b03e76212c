"""A log that cannot be written costs a warning with path and error, is tried again, and never the run."""

import errno
import json
import os

import pytest
from tensorboardX.proto import event_pb2
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom.replay import ReplayBuffer
from worldloom.training import RunFolder, Trainer, TrainingConfig
from worldloom.training.callbacks import LoggingCallback
from worldloom.training.callbacks.log_files import AppendFile

CONFIG = TrainingConfig(total_steps=20, batch_size=4, sequence_length=5, device="cpu", log_interval=2)


class Disk:
    """Stands for ``os.write`` on a disk that takes ``room`` more bytes."""

    def __init__(self, monkeypatch):
        self.room, self.write = float("inf"), os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, file, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(file, bytes(data)[: int(min(self.room, len(data)))])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def events(folder):
    """Events of the file in ``folder``; fails for one that is torn."""
    (path,) = folder.glob("events.*")
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        assert len(data) >= size + 16
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[size + 16 :]
    return found


def test_a_record_that_did_not_fit_is_written_when_it_does(tmp_path, disk, caplog):
    file = AppendFile(tmp_path / "log")
    file.write(b"one\n")
    disk.room = 2
    file.write(b"two\n")
    file.write(b"three\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw"
    assert caplog.text.count("No space left on device (ENOSPC)") == 1
    assert str(tmp_path / "log") in caplog.text
    disk.room = 100
    file.write(b"four\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\nfour\n"
    assert "can be written again, and misses nothing" in caplog.text
    disk.room = 0
    file.write(b"five\n")
    file.close()
    assert "The last 5 bytes of" in caplog.text


def test_a_full_disk_does_not_end_training_nor_leave_a_gap_in_the_log(tmp_path, disk, caplog):
    def fill_and_free(info):
        disk.room = {6: 30, 14: float("inf")}.get(info.step, disk.room)

    callbacks = [(1, fill_and_free), LoggingCallback(str(tmp_path), False, log_to_tensorboard=True)]
    Trainer(ToyWorldModel(ToyConfig()), CONFIG, callbacks).train(fill(ReplayBuffer(500)))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 21, 2))
    logged = [
        event.step for event in events(tmp_path) if event.summary.value and event.summary.value[0].tag == "train/loss"
    ]
    assert logged == steps
    for name in ("metrics.jsonl", "events.out.tfevents"):
        assert f"{tmp_path / name}" in caplog.text
    assert caplog.text.count("cannot be written: No space left on device") == 2


def test_a_picture_that_cannot_be_written_costs_a_warning_with_its_path(tmp_path, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunFolder(tmp_path / "run")
    trainer = Trainer(ToyWorldModel(ToyConfig()), CONFIG, [])
    callback = run.callbacks(progress=False)[-1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.0}\n')
    (tmp_path / "run" / "config.json").write_text('{"format": 1, "run_id": "x", "model": {}, "training": {}}')
    monkeypatch.setattr(os, "fsync", full)
    callback._plot(None)
    assert f"No space left on device: '{tmp_path / 'run' / 'learning_curve.png'}'" in caplog.text
    (tmp_path / "run" / "config.json").unlink()  # the title of the plot comes from here
    callback._plot(None)
    assert "learning_curve.png was not drawn: " in caplog.text
    assert trainer.step == 0


def test_a_log_is_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "outside")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name in ("log", "dangling"):
        file = AppendFile(tmp_path / name)
        file.write(b"x")
        file.close()
        assert (tmp_path / name).read_bytes() == b"x"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_two_event_files_of_the_same_second_are_two(tmp_path):
    for _ in range(2):
        callbacks = [LoggingCallback(str(tmp_path), False, log_to_tensorboard=True)]
        Trainer(ToyWorldModel(ToyConfig()), CONFIG, callbacks).train(fill(ReplayBuffer(500)), total_steps=2)
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_a_closed_terminal_does_not_end_training(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    monkeypatch.setattr("sys.stdout", Gone())
    trainer = Trainer(ToyWorldModel(ToyConfig()), CONFIG, [LoggingCallback()])
    trainer.train(fill(ReplayBuffer(500)), total_steps=4)
    assert trainer.step == 4


def test_a_checkpoint_that_does_not_fit_says_what_it_needs_and_what_is_free(tmp_path, monkeypatch, caplog):
    import collections

    from worldloom.training import checkpoint_files
    from worldloom.training.callbacks import CheckpointCallback

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 100))
    save = checkpoint_files._save_arrays

    def full(path, arrays):
        if arrays["step"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, arrays)

    monkeypatch.setattr(checkpoint_files, "_save_arrays", full)
    callback = CheckpointCallback(str(tmp_path), save_every=5)
    with pytest.warns(UserWarning, match=r"No space left.*It needs up to 0\.\d kB; 0\.1 kB are free\. Earlier"):
        Trainer(ToyWorldModel(ToyConfig()), CONFIG, [callback]).train(fill(ReplayBuffer(500)))
    assert callback.checkpointer.steps() == [10, 15, 20]
    assert caplog.text.count("is nearly full: a checkpoint needs up to") == 1
