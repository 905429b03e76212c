"""A run's environments are made again with every option in effect; options that change them are refused by a resume."""

import sys
import types

import pytest
from online_worlds import ONLINE_CONFIG, toy
from tiny_envs import Walk

from worldloom.envs import make_env
from worldloom.envs.make import SUITES, _Suite, effective_defaults, usual_options
from worldloom.errors import ConfigError
from worldloom.training import Trainer
from worldloom.training.run_folder import RunFolder


class Windy(Walk):
    """A walk with options, as suites have them."""

    def __init__(self, wind, stormy, time_limit):
        self.wind, self.stormy, self.time_limit = wind, stormy, time_limit or 20

    def step(self, action):
        self.position += self.wind
        return super().step(action)


def make_walk(task, *, action_repeat=1, time_limit=None, **options):
    return Windy(time_limit=time_limit, **{**sys.modules["windy_suite"].USUAL["walk"], **options})


@pytest.fixture(autouse=True)
def suite(monkeypatch):
    module = types.ModuleType("windy_suite")
    module.USUAL, module.make_walk = {"walk": {"wind": 0.0, "stormy": False}}, make_walk
    monkeypatch.setitem(sys.modules, "windy_suite", module)
    monkeypatch.setitem(SUITES, "walk", _Suite("windy_suite:make_walk", "numpy", 1))
    return module


def train(folder, *, total, **changes):
    run = RunFolder(folder)
    env = run.make_env(**changes) if run.exists else make_env("walk:left", seed=3, **changes)
    with env:
        config = ONLINE_CONFIG.replace(eval_interval=0, eval_at_end=False)
        trainer = Trainer(toy(env), config, run.callbacks(env, progress=False))
        trainer.train(env, total_steps=total, resume="auto")
    return run


def test_the_config_of_a_run_holds_options_that_were_not_given(tmp_path, suite):
    run = train(tmp_path, total=4, wind=0.25)
    settings = run.settings()
    assert settings["env"]["wind"] == 0.25
    assert settings["env_defaults"] == {"action_repeat": 1, "time_limit": 20, "stormy": False}
    # A later version with other defaults changes nothing of the run.
    suite.USUAL = {"walk": {"wind": 9.0, "stormy": True}}
    with run.make_env() as env:
        world = env._backend._envs[0].env
        assert (world.wind, world.stormy, world.time_limit) == (0.25, False, 20)
    assert train(tmp_path, total=8).settings()["env_defaults"] == {}


def test_giving_the_usual_value_is_no_change_and_another_one_is_refused(tmp_path):
    train(tmp_path, total=4)
    train(tmp_path, total=6, wind=0.0)
    for change, message in (({"wind": 0.5}, r"wind=0\.0, these have 0\.5"), ({"stormy": True}, "stormy=False")):
        with pytest.raises(ConfigError, match=message):
            train(tmp_path, total=8, **change)


def test_an_option_that_was_given_cannot_be_left_out(tmp_path):
    train(tmp_path, total=4, wind=0.5)
    config = ONLINE_CONFIG.replace(eval_interval=0, eval_at_end=False)
    with make_env("walk:left", seed=3) as env:
        trainer = Trainer(toy(env), config, RunFolder(tmp_path).callbacks(env, progress=False))
        with pytest.raises(ConfigError, match=r"wind=0\.5, these have 0\.0"):
            trainer.train(env, total_steps=8, resume="auto")


def test_usual_values_are_those_of_the_environment():
    with make_env("Pendulum-v1", action_repeat=2) as env:
        assert effective_defaults(env) == {"time_limit": 200}
    with make_env("Pendulum-v1", time_limit=30) as env:
        assert effective_defaults(env) == {"action_repeat": 1}
    with make_env(Walk) as env:
        assert effective_defaults(env) == {}
    assert usual_options("walk:left") == {"wind": 0.0, "stormy": False}
    assert usual_options("Pendulum-v1") == usual_options(Walk) == usual_options(None) == {}


@pytest.mark.parametrize(
    ("suite_name", "expected"),
    [
        ("atari", {"image_size": 96, "gray": True, "sticky": True, "noops": 0, "all_actions": True}),
        ("atari100k", {"image_size": 64, "gray": False, "sticky": False, "noops": 30, "all_actions": False}),
        ("crafter", {"image_size": 64}),
        ("dmc_vision", {"image_size": 64}),
        ("dmc", {}),
    ],
)
def test_suites_say_their_usual_options(suite_name, expected):
    assert usual_options(f"{suite_name}:task") == expected
