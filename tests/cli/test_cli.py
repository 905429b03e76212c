"""The commands of the command line, run in this process."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import worldloom
from worldloom import UnknownModelError, create_world_model
from worldloom.cli import COMMANDS, main
from worldloom.cli.about import EXTRAS

ROOT = Path(worldloom.__file__).parents[1]
TINY = [
    "--latent-dim=8", "--hidden-dim=8", "--encoder-dim=8", "--num-bins=11", "--num-samples=8", "--num-elites=2",
    "--num-pi-trajs=2", "--iterations=1", "--precision=float32", "--device=cpu", "--batch-size=4",
    "--sequence-length=4", "--prefill=12", "--eval-interval=10", "--save-interval=10", "--log-interval=5",
    "--time-limit=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    words = ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--steps", "30", "--run", str(folder), *TINY]
    assert main(words) == 0
    return folder


def test_train_writes_a_run_folder(run_folder, run_command):
    assert {"config.json", "checkpoints", "learning_curve.png", "eval.gif", "horizon.png", "trust.png"} <= {
        path.name for path in run_folder.iterdir()
    }
    settings = json.loads((run_folder / "config.json").read_text())
    assert settings["model"]["episodic"] is False
    assert settings["model"]["episode_length"] == 6
    assert settings["training"]["env_steps"] == 30
    assert settings["training"]["prefill_updates"] == 24  # two for each step
    assert settings["env"] == {
        "spec": "Pendulum-v1", "num_envs": 1, "parallel": "sync", "seed": 42, "time_limit": 6, "worker_timeout": 60.0,
    }  # fmt: skip


def test_eval_evaluates_the_final_weights_or_a_checkpoint(run_folder, run_command):
    code, out, _ = run_command("eval", run_folder)
    assert code == 0
    assert "0 of 10 episodes terminated; weights after 60 updates" in out
    assert run_command("eval", run_folder)[1] == out
    assert "after 50 updates" in run_command("eval", run_folder, "--checkpoint", "50")[1]


def test_a_video_must_be_a_gif_and_the_weights_of_a_run_are_in_its_model_folder(run_folder, run_command):
    code, _, err = run_command("play", run_folder, "--video", "out.mp4")
    assert code != 0
    assert "writes a GIF: out.gif, not out.mp4" in err
    with pytest.raises(UnknownModelError, match=r"folder of a run; the weights at its end are in .*pendulum/model"):
        create_world_model(run_folder)
    assert create_world_model(run_folder / "model").config.model_type == "tdmpc2"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--model", "tdmpc2:tiny"], False),
        (["--model", "tdmpc2:tiny", "--latent-dim", "128"], True),
        (["--model", "tdmpc2:1m"], True),
        (["--model", "dreamerv3:tiny"], True),
        (["--resume"], False),
    ],
)
def test_freed_memory_is_kept_unless_updates_are_short(run_folder, run_command, monkeypatch, words, kept):
    calls = []
    monkeypatch.setattr("worldloom.cli.train.keep_freed_memory", lambda: calls.append(1))
    folder = ["--run", run_folder] if "--resume" in words else []
    assert run_command("train", *words, *folder, "--env", "NoSuchWorld-v0")[0] == 2
    assert bool(calls) == kept


def test_play_writes_a_video(run_folder, run_command, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    code, out, _ = run_command("play", run_folder, "--video", tmp_path / "out.gif", "--episodes", 2)
    assert code == 0
    assert f"{tmp_path / 'out.gif'}: 12 pictures" in out
    with image_module.open(tmp_path / "out.gif") as gif:
        assert 6 <= gif.n_frames <= 12


def test_a_folder_with_a_run_needs_resume(run_folder, run_command):
    code, _, err = run_command("train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--run", run_folder)
    assert code == 2
    assert "holds a run; add --resume" in err
    assert "holds a run; add --resume" in run_command("train", "--run", run_folder)[2]


def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(run_command, tmp_path):
    """30 steps at once, or 20 and then 10, resumed by the same command or by the folder alone."""
    begin = ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", *TINY]
    assert run_command(*begin, "--steps", "30", "--run", tmp_path / "whole")[0] == 0
    for name, resume in (("same", begin), ("folder", ["train"])):
        assert run_command(*begin, "--steps", "20", "--run", tmp_path / name)[0] == 0
        assert run_command(*resume, "--steps", "30", "--run", tmp_path / name, "--resume")[0] == 0
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
    code, _, err = run_command("train", "--run", tmp_path / "folder", "--resume", "--hidden-dim", "16", "--steps", "40")
    assert code == 2
    assert "hidden_dim" in err


def test_resume_needs_a_folder(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin = ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", *TINY]
    assert "for example --run runs/FOLDER" in run_command(*begin, "--resume")[2]
    monkeypatch.setattr("time.strftime", lambda form: "20300101-000000")
    for _ in range(2):  # Both begin in the same second.
        assert run_command(*begin, "--steps", "20")[0] == 0
    name = "pendulum-v1-tdmpc2-tiny-20300101-000000"
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}.2"]
    assert losses(Path("runs") / name) == losses(Path("runs") / f"{name}.2") != {}
    code, _, err = run_command(*begin, "--resume")
    assert code == 2
    assert f"--run runs/{name}.2" in err


def test_a_resumed_run_ends_as_the_given_flag_says(run_command, tmp_path):
    begin = ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", *TINY, "--run", tmp_path / "run"]
    assert "give one" in run_command(*begin, "--steps", "20", "--total-steps", "30")[2]
    assert run_command(*begin, "--steps", "20")[0] == 0
    code, out, _ = run_command("train", "--run", tmp_path / "run", "--resume", "--total-steps", "30")
    assert code == 0
    assert "30 updates" in out


def losses(folder):
    """Training losses by step, every five updates."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line and line["step"] % 5 == 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "needs --model and --env"),
        (["train", "--model", "tdmpc2:tiny"], "needs --model and --env"),
        (["train", "--model", "tdmpc:tiny", "--env", "CartPole-v1"], "Did you mean 'tdmpc2:tiny'"),
        (["train", "--model", "tdmpc2:tony", "--env", "CartPole-v1"], "Did you mean 'tdmpc2:tiny'"),
        (["train", "--model", "tdmpc2:tiny", "--env", "CartPole-v9"], "CartPole"),
        (["train", "--model", "tdmpc2:tiny", "--env", "CartPole-v1", "--batchsiz", "3"], "Did you mean '--batch-size'"),
        (["train", "--model", "tdmpc2:tiny", "--env", "CartPole-v1", "--latent", "3"], "Did you mean '--latent-dim'"),
        (["train", "--model", "tdmpc2:tiny", "--env", "CartPole-v1", "--batch-size", "0"], "batch_size must be"),
        (["train", "--model", "tdmpc2:tiny", "--env", "CartPole-v1", "--parallel", "both"], "parallel must be"),
        (["train", "--run", "/nowhere/at/all", "--resume"], "needs --model and --env"),
        (["eval"], "required: folder"),
        (["eval", "/nowhere/at/all"], "not the folder of a run"),
        (["info", "tdmpc2:tony"], "There is no model 'tdmpc2:tony'"),
        (["info", "nothing"], "There is no model 'nothing'"),
        (["info", "tdmpc2:tiny", "--image-size", "64"], "image_size belongs to an environment: give --env too"),
        (["list", "all"], "'all' is not expected"),
        (["doctor", "--help-me"], "no flag '--help-me'. Did you mean '--help'"),
    ],
)
def test_user_errors_print_one_sentence_and_exit_with_2(words, message, run_command):
    code, out, err = run_command(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("worldloom: ")
    assert err.count("\n") == 1


def test_an_unknown_checkpoint_is_refused(run_folder, run_command):
    for wrong, message in (("77", "no checkpoint of step 77"), ("newest", "latest, best or a number")):
        code, _, err = run_command("eval", run_folder, "--checkpoint", wrong)
        assert code == 2
        assert message in err


def test_help_names_every_command(run_command):
    for words in ([], ["--help"], ["-h"]):
        code, out, _ = run_command(*words)
        assert code == 0
        assert all(f"  {name} " in out for name in COMMANDS)
    assert run_command("--version")[1] == f"worldloom {worldloom.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, run_command, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(command, "--help")
    assert caught.value.code == 0
    assert f"usage: worldloom {command}" in capsys.readouterr().out


def test_help_of_training_shows_the_fields_of_the_family(run_command, capsys):
    for family, shown, hidden in (("tdmpc2", "--num-elites", "--deter-dim"), ("dreamerv3", "--deter-dim", "--num-q")):
        with pytest.raises(SystemExit):
            run_command("train", "--help", "--model", f"{family}:tiny")
        out = capsys.readouterr().out
        assert shown in out
        assert hidden not in out
        assert "--steps" in out


def test_list_names_every_model(run_command):
    out = run_command("list")[1].split()
    assert set(worldloom.list_models()) <= set(out)
    assert "dmc:…" in out


def test_info_counts_parameters_and_memory(run_command):
    model = worldloom.create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1)
    code, out, _ = run_command(
        "info", "tdmpc2:tiny", "--env", "Pendulum-v1", "--batch-size", "8", "--sequence-length", "6"
    )
    assert code == 0
    numbers = {
        line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in out.splitlines() if line.startswith("  ")
    }
    assert numbers["parameters"] == f"{model.num_parameters():,}"
    assert "memory for an update of 8 × 6 rows" in out
    # Adam keeps two moments of each weight; the policy's optimizer is included.
    weights = model.num_parameters() * 4 / 1e6
    assert f"  gradients        {weights:>10,.1f} MB" in out
    assert f"  optimizer        {2 * weights:>10,.1f} MB" in out


