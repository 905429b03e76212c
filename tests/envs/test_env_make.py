"""The specs and options that ``make_env`` accepts, and the errors for the others."""

import importlib.util

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled
from tiny_envs import Corridor, Lamp, Steady, Walk, WalkPicture

from worldloom.envs import make_env
from worldloom.envs.wrappers import FrameStack, resize
from worldloom.errors import ConfigError, MissingDependencyError


@pytest.mark.parametrize("parallel", ["sync", "subprocess"])
def test_ids_classes_and_functions_make_environments(parallel):
    for spec, options in (
        ("CartPole-v1", {}),
        (Corridor, {"length": 3}),
        (lambda length: Corridor(length), {"length": 3}),
    ):
        with make_env(spec, 2, parallel=parallel, **options) as env:
            time_step = env.reset()
            assert time_step.is_first.all()
            assert len(time_step.obs) == 2
            assert env.obs_shape == (4,)


def test_ids_registered_in_this_process_work_in_workers():
    gym.register("worldloom-test/Corridor-v0", entry_point=Corridor, kwargs={"length": 4}, max_episode_steps=9)
    try:
        with make_env("worldloom-test/Corridor-v0", parallel="subprocess") as env:
            env.reset()
            assert (env.obs_shape, env.episode_length) == ((5,), 9)
    finally:
        gym.registry.pop("worldloom-test/Corridor-v0")


def test_an_object_is_a_single_environment():
    env = make_env(Corridor(3))
    env.reset()
    assert env.step([1]).obs[0].argmax() == 1
    for change in ({"num_envs": 2}, {"parallel": "subprocess"}, {"length": 4}):
        with pytest.raises(ConfigError, match="already configured"):
            make_env(Corridor(3), **change)


def test_environments_with_different_spaces_are_refused():
    lengths = [3, 4]
    with pytest.raises(ConfigError, match="must have the same spaces"):
        make_env(lambda: Corridor(lengths.pop()), 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("CartPole-v77",), "provides versioned environments"),
        (("nobody/Nothing-v0",), "Namespace nobody not found"),
        (("dmcc:cartpole_swingup",), r"neither a suite .* Did you mean 'dmc'\?"),
        ((3,), "an id, a function, an object of Gymnasium or one in JAX, not int"),
        ((lambda: 3,), "returned a int; a gymnasium.Env is needed"),
        (("CartPole-v1", 0), "num_envs"),
        (("CartPole-v1", 2.0), "num_envs"),
    ],
)
def test_invalid_specs_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        make_env(*arguments)


@pytest.mark.parametrize(
    "option",
    [
        {"parallel": "threads"},
        {"seed": -1},
        {"seed": 1.5},
        {"action_repeat": 0},
        {"time_limit": 0},
        {"time_limit": 2.5},
        {"image_size": -1},
        {"frame_stack": 0},
    ],
)
def test_invalid_options_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        make_env("CartPole-v1", **option)


@pytest.mark.parametrize("spec", ["dmc:cartpole_swingup", "dmc_vision:walker_walk", "atari:pong", "crafter:reward"])
def test_the_error_for_a_missing_package_names_its_extra(spec, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"worldloom\[envs\]"):
        make_env(spec)


def test_images_are_resized_and_stacked():
    env = make_env(WalkPicture, image_size=4)
    assert env.obs_shape["camera"] == (4, 4, 3)
    time_step = env.reset()
    assert (time_step.obs["camera"] == 0).all()
    with pytest.raises(ConfigError, match="no uint8 image"):
        make_env(Walk, image_size=4)
    with pytest.raises(ConfigError, match="needs one uint8 image"):
        make_env(Lamp, frame_stack=3)


