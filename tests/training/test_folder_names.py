"""A run survives any name that its folder may have: save, stop, move, resume, load."""

import os
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_family import ToyConfig, ToyWorldModel, fill

from worldloom.errors import CheckpointError
from worldloom.files import absolute_path, plain_path
from worldloom.replay import ReplayBuffer
from worldloom.training import RunFolder, Trainer, TrainingConfig, evaluate
from worldloom.training import checkpoint_files as files
from worldloom.training.callbacks import Callback, CheckpointCallback
from worldloom.training.checkpoint import Checkpointer, load_weights

SPECIAL = "[]{}*?\\'\"#%&;"
NAMES = [
    *SPECIAL,
    *(f"a{sign}b" for sign in SPECIAL),
    *sorted(set(string.punctuation) - set(SPECIAL) - {"/", "."}),
    "a[1]", "my [project]", "[a-z]", "[!x]", "[", "]", "[[]", "{a,b}", "{}", "{0}", "{name}", "%s", "%20", "%(x)s",
    "100%", "**", "*.*", "??", "a*?b", "b\\c", "\\n", "\\", "\\\\", "C:\\x", "~", "~root", "a~b",
    "~nobody-of-this-name",
    "$HOME", "${HOME}", "$(x)", "`x`", "!x", "#x", "a#b?c=d&e=f", "x;y", "x|y", "x&y", "x>y", "<x>", "a=b", "@x", "^x",
    "'quoted'", '"quoted"', "it's", " ", " leading", "trailing ", "two  spaces", "tab\there", "line\nbreak", "\x7f",
    "-rf", "--run", "...", ".hidden", "a.partial", "7", "007", "state", "replay", "manifest.json",
    "ünï çödé", "λ–世界", "Ω", "🚀", "e\u0301", "\u202eabc", os.fsdecode(b"not-utf8-\xff"),
    "file:", "file:///x", "gs:x", "s3:", "http:x", "memory:", "a:b", "x" * 200, "[" * 200, "ü" * 100, "()", "a+b",
    "x,y", "orbax-checkpoint-tmp-1", "ocdbt.process_0", "CON", "nul",
]  # fmt: skip
CONFIG = TrainingConfig(total_steps=4, batch_size=4, sequence_length=5, device="cpu", save_interval=2)


def train(folder, steps, **options):
    callback = CheckpointCallback(str(folder), save_best=False)
    trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), CONFIG, [callback])
    trainer.train(fill(ReplayBuffer(500, latents={"memory": (1,)})), total_steps=steps, **options)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), 4)


def test_there_are_a_hundred_names():
    assert len(set(NAMES)) >= 100


# Each name costs about a third of a second; several in one test keep the list of tests readable.
@pytest.mark.parametrize("start", range(0, len(NAMES), 20))
def test_a_run_survives_the_name_of_its_folder(start, tmp_path, whole):
    for number, name in enumerate(NAMES[start : start + 20]):
        folder, moved = tmp_path / "here" / name, tmp_path / f"there-{number}" / name
        train(folder / "checkpoints", 2)
        moved.parent.mkdir(parents=True)
        folder.rename(moved)
        trainer = train(moved / "checkpoints", 4, resume=True)
        assert trainer.step == 4, name
        jax.tree.map(np.testing.assert_array_equal, trainer.state.params, whole.state.params)
        model = ToyWorldModel(ToyConfig(latents=True))
        assert load_weights(model, moved / "checkpoints", 2) == 2
        assert load_weights(model, moved / "checkpoints") == 4
        jax.tree.map(np.testing.assert_array_equal, model.params, whole.state.params)


class Killed(Callback):
    """Ends the process by SIGKILL after three updates, once there is a checkpoint."""

    every = 3

    def __init__(self, folder):
        self.folder = folder

    def on_step(self, info):
        while not Checkpointer(self.folder).steps():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder):
    """For a process of its own: save after two updates, die after three."""
    callbacks = [CheckpointCallback(folder, save_best=False), Killed(folder)]
    trainer = Trainer(ToyWorldModel(ToyConfig(latents=True)), CONFIG, callbacks)
    trainer.train(fill(ReplayBuffer(500, latents={"memory": (1,)})), total_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, len(NAMES), 10))
