"""Runs from recorded data on the command line: alone, before an environment, and of many tasks."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import worldloom.cli.train as cli_train
import worldloom.training.task_evaluation as task_evaluation

sys.path.append(str(Path(__file__).parents[1] / "datasets"))
from dataset_writers import multitask_arrays, recorded, write_npz_folder, write_pt

from worldloom.algorithm import TaskSpec
from worldloom.cli import main
from worldloom.envs import EpisodeEnd
from worldloom.errors import ConfigError
from worldloom.families import get_family
from worldloom.models.tdmpc2 import TDMPC2Config, TDMPC2WorldModel
from worldloom.models.tdmpc2.tasks import MT30, task_env, task_fields
from worldloom.training import RunFolder, evaluate_tasks

SMALL = ["--model", "tdmpc2:tiny", "--latent-dim", "8", "--simnorm-dim", "4", "--hidden-dim", "8", "--encoder-dim", "8"]
SMALL += ["--num-bins", "5", "--num-samples", "4", "--num-elites", "2", "--num-pi-trajs", "1", "--iterations", "1"]
SMALL += ["--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def pendulum(tmp_path):
    """Episodes with the shapes of Pendulum."""
    episodes = [e._replace(terminated=False) for e in recorded(count=6, action_dim=1, lengths=[9])]
    return write_npz_folder(tmp_path / "rows", episodes)


def test_a_run_from_data_alone_is_resumed_with_the_same_data(pendulum, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *SMALL, "--data", str(pendulum), "--total-steps", "2", "--run", run]) == 0
    out = capsys.readouterr().out
    assert "50 rows of 5 episodes, 1 held out" in out
    assert "worldloom eval" in out
    settings = RunFolder(run).settings()
    assert settings["data"] == {"data": str(pendulum)}
    assert (settings["model"]["episodic"], settings["model"]["episode_length"]) == (False, 9)
    assert main(["train", "--run", run, "--resume", "--total-steps", "3"]) == 0
    assert "3 updates" in capsys.readouterr().out
    assert main(["eval", run]) == 2
    assert "Name one of the same shapes" in capsys.readouterr().err
    given = cli_train._flags(get_family("tdmpc2")).parse(
        [*SMALL, "--data", str(pendulum), "--run", str(tmp_path / "tuned"), "--init-from", run, "--reset", "reward"]
    )
    report = cli_train._new_run(given, "tdmpc2:tiny").model.init_report
    assert {name.partition(".")[0] for name in report.reset} == {"reward", "scale"}
    for words, message in (
        (["--init-from", run], "is for a new run"),
        (["--env", "Pendulum-v1"], "--env: for an environment, and"),
        (["--num-envs", "2", "--steps", "10"], "was begun with recorded data alone"),
    ):
        assert main(["train", "--run", run, "--resume", *words]) == 2
        assert message in capsys.readouterr().err


def test_data_first_and_an_environment_later(pendulum, tmp_path, capsys):
    run = str(tmp_path / "run")
    words = ["train", *SMALL, "--data", str(pendulum), "--then-env", "Pendulum-v1", "--offline-updates", "2"]
    words += ["--mix", "0.25", "--steps", "12", "--prefill", "8", "--prefill-updates", "1", "--eval-interval", "0"]
    assert main([*words, "--eval-at-end", "false", "--time-limit", "4", "--run", run]) == 0
    out = capsys.readouterr().out
    assert "2 updates on" in out
    records = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    assert records
    assert main(["train", "--run", run, "--resume", "--then-env", "Pendulum-v1"]) == 2
    assert "--then-env: for a new run" in capsys.readouterr().err


def test_flags_that_do_not_go_together_are_refused(pendulum, capsys):
    for words, message in (
        (["--data", "x", "--env", "Pendulum-v1"], "--then-env"),
        (["--env", "Pendulum-v1", "--offline-updates", "3"], "add --data"),
        (["--env", "Pendulum-v1", "--held-out", "0.2"], "add --data"),
        (["--data", "x", "--mix", "0.2"], "add --then-env"),
        (["--env", "Pendulum-v1", "--mix", "0.3"], "--mix: for recorded data; add --data"),
        (["--data", "x", "--steps", "50", "--num-envs", "2"], "--steps and --num-envs: for an environment"),
        (["--data", "x", "--train-ratio", "2"], "--total-steps sets the end"),
        (["--data", "x", "--env-option", "a=1"], "--env-option: for an environment"),
        (["--data", "x", "--then-env", "Pendulum-v1", "--held-out", "0.2"], "--held-out is for runs from data alone"),
        (["--data", "x", "--then-env", "Pendulum-v1", "--protocol", "tdmpc2/mt30"], "no published experiment has both"),
        (["--data", str(pendulum), "--held-out", "1"], "--held-out is a share"),
        (["--data", str(pendulum), "--protocol", "tdmpc2/dmc"], "run in an environment"),
    ):
        assert main(["train", *SMALL, *words]) == 2
        assert message in capsys.readouterr().err


def test_mt30_is_trained_by_its_protocol_with_the_tasks_of_the_data(tmp_path):
    episodes = recorded(count=30, obs_dim=24, action_dim=6, lengths=[5])
    write_pt(tmp_path / "chunk_0.pt", multitask_arrays(episodes, list(range(30))))
    words = ["--protocol", "tdmpc2/mt30", "--data", str(tmp_path / "chunk_0.pt"), "--run", str(tmp_path / "run")]
    given = cli_train._flags(get_family("tdmpc2")).parse([*words, "--model", "tdmpc2:5m", *SMALL[2:]])
    plan = cli_train._new_run(given, "tdmpc2:5m")
    config, fields = plan.model.config, task_fields("mt30")
    # Those of the reference's control tasks, not of its Gymnasium tasks.
    assert (config.rho, config.discount_max) == (0.5, 0.995)
    assert (config.num_tasks, config.task_dim, config.action_dim) == (30, 64, 6)
    assert (config.action_dims, config.episode_lengths) == (fields["action_dims"], (500,) * 30)
    assert any(line.split() == ["--num-tasks", "30", "protocol"] for line in plan.settings)
    assert plan.config.batch_size == 4
    batch = plan.source.training.sample(4, 4)
    terms = plan.model.compute_loss(batch, key=None)
    assert np.isfinite(float(terms["loss"]))


def test_tasks_are_evaluated_in_environments_of_their_own(monkeypatch):
    sizes = {"latent_dim": 8, "simnorm_dim": 4, "hidden_dim": 8, "encoder_dim": 8, "num_bins": 5, "num_samples": 4}
    sizes |= {"num_elites": 2, "num_pi_trajs": 1, "iterations": 1, "task_dim": 3}
    config = TDMPC2Config(obs_shape=(6,), action_dim=4, num_tasks=2, action_dims=(4, 1), **sizes)
    tasks = [
        TaskSpec("missing", 0, None),
        TaskSpec("swing", 1, "Pendulum-v1", {"time_limit": 3}, best=-10.0),
    ]
    algorithm = dataclasses.replace(TDMPC2WorldModel.algorithm, tasks=lambda config: tasks)
    monkeypatch.setattr(TDMPC2WorldModel, "algorithm", algorithm)
    model, played = TDMPC2WorldModel(config), []

    def play(single, env, *, episodes, seed):
        played.append((single, env))
        return [EpisodeEnd(0, -3.0 - number, 3, False, True) for number in range(episodes)]

    monkeypatch.setattr(task_evaluation, "play", play)
    (result,) = evaluate_tasks(model, episodes=2)
    assert (result.task.name, result.returns.tolist()) == ("swing", [-3.0, -4.0])
    assert result.score == pytest.approx(35.0)
    ((single, env),) = played
    assert (single.config.obs_shape, single.config.action_dim, env.num_envs) == ((3,), 1, 2)
    with pytest.raises(ConfigError, match="no task walk; it has missing, swing"):
        list(evaluate_tasks(model, tasks=["walk"]))


def test_the_tasks_of_a_model_are_those_of_the_published_sets():
    fields = task_fields("mt30")
    tasks = TDMPC2WorldModel.algorithm.tasks(TDMPC2Config(obs_shape=(24,), action_dim=6, num_tasks=30, **fields))
    assert [task.name for task in tasks] == MT30
    assert (tasks[12].name, tasks[12].env) == ("cup-catch", "dmc:ball_in_cup_catch")
    assert tasks[0].score(650.0) == 65.0
    assert task_env("pendulum-spin") is None
    assert TDMPC2WorldModel.algorithm.tasks(TDMPC2Config(obs_shape=(24,), action_dim=6, num_tasks=30)) == []


def test_flags_that_tasks_do_not_read_are_refused(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    config = TDMPC2Config(obs_shape=(3,), action_dim=1, num_tasks=2)
    settings = {"format": 1, "run_id": "1", "model": config.to_dict(), "training": {}, "env": None}
    (run / "config.json").write_text(json.dumps(settings))
    for words in (["--greedy"], ["--max-steps", "5"], ["--num-envs", "2"]):
        assert main(["eval", str(run), *words]) == 2
        assert f"{words[0]} is for runs in one environment" in capsys.readouterr().err