class StepImages(Steady):
    """Images that show the number of the step, written into the same array each time."""

    observation_space = gym.spaces.Box(0, 255, (6, 4, 3), np.uint8)
    screen = np.zeros((6, 4, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._image(), {}

    def step(self, action):
        _, *rest = super().step(action)
        return self._image(), *rest

    def _image(self):
        self.screen[:] = [10 * self.steps, 10 * self.steps + 1, 10 * self.steps + 2]
        return self.screen


def test_frames_are_stacked_channel_first_oldest_first():
    env = FrameStack(StepImages(), 3)
    assert env.observation_space.shape == (9, 6, 4)
    stacks = [env.reset()[0], *(env.step(np.zeros(1))[0] for _ in range(3)), env.reset()[0]]
    expected = [[0, 0, 0], [0, 0, 10], [0, 10, 20], [10, 20, 30], [0, 0, 0]]
    for stack, tens in zip(stacks, expected, strict=True):
        np.testing.assert_array_equal(stack[:, 2, 1], np.add.outer(tens, [0, 1, 2]).ravel())
        assert (stack == stack[:, :1, :1]).all()


@pytest.mark.parametrize(
    ("shape", "size"), [((210, 160, 3), 64), ((210, 160, 1), 96), ((9, 13, 3), 20), ((8, 8, 3), 8)]
)
def test_resizing_agrees_with_pillows_bilinear(shape, size):
    image_module = pytest.importorskip("PIL.Image")
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for channel in range(shape[-1]):
        channel_image = image_module.fromarray(image[..., channel])
        pillow = np.asarray(channel_image.resize((size, size), image_module.BILINEAR))
        ours = resize(image, size)[..., channel]
        assert np.abs(ours.astype(int) - pillow).max() <= 1
    constant = np.full(shape, 77, np.uint8)
    assert (resize(constant, size) == 77).all()


def test_settings_make_the_same_environments_again():
    with make_env("CartPole-v1", 2, seed=3, action_repeat=2, sutton_barto_reward=True) as env:
        first = env.reset()
        with make_env(**env.settings) as again:
            np.testing.assert_array_equal(again.reset().obs, first.obs)
            assert (again.num_envs, again.action_repeat, again.settings) == (2, 2, env.settings)
        with env.another(5, seed=4) as other:
            assert other.settings == {**env.settings, "num_envs": 5, "seed": 4}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("crafter", "crafter:reward"),
        ("CrafterReward-v1", "crafter:reward"),
        ("CrafterNoReward-v1", "crafter:noreward"),
        ("dmc", "dmc:cartpole_swingup"),
        ("atari", "atari:pong"),
        ("dm_control/cartpole-swingup-v0", "dmc:cartpole_swingup"),
        ("ALE/Pong-v5", "atari:pong"),
        ("ALE/SpaceInvaders-v5", "atari:space_invaders"),
        ("PongNoFrameskip-v4", "atari:pong"),
        ("dm_control:cartpole-swingup", "dmc:cartpole_swingup"),
        ("Crafter:reward", "crafter:reward"),
    ],
)
def test_names_of_other_packages_get_the_spelling_used_here(name, meant, monkeypatch):
    for known in [each for each in gym.registry if each.lower().startswith(("ale/", "crafter", "dm_control", "pong"))]:
        monkeypatch.delitem(gym.registry, known)
    with pytest.raises(ConfigError, match=f"'{meant}'"):
        make_env(name)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("HalfCheetah-v5", "MuJoCo is not installed", "pip install 'gymnasium\\[mujoco\\]'"),
        ("LunarLander-v3", "Box2D is not installed", "pip install 'gymnasium\\[box2d\\]'"),
        ("Odd-v0", "no such thing, `pip install odd-things`.", "pip install odd-things"),
    ],
)
def test_a_missing_simulator_is_one_sentence_with_the_line_that_installs_it(name, text, line, monkeypatch):
    def missing(*args, **options):
        raise DependencyNotInstalled(text)

    gym.register("Odd-v0", missing)
    try:
        monkeypatch.setattr(gym, "make", missing)
        with pytest.raises(MissingDependencyError, match=f"{name} needs a package.*: {line}"):
            make_env(name)
    finally:
        del gym.registry["Odd-v0"]
