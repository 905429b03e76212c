"""Checkpoint folders from strangers, whose checksums are right: refused in a sentence, before memory is taken."""

import json
import os
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom import FileFormatError
from worldloom.replay import ReplayBuffer
from worldloom.training import Trainer, TrainingConfig
from worldloom.training import checkpoint_files as files
from worldloom.training.callbacks import CheckpointCallback
from worldloom.training.checkpoint import load_weights

CONFIG = TrainingConfig(total_steps=2, batch_size=4, sequence_length=5, device="cpu")
IDENTITY = Trainer(ToyWorldModel(ToyConfig()), CONFIG, []).run.identity()


@pytest.fixture(scope="module")
def template():
    return Trainer(ToyWorldModel(ToyConfig()), CONFIG, []).state


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = CheckpointCallback(str(folder), save_best=False)
    Trainer(ToyWorldModel(ToyConfig()), CONFIG, [callback]).train(fill(ReplayBuffer(1000)))
    return folder / "2"


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run" / "2")


def sign(folder):
    """Checksums that fit what is there now."""
    files._write_json(folder / "manifest.json", {"files": dict(files._checksums(folder))})


def put_arrays(folder, arrays):
    shutil.rmtree(folder / "state")
    files._save_arrays(folder / "state", arrays)
    sign(folder)


def nothing_is_read(monkeypatch):
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *args, **kwargs: pytest.fail("memory was taken"))


def test_arrays_of_other_sizes_are_refused_before_they_are_read(folder, template, monkeypatch):
    """A megabyte of zeros is a few bytes on disk, and could be a terabyte."""
    arrays = files.flatten_state(template)
    put_arrays(folder, {**arrays, "params/dynamics/kernel": np.zeros((1 << 9, 1 << 9), np.float32)})
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1 << 16
    nothing_is_read(monkeypatch)
    for read in (lambda: files.read_checkpoint(folder, template, IDENTITY), lambda: load(folder)):
        with pytest.raises(FileFormatError, match=r"kernel is float32\[2, 2\], it holds float32\[512, 512\]"):
            read()


def load(folder):
    return load_weights(ToyWorldModel(ToyConfig()), folder.parent)


def test_arrays_that_nobody_asked_for_are_not_read(folder, template, monkeypatch):
    arrays = files.flatten_state(template)
    put_arrays(folder, {**arrays, "params/more": np.zeros(1 << 20, np.float32)})
    restore, read = ocp.Checkpointer.restore, []

    def watched(*args, **kwargs):
        read.append(restore(*args, **kwargs))
        return read[-1]

    monkeypatch.setattr(ocp.Checkpointer, "restore", watched)
    files.read_checkpoint(folder, template, IDENTITY)
    assert sorted(read[0]) == sorted(arrays)


def test_more_beside_the_state_than_a_run_has_is_refused(folder, template, monkeypatch):
    put_arrays(folder, {**files.flatten_state(template), "around/env/obs": np.zeros(1 << 18, np.float32)})
    assert files.read_checkpoint(folder, template, IDENTITY).arrays["env/obs"].shape == (1 << 18,)
    monkeypatch.setattr(files, "_MAX_AROUND", 1 << 20 - 1)
    nothing_is_read(monkeypatch)
    with pytest.raises(FileFormatError, match="beside the state"):
        files.read_checkpoint(folder, template, IDENTITY)


@pytest.mark.parametrize(
    "empty",
    [{"x": [[1 << 40], "<f4"]}, {"x": [[0], "O"]}, {"x": [[0, -1], "<f4"]}, {"x": [[0], "nonsense"]}, {"x": 3}, [1]],
)
def test_empty_arrays_that_are_none_are_refused(folder, template, empty):
    record = json.loads((folder / "run.json").read_text())
    files._write_json(folder / "run.json", {**record, "empty": empty})
    sign(folder)
    with pytest.raises(FileFormatError, match="empty arrays that are none"):
        files.read_checkpoint(folder, template, IDENTITY)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_file_is_refused_without_waiting(folder, template, make):
    make(folder / "state" / "more")
    with pytest.raises(FileFormatError, match="neither a file nor a folder"):
        files.read_checkpoint(folder, template, IDENTITY)


# Orbax gives up at the first array, and the answers for the others come when nobody waits any more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_part_that_orbax_needs_is_missing(folder, template, name):
    (folder / "state" / name).unlink()
    sign(folder)
    with pytest.raises(FileFormatError, match="cannot be read"):
        files.read_checkpoint(folder, template, IDENTITY)