def test_a_run_killed_in_a_folder_of_any_name_goes_on(start, tmp_path, whole):
    """Save, kill, resume, move, evaluate; each kill takes a process."""
    program = "import os, test_folder_names; test_folder_names.train_until_killed(os.environ['FOLDER'])"
    held_out = fill(ReplayBuffer(500, latents={"memory": (1,)}))
    for number, name in enumerate(NAMES[start : start + 10]):
        folder, moved = tmp_path / "here" / name, tmp_path / f"there-{number}" / name
        environment = {**os.environ, "FOLDER": str(folder / "checkpoints"), "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=Path(__file__).parent, check=False, timeout=120
        )
        assert ended.returncode == -signal.SIGKILL, name
        trainer = train(folder / "checkpoints", 4, resume=True)
        jax.tree.map(np.testing.assert_array_equal, trainer.state.params, whole.state.params)
        moved.parent.mkdir(parents=True)
        folder.rename(moved)
        model = ToyWorldModel(ToyConfig(latents=True))
        assert load_weights(model, moved / "checkpoints") == 4
        assert evaluate(model, held_out, CONFIG) == evaluate(whole.model, held_out, CONFIG)


@pytest.mark.parametrize("name", ["a[1]", "b\\c {}*?", "~ü #%&;'\"", "x" * 200])
def test_a_run_folder_of_any_name_has_all_its_files(name, tmp_path):
    run, buffer = RunFolder(tmp_path / name), fill(ReplayBuffer(500))
    for steps in (2, 4):
        trainer = Trainer(ToyWorldModel(ToyConfig()), CONFIG, run.callbacks(progress=False))
        trainer.train(buffer, total_steps=steps, resume="auto")
    assert {"config.json", "versions.json", "metrics.jsonl", "checkpoints", "model"} <= set(os.listdir(run.path))
    loaded = ToyWorldModel.from_pretrained(run.path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trainer.model.params)


def test_a_save_that_orbax_warns_of_has_failed(tmp_path, monkeypatch):
    """Without the plain path, Orbax finds nothing to merge in such a folder."""
    import contextlib

    monkeypatch.setattr(files, "plain_path", contextlib.nullcontext)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*Orbax warned.*No per-process"):
        train(tmp_path / "a[1]", 2)
    assert not [path for path in (tmp_path / "a[1]").iterdir() if path.name != "replay"]


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "_METADATA"])
def test_a_save_that_cannot_be_read_back_has_failed(tmp_path, monkeypatch, lost):
    save = files._save_arrays

    def forgetful(path, arrays):
        save(path, arrays)
        (path / lost).unlink()

    monkeypatch.setattr(files, "_save_arrays", forgetful)
    with pytest.raises(CheckpointError, match="What was written cannot be read back"):
        train(tmp_path, 2)
    assert not (tmp_path / "2").exists()


def test_a_link_to_a_folder_is_gone_after_use(tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    with plain_path(folder) as link:
        assert link.is_symlink()
        assert link.resolve() == folder
    assert not os.path.lexists(link)
    with plain_path(tmp_path) as same:
        assert same == tmp_path


def test_paths_are_expanded_and_stay_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run, callback = RunFolder("~/runs/x"), CheckpointCallback("run", save_best=False)
    assert run.path == tmp_path / "home" / "runs" / "x"
    monkeypatch.chdir(tmp_path)
    assert callback.save_dir == callback.checkpointer.folder == tmp_path / "work" / "run"
    assert absolute_path("~nobody-of-this-name/x") == tmp_path / "~nobody-of-this-name" / "x"
    assert absolute_path(tmp_path / "~") == tmp_path / "~"


def test_replay_is_saved_and_loaded_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(ReplayBuffer(500)).save("~/replay.npz")
    assert (tmp_path / "replay.npz").exists()
    assert len(ReplayBuffer.load("~/replay.npz")) == len(fill(ReplayBuffer(500)))
    ToyWorldModel(ToyConfig()).save_pretrained("~/model")
    assert ToyWorldModel.from_pretrained("~/model").config == ToyConfig()
    assert (tmp_path / "model" / "config.json").exists()
