"""Options of environments are refused at the door where they have another name, or a value of another kind."""

import gymnasium as gym
import numpy as np
import pytest

from worldloom.cli.train import _flags
from worldloom.envs import make_env
from worldloom.errors import ConfigError


class Leaky(gym.Env):
    """An environment that takes any option."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, slope: float = 1, name="a", limit=1.0, path="x", kind: bool = False, **more):
        self.more = more


@pytest.fixture
def leaky():
    gym.register("Leaky-v0", entry_point=Leaky, kwargs={"kind": True})
    yield "Leaky-v0"
    del gym.registry["Leaky-v0"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"g": "abc"}, r"The option g of Pendulum-v1 is a number like 10, not 'abc'"),
        ({"gravity": 9.0}, r"Pendulum-v1 has no option 'gravity'; its options are g"),
        ({"max_episode_steps": 9}, "is called time_limit here"),
    ],
)
@pytest.mark.parametrize("parallel", ["sync", "subprocess"])
def test_options_of_gymnasium(options, said, parallel):
    with pytest.raises(ConfigError, match=said):
        make_env("Pendulum-v1", parallel=parallel, **options)


def test_options_that_fit_arrive():
    with make_env("Pendulum-v1", g=5) as env:
        assert env.settings["g"] == 5


def test_an_environment_that_takes_any_option_gets_it(leaky):
    # A default is one of the values that an option may have.
    for options in ({"colour": "red"}, {"slope": 2}, {"limit": "auto"}, {"limit": None}, {"path": 3}, {"kind": 0}):
        with make_env(leaky, **options) as env:
            assert options.items() <= env.settings.items()
    with pytest.raises(ConfigError, match="The option slope of Leaky-v0 is a number like 1, not 'x'"):
        make_env(leaky, slope="x")
    with pytest.raises(ConfigError, match="The option kind of Leaky-v0 is true or false, not 'maybe'"):
        make_env(leaky, kind="maybe")


def test_values_of_several_kinds_are_gymnasiums_own():
    for options in ({"is_slippery": 0}, {"is_slippery": np.False_}, {"map_name": None}, {"map_name": "8x8"}):
        with make_env("FrozenLake-v1", **options) as env:
            env.reset()
    pytest.importorskip("mujoco")
    with make_env("Ant-v5", main_body="torso", terminate_when_unhealthy=0) as env:
        assert env.settings["main_body"] == "torso"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noop": 3}, r"atari100k has no option 'noop'; its options are all_actions, gray, noops, sticky.*noops"),
        ({"noops": "abc"}, "The option noops of atari100k is a number like 30, not 'abc'"),
        ({"noops": -3}, "noops must be an integer ≥ 0, not -3"),
        ({"noops": 1.5}, "noops must be an integer ≥ 0, not 1.5"),
        ({"sticky": "maybe"}, "The option sticky of atari100k is true or false, not 'maybe'"),
        ({"sticky": 7}, "true or false, not 7"),
    ],
)
def test_options_of_atari(options, said):
    pytest.importorskip("ale_py")
    with pytest.raises(ConfigError, match=said):
        make_env("atari100k:pong", **options)


def test_options_of_the_other_suites():
    pytest.importorskip("dm_control")
    with pytest.raises(ConfigError, match=r"dmc has no option 'cam'; its options are camera.*camera"):
        make_env("dmc:cartpole_swingup", cam=1)
    with pytest.raises(ConfigError, match="camera must be an integer ≥ -1, not 'front'"):
        make_env("dmc:cartpole_swingup", camera="front")
    pytest.importorskip("crafter")
    with pytest.raises(ConfigError, match="crafter has no option 'area'; its options are none"):
        make_env("crafter:reward", area=9)


def test_an_option_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--env-option was given g=1 and g=2; give one"):
        _flags(None).parse(["--env-option", "g=1", "--env-option", "a=3", "--env-option=g=2"])
