"""Small models and environments of every kind of space, for the tests of acting."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom import create_world_model
from worldloom.envs import EnvSpaces
from worldloom.spaces.actions import ActionSpec
from worldloom.spaces.observations import ObservationSpec

TDMPC2 = {"latent_dim": 8, "hidden_dim": 8, "encoder_dim": 8, "num_bins": 11, "num_samples": 16, "num_elites": 4}
TDMPC2 |= {"num_pi_trajs": 2, "iterations": 2, "num_q": 2, "episode_length": 10, "precision": "float32"}
DREAMER = {"deter_dim": 16, "stoch_dim": 8, "num_categories": 4, "hidden_dim": 16, "mlp_layers": 1, "blocks": 2}
DREAMER |= {"reward_layers": 1, "continue_layers": 1, "bins": 21, "precision": "float32"}


class World(gym.Env):
    """Observations drawn from its space, whatever the actions, which must be of theirs."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or self.observation_space
        self.action_space = action_space or self.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), 0.0, False, self.steps >= 5, {}


class Arm(World):
    """A float64 vector, and continuous actions with bounds of their own."""

    observation_space = spaces.Box(-2, 2, (3,), np.float64)
    action_space = spaces.Box(np.float32([-2, 0]), np.float32([4, 1]))


class Buttons(World):
    """A class as observation and as action; neither starts at 0."""

    observation_space = spaces.Discrete(4, start=1)
    action_space = spaces.Discrete(3, start=-1)


class Camera(World):
    """An image."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (2,))


class Robot(World):
    """A dict with an image, a vector and a class, and every kind of action."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (48, 48, 3), np.uint8),
            "joints": spaces.Box(-10, 10, (2,)),
            "gear": spaces.Discrete(2),
        }
    )
    action_space = spaces.Dict(
        {"way": spaces.Discrete(2), "push": spaces.Box(-2, 4, (2,)), "keys": spaces.MultiDiscrete([2, 3])}
    )


def small(family, env=Arm, seed=0, **overrides):
    """A model for the spaces of ``env``."""
    own = EnvSpaces.of_env(env())
    observations, actions = ObservationSpec(own.observation), ActionSpec(own.action)
    sizes = dict(TDMPC2 if family == "tdmpc2" else DREAMER)
    if family == "tdmpc2" and len(observations.shape) == 3:
        sizes["latent_dim"] = 512
    shapes = {"obs_shape": observations.shape, "action_dim": actions.dim, "action_type": actions.type}
    return create_world_model(f"{family}:tiny", **shapes, **{**sizes, **overrides}, device="cpu", seed=seed)


def equal(one, other):
    """Whether actions are equal, in nested dicts and tuples too."""
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return np.array_equal(one, other)
