"""Published experiments, scores and diagnoses on the command line."""

import contextlib
import io
import json
import logging
import shutil

import gymnasium as gym
import numpy as np
import pytest

from worldloom.cli import main
from worldloom.cli.plan import budget
from worldloom.cli.train import _flags, _make_env, _new_run
from worldloom.envs import make_env
from worldloom.families import get_family
from worldloom.training.protocols import protocol_names
from worldloom.training.recipes import recipe
from worldloom.training.run_folder import RunFolder

SMALL = [
    "--model=tdmpc2:tiny", "--latent-dim=8", "--hidden-dim=8", "--encoder-dim=8", "--num-bins=11", "--num-samples=8",
    "--num-elites=2", "--num-pi-trajs=2", "--iterations=1", "--precision=float32", "--device=cpu", "--batch-size=4",
    "--prefill=12", "--prefill-updates=4", "--log-interval=5", "--time-limit=6", "--eval-episodes=2",
]  # fmt: skip
PROTOCOL = ["train", "--protocol", "tdmpc2/gym", "--env", "Pendulum-v1", *SMALL]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Folder of a run of 30 environment steps that follows a protocol, and what the command printed."""
    folder, out = tmp_path_factory.mktemp("runs") / "gym", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*PROTOCOL, "--steps", "30", "--run", str(folder), "--env-option", "g=9.5"]) == 0
    return folder, out.getvalue()


def test_a_run_that_follows_a_protocol_says_and_records_what_it_changes(followed):
    folder, out = followed
    assert "protocol tdmpc2/gym; score: mean of 10 evaluation episodes" in out
    (changed,) = [line for line in out.splitlines() if "CHANGED, not the published experiment" in line]
    for told in ("latent_dim 8 (published 512)", "batch_size 4 (published 256)", "g 9.5", "env Pendulum-v1"):
        assert told in changed
    assert "--rho 0.7                    protocol" in out
    assert "--batch-size 4               given" in out
    assert "--num-envs 1                 protocol" in out
    assert "--action-repeat 1            protocol" in out
    assert "--g 9.5                      given" in out
    assert "ends after 30 environment steps, 22 updates" in out
    settings = RunFolder(folder).settings()
    assert settings["protocol"]["name"] == "tdmpc2/gym"
    assert settings["protocol"]["changed"]["env_steps"] == [4_000_000, 30]
    assert "rho" not in settings["protocol"]["changed"]
    assert settings["model"]["rho"] == 0.7
    assert settings["env"]["g"] == 9.5
    # Evaluated before the first update, as the protocol says, and at the end.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/return" in line] == [0, 22]


def planned(*words):
    """What the command is about to do, and the lines that it prints about settings."""
    family = get_family(words[words.index("--protocol") + 1].partition("/")[0])
    given = _flags(family).parse(words)
    plan = _new_run(given, given.get("model"))
    plan.env.close()
    return plan, "\n".join(plan.settings)


def test_a_given_number_of_updates_is_the_end_of_the_run():
    plan, lines = planned(*PROTOCOL[1:], "--total-steps", "300")
    assert budget(plan).startswith("ends after 300 updates, 308 environment steps")
    assert (plan.config.total_steps, plan.config.env_steps) == (300, 0)
    assert "total_steps 300 (published " in lines
    assert "50000)" not in lines
    assert "env_steps" not in lines
    assert "--total-steps 300            given" in lines


def test_a_smaller_model_keeps_what_the_protocol_learns_with():
    words = ["--protocol", "dreamerv3/crafter", "--model", "dreamerv3:tiny", "--env", "CartPole-v1"]
    plan, lines = planned(*words)
    assert plan.config.lr_schedule == "constant"
    assert (plan.model.config.kl_free, plan.model.config.slow_critic_rate) == (1.0, 0.02)
    assert "deter_dim 256 (published 8192)" in lines
    assert not [name for name in ("lr_schedule", "kl_free", "slow_critic_rate") if name in lines]


def test_the_environments_of_a_run_can_be_made_again_from_its_config(followed, run_command):
    folder, _ = followed
    assert RunFolder(folder).settings()["env_defaults"] == {}
    with RunFolder(folder).make_env() as env:
        assert (env.action_repeat, env.episode_length, env.settings["g"]) == (1, 6, 9.5)
        assert env._backend._envs[0].env.unwrapped.g == 9.5
    code, out, _ = run_command("eval", folder, "--episodes", 2)
    assert code == 0
    assert "length 6.0" in out


def test_a_resumed_run_still_follows_its_protocol(run_command, tmp_path):
    folder = tmp_path / "run"
    assert run_command(*PROTOCOL, "--steps", "20", "--run", folder, "--no-eval-at-start")[0] == 0
    code, out, _ = run_command("train", "--run", folder, "--resume", "--steps", "26", "--no-eval-at-end")
    assert code == 0
    assert "protocol tdmpc2/gym" in out
    found = RunFolder(folder).settings()
    assert found["protocol"]["changed"]["env_steps"] == [4_000_000, 26]
    assert found["protocol"]["changed"]["eval_at_end"] == [True, False]
    numbers = [json.loads(line)["episode"] for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert numbers == list(range(len(numbers)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["env_steps"] for line in lines if "eval/return" in line] == [20]


def test_scores_of_runs_are_printed_by_task_with_an_interval(followed, run_command, tmp_path):
    folder, _ = followed
    code, out, _ = run_command("score", folder)
    assert code == 0
    assert out.splitlines()[0] == "tdmpc2/gym"
    assert "Pendulum-v1: -" in out
    assert "changes the protocol: latent_dim" in out
    assert "interquartile" not in out  # of a single run
    # Other seeds of it.
    others = []
    for number, shift in ((1, 10.0), (2, 20.0)):
        other = tmp_path / f"seed{number}"
        other.mkdir()
        settings = json.loads((folder / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**settings, "run_id": f"seed{number}"}))
        lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
        moved = [json.dumps({**line, "return": line["return"] + shift}) for line in lines]
        (other / "episodes.jsonl").write_text("\n".join(moved))
        others.append(other)
    words = ["--statistic", "training", "--window", "20"]
    code, out, _ = run_command("score", folder, *others, *words)
    assert code == 0
    assert "3 runs; mean of 4 training episodes that end in 10–30" in out
    assert "interquartile mean of 3 runs, 1 task: -" in out
    assert "95 % interval from -" in out
    # They have one seed between them; then each its own, and the last another model.
    assert "not independent: several runs of seed 42" in out
    for number, other in enumerate(others):
        settings = json.loads((other / "config.json").read_text())
        settings["training"]["seed"] = number
        (other / "config.json").write_text(json.dumps(settings))
    _, apart, _ = run_command("score", folder, *others, *words)
    assert apart.splitlines() == [line for line in out.splitlines() if "not independent" not in line]
    (other / "config.json").write_text(json.dumps({**settings, "model": {**settings["model"], "latent_dim": 24}}))
    _, unlike, _ = run_command("score", folder, *others, *words)
    assert "not seeds of one experiment, they differ in latent_dim (8, 24)" in unlike
    out = unlike
    # A run counts once, by whatever path, and so does a copy of it.
    copy = shutil.copytree(others[0], tmp_path / "copy")
    again = [f"{folder}/", folder / ".." / folder.name, copy]
    code, repeated, _ = run_command("score", folder, *others, *again, *words)
    assert code == 0
    told, *rest = repeated.splitlines()
    assert told == f"{copy} is the same run as {others[0]}, and does not count again"
    assert rest == out.splitlines()
    code, _, err = run_command("score", others[0])
    assert code == 2
    assert "No evaluation (eval/return)" in err
    assert "--statistic training" in err


def test_what_cannot_be_scored_is_said_in_a_sentence(followed, run_command, tmp_path):
    folder, _ = followed
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "env_steps": 9, "eval/return": null}\n')
    (tmp_path / "episodes.jsonl").write_text('{"env_steps": 9, "return": 1.0}\n{"episode": 1, "return": 3.0}\n{"epis')
    for words, message in (
        (["score", "--statistic", "training"], "episodes.jsonl, line 2: env_steps of an episode must be a finite"),
        (["doctor"], "episodes.jsonl, line 2: env_steps of an episode must be a finite"),
    ):
        code, _, err = run_command(words[0], tmp_path, *words[1:])
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    (tmp_path / "episodes.jsonl").unlink()
    for words, message in (
        ([], "eval/return of the evaluation after 9 environment steps is no finite number"),
        (["--window", "20"], "the statistic here is 'evaluation'; leave --window out, or take --statistic training"),
    ):
        code, _, err = run_command("score", tmp_path, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_published_curve_stands_beside_the_score(followed, run_command, tmp_path):
    folder, _ = followed
    settings = json.loads((folder / "config.json").read_text())
    settings["env"]["spec"] = "dmc:cartpole_swingup"
    settings["protocol"] = {"name": "tdmpc2/dmc", "changed": {}}
    settings["training"]["env_steps"] = 4_000_000
    (tmp_path / "config.json").write_text(json.dumps(settings))
    lines = [{"step": 1, "env_steps": n, "eval/return": 800.0 + n / 1000} for n in (0, 100_000, 600_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, out, _ = run_command("score", tmp_path, "--at", 100_000)
    assert "dmc:cartpole_swingup: 900.0, 1 run" in out
    assert "published: 839.4 (from 789.8 to 867.9 over seeds) at 100,000 environment steps" in out
    assert "nothing at 600,000 environment steps; the curve ends at 500,000" in run_command("score", tmp_path)[1]
    assert RunFolder(tmp_path).published_curve().steps[-1] == 500_000


def test_crafter_has_its_success_rates_and_its_score(followed, run_command, tmp_path):
    folder, _ = followed
    settings = json.loads((folder / "config.json").read_text())
    settings["protocol"] = {"name": "dreamerv3/crafter", "changed": {}}
    settings["env"]["spec"] = "crafter:reward"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    infos = [{"achievements/collect_wood": 3.0, "achievements/eat_cow": float(i == 0)} for i in range(4)]
    lines = [{"env_steps": i, "return": 1.0, "length": 1, "info": info} for i, info in enumerate(infos)]
    (tmp_path / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, out, _ = run_command("score", tmp_path)
    assert "crafter:reward: 50.2, 1 run; geometric mean of 2 success rates" in out  # sqrt(101 · 26) − 1
    assert "collect_wood           100.00 %" in out
    assert "eat_cow                 25.00 %" in out


def test_doctor_says_what_a_run_has_seen_of_rewards(followed, run_command, tmp_path):
    folder, _ = followed
    code, out, _ = run_command("doctor", folder)
    assert code == 0
    assert "tdmpc2 on Pendulum-v1" in out
    assert "rewards of a step: -" in out
    assert "returns of 2 episodes in the prefill: best -" in out
    assert "nothing conspicuous" in out
    record = max((folder / "checkpoints").glob("*/run.json"))
    saved = record.read_text()
    content = json.loads(saved)
    try:
        rewards = {"low": -1.0, "high": 0.0, "since": 0.0, "mean": -0.5, "spread": 9.0}
        content["collector"]["seen"] |= rewards | {"lengths": [6] * 10, "recent": [-0.01] * 10}
        record.write_text(json.dumps(content))
        assert "if it pays more at a goal, the agent has learned to do nothing" in run_command("doctor", folder)[1]
        del content["collector"]["seen"]  # as an earlier version wrote it
        record.write_text(json.dumps(content))
        assert "no checkpoint of a run in environments says yet" in run_command("doctor", folder)[1]
        # Of a damaged checkpoint and an older one, the older one is read.
        whole = shutil.copytree(folder, tmp_path / "run")
        newest = whole / "checkpoints" / record.parent.name
        older = shutil.copytree(newest, newest.with_name("1"))
        (older / "run.json").write_text(saved)
        (newest / "run.json").write_text(saved[:40])
        _, out, _ = run_command("doctor", whole)
        assert f"checkpoint {newest.name} cannot be read" in out
        assert "rewards of a step: -" in out
        settings = json.loads((whole / "config.json").read_text())
        (whole / "config.json").write_text(json.dumps({**settings, "env": None}))
        assert "trained from recorded episodes" in run_command("doctor", whole)[1]
    finally:
        record.write_text(saved)
    assert run_command("doctor", folder / "nothing")[0] == 2


def test_protocols_are_listed_with_all_their_settings(run_command):
    code, out, _ = run_command("list", "protocols")
    assert code == 0
    assert all(f"\n{name}: " in f"\n{out}" for name in protocol_names())
    assert "env_steps=440000" in out
    assert "recorded data, not --env: 20 GB of .pt files" in out
    assert "prefill=max(1000, 5 × episode length), prefill_updates=as many as prefill" in out
    assert "discount_max=0.995, rho=0.5" in out
    assert "episodic=False" in out
    assert out.splitlines()[-1].startswith("Other fields are those of the preset")
    assert "worldloom list protocols" in run_command("list")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--protocol", "tdmpc2/dmcc", "--env", "Pendulum-v1"], "Did you mean 'tdmpc2/dmc'"),
        (["train", "--protocol", "tdmpc2/gym"], "needs an environment: Walker2d-v5"),
        (["train", "--protocol", "tdmpc2/mt80", "--env", "Pendulum-v1"], "trained from recorded data (34 GB"),
        (
            ["train", "--protocol", "tdmpc2/gym", "--env", "Pendulum-v1", "--model", "dreamerv3:tiny"],
            "is of another family than the model 'dreamerv3:tiny'",
        ),
        (
            ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--env-option", "noops"],
            "Pendulum-v1 has no option 'noops'; its options are g",
        ),
        (
            ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--env-option", "num_envs=3"],
            "write --num-envs 3 instead",
        ),
        (["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--env-option", "=3"], "takes NAME=VALUE"),
        (["score"], "required: run"),
        (["score", "/nowhere"], "not the folder of a run"),
        (["score", "/nowhere", "--window", "-3"], "--window is at least 1 environment step, not -3"),
        (["score", "/nowhere", "--statistic", "best"], "--statistic is training, evaluation"),
        (["doctor", "/nowhere"], "not the folder of a run"),
        (["train", "--protocol", "foo", "--env", "Pendulum-v1"], "There are dreamerv3/"),
        (["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--steps", "0"], "--steps 0 is no end of a run"),
        (
            ["train", "--model", "tdmpc2:tiny", "--env", "Pendulum-v1", "--explore-weight", "3", "--steps", "9"],
            "explore_weight=3.0 has no effect without explore='disagreement'",
        ),
        (["list", "protocol"], "'protocol' is not expected"),
    ],
)
def test_user_errors_print_one_sentence_and_exit_with_2(words, message, run_command):
    code, out, err = run_command(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


class Camera(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((64, 64, 3), np.uint8), {}


def test_images_are_stacked_for_the_family_that_needs_several(monkeypatch, caplog):
    for family, options, shape in (
        ("tdmpc2", {}, (9, 64, 64)),
        ("tdmpc2", {"frame_stack": 2}, (6, 64, 64)),
        ("dreamerv3", {}, (64, 64, 3)),
    ):
        env, reasons = _make_env(Camera, get_family(family), options, 0)
        with env, caplog.at_level(logging.WARNING, "worldloom"):
            assert env.obs_shape == shape
            assert bool(reasons) == (shape == (9, 64, 64))
            recipe(f"{family}:tiny", env)
    assert not caplog.text
    with make_env(Camera) as env, caplog.at_level(logging.WARNING, "worldloom"):
        recipe("tdmpc2:tiny", env)
    assert "make_env(…, frame_stack=3)" in caplog.text


def test_a_greedy_evaluation_differs_from_one_that_explores(followed, run_command):
    folder, _ = followed
    greedy, exploring = (run_command("eval", folder, "--episodes", 2, flag)[1] for flag in ("--greedy", "--explore"))
    assert greedy.startswith("return -")
    assert greedy != exploring


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("noops=30", ("noops", 30)),
        ("all_actions", ("all_actions", True)),
        ("sticky=false", ("sticky", False)),
        ("camera=none", ("camera", None)),
        ("gravity=-9.5", ("gravity", -9.5)),
        ("map_name=4x4", ("map_name", "4x4")),
        ('desc=["SF", "FG"]', ("desc", ["SF", "FG"])),
    ],
)
def test_options_of_environments_are_read_as_values(text, value):
    assert _flags(None).parse(["--env-option", text])["env_option"] == dict([value])
    both = _flags(None).parse(["--env-option", text, "--env-option=other=1"])["env_option"]
    assert both == {**dict([value]), "other": 1}
