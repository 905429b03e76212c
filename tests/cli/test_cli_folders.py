"""Run folders on the command line: any name, modules of the current folder, trust, changes, one process at a time."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from worldloom.cli import main
from worldloom.training.run_lock import RunLock

TOY = Path(__file__).parents[1] / "training" / "toy_family.py"
WORDS = [
    "--model", "toy", "--device=cpu", "--batch-size=4", "--sequence-length=3", "--prefill=12", "--eval-interval=0",
    "--save-interval=10", "--log-interval=5", "--time-limit=10", "--latents",
]  # fmt: skip
REACH = """
import gymnasium as gym
import numpy as np

class Reach(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.x, {}

    def step(self, action):
        self.x = np.clip(self.x + 0.1 * action, -1, 1).astype(np.float32)
        return self.x, float(-abs(self.x).sum()), False, False, {}

gym.registry.pop("Reach-v0", None)
gym.register("Reach-v0", Reach)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """The current folder is not on the path, as for the script ``worldloom``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "here_env.py").write_text(REACH)
    yield
    sys.modules.pop("here_env", None)


@pytest.fixture
def run_command(capsys):
    """Run a command of the toy family: (exit code, stdout, stderr)."""

    def run(command, *words):
        code = main([command, *map(str, words), "--family-module", str(TOY)])
        return code, *capsys.readouterr()

    return run


def begin(folder, *words, env="MountainCarContinuous-v0"):
    return [*WORDS, "--env", env, "--run", folder, *words]


@pytest.mark.parametrize("name", ["a[1]", "my [project] ü", "b\\c {}*?", "#%&;'\"", "~/home run", "x" * 200])
def test_train_move_resume_eval_in_a_folder_of_any_name(name, run_command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "runs" / name if not name.startswith("~/") else name
    code, out, err = run_command("train", *begin(folder, "--steps", 22))
    assert code == 0, err
    moved = tmp_path / f"moved {Path(name).name[:150]}"
    shutil.move(Path(folder).expanduser(), moved)
    assert run_command("train", "--run", moved, "--resume", "--steps", 32)[0] == 0
    code, out, err = run_command("eval", moved, "--episodes", 2, "--device", "cpu")
    assert code == 0, err
    assert "weights after 20 updates" in out
    assert "10, 20" in run_command("info", moved)[1]


def test_a_module_of_the_current_folder_is_found_and_evaluated_only_with_a_word(run_command, tmp_path):
    code, out, err = run_command("train", *begin("run", "--steps", 22, env="here_env:Reach-v0"))
    assert code == 0, err
    assert "worldloom eval run" in out
    assert "--env here_env:Reach-v0" in out
    for command in ("eval", "play"):
        sys.modules.pop("here_env")
        code, _, err = run_command(command, "run")
        assert code == 2
        assert "would import the module 'here_env', which only this folder names" in err
        assert "--trust or --env here_env:Reach-v0" in err
        assert "here_env" not in sys.modules
        sys.modules["here_env"] = None  # popped by the next round
    sys.modules.pop("here_env")
    assert "here_env" not in sys.modules
    assert run_command("info", "run")[0] == 0
    assert "here_env" not in sys.modules
    for words in (["--trust"], ["--env", "here_env:Reach-v0"]):
        sys.modules.pop("here_env", None)
        code, _, err = run_command("eval", "run", "--episodes", 1, "--device", "cpu", *words)
        assert code == 0, err
    # Whoever trains into a folder owns it.
    sys.modules.pop("here_env")
    assert run_command("train", "--run", "run", "--resume", "--steps", 24)[0] == 0


def test_changes_are_refused_by_resume_and_listed_by_resume_continue(run_command):
    assert run_command("train", *begin("run", "--steps", 22))[0] == 0
    code, _, err = run_command("train", "--run", "run", "--resume", "--steps", 32, "--batch-size", 8)
    assert code == 2
    assert "--resume continue" in err
    code, _, err = run_command(
        "train", "--run", "run", "--resume", "continue", "--steps", 42, "--batch-size", 8, "--num-envs", 2
    )
    assert code == 0
    assert "Continuing from step 10" in err
    assert "batch_size 4 → 8; 1 → 2 environments; all environments begin new episodes" in err
    assert json.loads(Path("run/config.json").read_text())["training"]["batch_size"] == 8
    # Steps under another action repeat: the end counts those that were taken before.
    again = ("train", "--run", "run", "--resume", "continue", "--steps", 52, "--action-repeat", 4)
    code, out, err = run_command(*again)
    assert code == 0, err
    assert "goes on until 52 environment steps" in out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert 44 <= max(line["env_steps"] for line in lines if "env_steps" in line) <= 52


def test_what_ends_before_the_first_update_prints_no_recipe_and_leaves_no_folder(run_command):
    for words in (begin("run", "--steps", 5), [*WORDS, "--env", "MountainCarContinuous-v0", "--steps", 5]):
        code, out, err = run_command("train", *words)
        assert code == 2
        assert out == ""
        assert "end before the first update: prefill=12. Take more steps (--steps)" in err
    assert not Path("run").exists()
    assert not Path("runs").exists()


def test_a_folder_that_is_not_there_is_what_the_message_speaks_of(run_command):
    code, _, err = run_command("train", "--run", "runs/nothing", "--resume")
    assert code == 2
    assert "runs/nothing is not there, so there is nothing to resume" in err
    Path("runs/nothing").mkdir(parents=True)
    assert "holds no run: it has no config.json" in run_command("train", "--run", "runs/nothing", "--resume")[2]
    assert "no folder" in run_command("info", "runs/other")[2]


def test_the_last_of_two_folders_counts(run_command):
    assert run_command("train", *begin("first", "--run", "last", "--steps", 22))[0] == 0
    assert Path("last/config.json").exists()
    assert not Path("first").exists()
    assert run_command("train", "--run", "first", "--run", "last", "--resume", "--steps", 24)[0] == 0


def test_a_locked_folder_is_refused_at_once(run_command):
    assert run_command("train", *begin("run", "--steps", 22))[0] == 0
    lock = RunLock(Path("run").absolute())
    lock.acquire()
    code, out, err = run_command("train", "--run", "run", "--resume", "--steps", 24)
    assert code == 2
    assert out == ""
    assert "is being trained by process" in err
    assert "is being trained by process" in run_command("info", "run")[1]
    lock.release()
    assert run_command("train", "--run", "run", "--resume", "--steps", 24)[0] == 0


def test_an_endless_environment_is_cut_by_max_steps(run_command):
    words = [word for word in begin("run", "--steps", 22, env="here_env:Reach-v0") if word != "--time-limit=10"]
    assert run_command("train", *words)[0] == 0
    code, out, err = run_command("eval", "run", "--trust", "--episodes", 2, "--max-steps", 7, "--device", "cpu")
    assert code == 0
    assert "length 7.0" in out
    assert "2 of 2 evaluated episodes did not end and were cut after 7" in err


def test_info_of_a_saved_model(run_command):
    assert run_command("train", *begin("run", "--steps", 22))[0] == 0
    out = run_command("info", "run/model")[1]
    assert "holds a saved model of toy" in out
    assert "observations (2,), 1 continuous actions" in out