def test_info_shows_the_flags_of_models_and_takes_them_in_any_order(run_command, capsys):
    with pytest.raises(SystemExit):
        run_command("info", "--help")
    assert "--exact" in capsys.readouterr().out
    before, after = (run_command("info", *words) for words in (
        ("--env", "Pendulum-v1", "tdmpc2:tiny"), ("tdmpc2:tiny", "--env", "Pendulum-v1")
    ))  # fmt: skip
    assert before == after
    assert before[0] == 0


def test_info_reports_activations_in_proportion_to_the_batch(run_command):
    def activations(batch):
        out = run_command("info", "dreamerv3:tiny", "--obs-shape", "4", "--batch-size", batch, "--sequence-length", 8)[
            1
        ]
        line = next(line for line in out.splitlines() if "activations" in line)
        return float(line.split()[-2])

    assert 1.7 < activations(8) / activations(4) < 2.1


def test_doctor_reports_devices_and_extras(run_command):
    code, out, _ = run_command("doctor")
    assert code == 0
    assert "JAX computes on cpu" in out
    assert "no problems found" in out
    assert all(f"  {extra} " in out for extra in EXTRAS)


def test_doctor_reports_a_gpu_that_jax_does_not_use(run_command, monkeypatch):
    monkeypatch.setattr("worldloom.cli.about.nvidia_driver", lambda: "NVIDIA X, 8 MiB, 1.0")
    monkeypatch.setattr("worldloom.cli.about.cuda_plugins", dict)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    code, out, _ = run_command("doctor")
    assert code == 1
    assert "pip install 'worldloom[cuda12]'" in out.split("problems:")[1]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu keeps JAX off it" in run_command("doctor")[1]
    monkeypatch.setattr("worldloom.cli.about.cuda_plugins", lambda: {"jax-cuda12-plugin": "0.4.1"})
    assert "does not fit jaxlib" in run_command("doctor")[1]


def test_the_listed_extras_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"cuda12", "cuda13", "tpu", "test", "dev", "docs"}
    assert project["scripts"]["worldloom"] == "worldloom.cli:main"


def test_help_imports_neither_jax_nor_numpy():
    code = (
        "import sys, worldloom.cli; worldloom.cli.main(['--help']); print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
    assert done.stdout.splitlines()[-1] == "False False"


def test_the_module_runs_and_returns_the_exit_code():
    command = [sys.executable, "-m", "worldloom", "trian"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("worldloom: There is no command 'trian'.")
    assert done.stdout == ""
