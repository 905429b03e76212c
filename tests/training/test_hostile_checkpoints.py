"""Manipulated checkpoint folders with valid checksums are refused before memory is allocated."""

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


def update_checksums(folder):
    """Write a manifest with the checksums of the current files."""
    files._write_json(folder / "manifest.json", {"files": dict(files.checksums(folder))})


def put_arrays(folder, arrays):
    shutil.rmtree(folder / "state")
    files._save_arrays(folder / "state", arrays)
    update_checksums(folder)


def fail_on_restore(monkeypatch):
    monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *args, **kwargs: pytest.fail("memory was allocated"))


def test_arrays_of_other_sizes_are_refused_before_they_are_read(folder, template, monkeypatch):
    """A megabyte of zeros is compressed to a few bytes on disk, and so is a terabyte."""
    arrays = files.flatten_state(template)
    put_arrays(folder, {**arrays, "params/dynamics/kernel": np.zeros((1 << 9, 1 << 9), np.float32)})
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1 << 16
    fail_on_restore(monkeypatch)
    for read in (lambda: files.read_checkpoint(folder, template, IDENTITY), lambda: load(folder)):
        with pytest.raises(FileFormatError, match=r"kernel is float32\[2, 2\], it holds float32\[512, 512\]"):
            read()


def load(folder):
    return load_weights(ToyWorldModel(ToyConfig()), folder.parent)


def test_arrays_unknown_to_the_run_are_not_read(folder, template, monkeypatch):
    arrays = files.flatten_state(template)
    put_arrays(folder, {**arrays, "params/more": np.zeros(1 << 20, np.float32)})
    restore, restored = ocp.Checkpointer.restore, []

    def recording_restore(*args, **kwargs):
        restored.append(restore(*args, **kwargs))
        return restored[-1]

    monkeypatch.setattr(ocp.Checkpointer, "restore", recording_restore)
    files.read_checkpoint(folder, template, IDENTITY)
    assert sorted(restored[0]) == sorted(arrays)


def test_too_many_bytes_in_addition_to_the_state_are_refused(folder, template, monkeypatch):
    put_arrays(folder, {**files.flatten_state(template), "around/env/obs": np.zeros(1 << 18, np.float32)})
    assert files.read_checkpoint(folder, template, IDENTITY).arrays["env/obs"].shape == (1 << 18,)
    monkeypatch.setattr(files, "_MAX_EXTRA", 1 << 20 - 1)
    fail_on_restore(monkeypatch)
    with pytest.raises(FileFormatError, match="in addition to the state"):
        files.read_checkpoint(folder, template, IDENTITY)


@pytest.mark.parametrize(
    "empty",
    [{"x": [[1 << 40], "<f4"]}, {"x": [[0], "O"]}, {"x": [[0, -1], "<f4"]}, {"x": [[0], "nonsense"]}, {"x": 3}, [1]],
)
def test_an_invalid_list_of_empty_arrays_is_refused(folder, template, empty):
    record = json.loads((folder / "run.json").read_text())
    files._write_json(folder / "run.json", {**record, "empty": empty})
    update_checksums(folder)
    with pytest.raises(FileFormatError, match="invalid list of empty arrays"):
        files.read_checkpoint(folder, template, IDENTITY)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd")])
def test_pipes_and_links_are_refused_without_blocking(folder, template, make):
    make(folder / "state" / "more")
    with pytest.raises(FileFormatError, match="neither a file nor a folder"):
        files.read_checkpoint(folder, template, IDENTITY)


# Orbax stops at the first array that fails; the reads of the others then finish after their event loop was closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_missing_file_of_orbax_is_reported(folder, template, name):
    (folder / "state" / name).unlink()
    update_checksums(folder)
    with pytest.raises(FileFormatError, match="cannot be read"):
        files.read_checkpoint(folder, template, IDENTITY)
