"""Saved models and run folders act in the units of the environment they were trained in."""

import json
import re
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from worlds import TDMPC2, Arm, Buttons, small

import worldloom
from worldloom import create_world_model, load_policy
from worldloom.envs import EnvSpaces, make_env
from worldloom.errors import CheckpointError, ConfigError, FileFormatError
from worldloom.training import RunFolder, Trainer, TrainingConfig

STEPS = {"prefill": 24, "batch_size": 4, "sequence_length": 4, "device": "cpu", "prefill_updates": 1}
STEPS |= {"env_steps": 40, "log_interval": 8, "eval_interval": 0, "save_interval": 8}
NATIVE = (Arm.observation_space, Arm.action_space)


@pytest.fixture(scope="module", autouse=True)
def registered():
    gym.register("Arm-v0", Arm)
    yield
    del gym.registry["Arm-v0"]


@pytest.fixture(scope="module")
def trained(registered, tmp_path_factory):
    """The folder of a run, and the model that it left."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "arm")
    with make_env("Arm-v0", num_envs=2, seed=3) as env:
        shapes = {"obs_shape": env.obs_shape, "action_dim": env.action_dim}
        model = create_world_model("tdmpc2:tiny", **shapes, **TDMPC2, device="cpu")
        Trainer(model, TrainingConfig(**STEPS), run.callbacks(env, episodes=1, progress=False)).train(env)
    return run.path, model


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(trained[0], tmp_path / "run")


def edit(path, **changes):
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name) if value is None else values.update({name: value})
    path.write_text(json.dumps(values))


def test_a_run_acts_in_the_units_of_its_environment(trained):
    folder, model = trained
    policy = worldloom.load_policy(folder, mode="greedy")
    assert policy.spaces == NATIVE
    world = Arm()
    obs, _ = world.reset(seed=0)
    expected = model.policy(world, mode="greedy")
    for _ in range(4):
        action = policy(obs)
        np.testing.assert_array_equal(action, expected(obs))
        obs, *_ = world.step(action)


def test_the_spaces_are_in_the_run_and_beside_its_model(trained):
    folder, _ = trained
    for place in (
        json.loads((folder / "config.json").read_text())["spaces"],
        json.loads((folder / "model/spaces.json").read_text()),
    ):
        assert EnvSpaces.from_json(place, "test") == NATIVE
    assert load_policy(folder / "model").spaces == NATIVE
    assert worldloom.from_pretrained(folder / "model", device="cpu").policy().spaces == NATIVE


def test_a_model_that_was_trained_in_an_environment_knows_it_and_keeps_it(trained, tmp_path):
    _, model = trained
    assert model.policy().spaces == NATIVE
    again = worldloom.from_pretrained(model.save_pretrained(tmp_path / "a"), device="cpu")
    once_more = again.save_pretrained(tmp_path / "b")
    assert (once_more / "spaces.json").read_bytes() == (tmp_path / "a" / "spaces.json").read_bytes()
    again.remember_env_spaces(None)
    again.save_pretrained(once_more)
    assert not (once_more / "spaces.json").exists()


def test_a_run_that_has_not_ended_acts_from_its_newest_checkpoint(run, trained):
    shutil.rmtree(run / "model")
    obs = np.ones(3)
    expected = trained[1].policy(mode="greedy")(obs)
    np.testing.assert_array_equal(load_policy(run, mode="greedy")(obs), expected)
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    earlier = load_policy(run, mode="greedy", checkpoint=steps[0])(obs)
    assert not np.array_equal(earlier, expected)
    load_policy(run, checkpoint="best")
    with pytest.raises(CheckpointError, match="no checkpoint of step 7777"):
        load_policy(run, checkpoint=7777)


def test_a_run_without_its_checkpoints_acts_from_its_model(run, trained):
    shutil.rmtree(run / "checkpoints")
    obs = np.ones(3)
    np.testing.assert_array_equal(load_policy(run, mode="greedy")(obs), trained[1].policy(mode="greedy")(obs))


def test_a_run_of_an_earlier_version_makes_its_environment_once_more(run):
    edit(run / "config.json", spaces=None)
    (run / "model" / "spaces.json").unlink()
    assert load_policy(run).spaces == NATIVE


def test_a_model_of_recorded_episodes_says_that_it_knows_no_environment(tmp_path, caplog):
    folder = small("dreamerv3", Buttons).save_pretrained(tmp_path / "model")
    with caplog.at_level("WARNING", logger="worldloom"):
        policy = load_policy(folder)
    assert "does not say which environment" in caplog.text
    assert policy(np.eye(4)[0]) in (0, 1, 2)
    caplog.clear()
    assert load_policy(folder, Buttons())(3) in (-1, 0, 1)
    assert not caplog.text
    with pytest.raises(ConfigError, match="is for the folder of a run"):
        load_policy(folder, checkpoint="best")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda run: edit(run / "config.json", spaces={"observation": 3}),
            FileFormatError,
            "no observation and action",
        ),
        (lambda run: edit(run / "config.json", run_id=7), FileFormatError, "is damaged: run_id is 7"),
        (lambda run: (run / "config.json").write_text("{"), FileFormatError, "not valid JSON"),
        (lambda run: (run / "config.json").unlink(), FileFormatError, "no config.json"),
    ],
)
def test_a_damaged_run_is_named(run, spoil, error, message):
    spoil(run)
    with pytest.raises(error, match=message):
        load_policy(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "JSON object"), ("{}", "no observation and action space")],
)
def test_damaged_spaces_beside_a_model_are_named(run, text, message):
    (run / "model" / "spaces.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        load_policy(run / "model")


def test_the_policy_follows_a_model_while_it_is_trained():
    with make_env(Arm, num_envs=2, seed=0) as env:
        model = small("tdmpc2")
        trainer = Trainer(model, TrainingConfig(**STEPS))
        policy, obs = model.policy(Arm(), mode="greedy"), np.ones(3)
        before = policy(obs)
        trainer.train(env)
        policy.reset()
        after = policy(obs)
        assert not np.array_equal(after, before)
        np.testing.assert_array_equal(after, model.policy(Arm(), mode="greedy")(obs))


def test_the_pages_example_runs_as_printed(tmp_path, monkeypatch):
    page = Path(worldloom.__file__).parent / "docs" / "acting.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S).group(1)
    world = gym.make("Pendulum-v1")
    monkeypatch.chdir(tmp_path)
    own = EnvSpaces.of_env(world)
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1, **TDMPC2, device="cpu")
    model.remember_env_spaces(own.to_json())
    model.save_pretrained("runs/pendulum")
    exec(compile(example, "acting.md", "exec"), {})
    world.close()
