"""Tiny environments whose optimum is known, and some that misbehave. Import no JAX: workers import this module."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Walk(gym.Env):
    """Left or right on a line with seeded noise; ends at ±3, after a seeded number of steps by truncation.

    Rows depend on seed and actions alone, episodes are 1 to about 12 steps long, and both kinds of end occur.
    """

    observation_space = spaces.Box(-10, 10, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.limit = int(self.np_random.integers(1, 13))
        self.position, self.steps = self.np_random.normal(), 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        self.position += (2 * action - 1) + 0.5 * self.np_random.normal()
        terminated = abs(self.position) > 3
        return self._obs(), self.position, terminated, self.steps >= self.limit, {}

    def _obs(self):
        return np.array([self.position, self.steps])


class WalkPicture(Walk):
    """:class:`Walk` with a nested dict observation and a dict of all kinds of actions, and a picture to render."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "body": spaces.Dict({"position": spaces.Box(-10, 10, (2,)), "parity": spaces.Discrete(2)}),
        }
    )
    action_space = spaces.Dict(
        {"way": spaces.Discrete(2), "push": spaces.Box(-2, 4, (2,)), "keys": spaces.MultiDiscrete([2, 3])}
    )

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(int(action["way"]))

    def render(self):
        return np.full((16, 16, 3), self.steps, np.uint8) if self.render_mode == "rgb_array" else None

    def _obs(self):
        picture = np.full((8, 8, 3), 10 * self.steps, np.uint8)
        body = {"position": np.array([self.position, self.steps], np.float32), "parity": np.int64(self.steps % 2)}
        return {"camera": picture, "body": body}


class Corridor(gym.Env):
    """Termination only. Walk right ``length`` times for a reward of 1; every step costs 0.1. Best: 1 − 0.1·length."""

    def __init__(self, length=5):
        self.length = length
        self.observation_space, self.action_space = spaces.Discrete(length + 1), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = 0
        return self.position, {}

    def step(self, action):
        self.position = min(self.length, max(0, self.position + (1 if action == 1 else -1)))
        arrived = self.position == self.length
        return self.position, (1.0 if arrived else 0.0) - 0.1, arrived, False, {}


class Steady(gym.Env):
    """Truncation only: ``x ← x + a``, reward ``1 − x²``, 10 steps from x = 1 (a in ±2). Best: a = −1, then 0; 10."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, length=10):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = np.float32(1), 0
        return np.array([self.x]), {}

    def step(self, action):
        self.x = self.x + action[0]
        self.steps += 1
        return np.array([self.x]), float(1 - self.x**2), False, self.steps >= self.length, {}


class Lamp(gym.Env):
    """Dict observation. The picture (all 0 or 255) says which first switch pays ½, the vector's sign which second.

    One step an episode, terminating; with either observation alone ¾ can be had. Best: 1. The vector is ±10: a world
    model has no use for less, whose reconstruction is worth less than a bit of latent costs.
    """

    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (8, 8, 3), np.uint8), "sign": spaces.Box(-10, 10, (1,))}
    )
    action_space = spaces.MultiDiscrete([2, 2])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bright, self.sign = self.np_random.integers(2, size=2)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), float(np.mean(action == np.array([self.bright, self.sign]))), True, False, {}

    def _obs(self):
        return {"image": np.full((8, 8, 3), 255 * self.bright, np.uint8), "sign": np.float32([20 * self.sign - 10])}


class Faulty(Walk):
    """:class:`Walk` that fails when a file named ``fault`` exists: it removes the file, then does what it said.

    The content is ``raise``, ``hang``, ``exit`` or ``kill``, with ``-reset`` appended for the next reset instead of
    the next step. ``always-raise`` stays.
    """

    def __init__(self, fault):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        self._maybe("-reset")
        return super().reset(seed=seed)

    def step(self, action):
        self._maybe("")
        return super().step(action)

    def _maybe(self, place):
        try:
            with open(self.fault, encoding="utf-8") as file:
                what = file.read()
        except FileNotFoundError:
            return
        if what == "always-raise":
            raise ValueError("broken for good")
        if what.endswith("-reset") != bool(place):
            return
        try:
            os.rename(self.fault, f"{self.fault}-{os.getpid()}")  # of several processes one gets it
        except FileNotFoundError:
            return
        what = what.removesuffix("-reset")
        if what == "raise":
            raise ValueError("the simulator exploded")
        if what == "exit":
            os._exit(7)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


class Nan(Steady):
    """Returns NaN from its third step on."""

    def step(self, action):
        obs, *rest = super().step(action)
        return (obs * np.nan if self.steps >= 3 else obs), *rest


def broken_build():
    """A function whose environment cannot be built."""
    raise FileNotFoundError("no such level: 7")


def jax_modules_env():
    """An environment whose first observation says whether the process has imported JAX."""
    import sys

    class Imports(Corridor):
        observation_space = spaces.Box(0, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.float32([any(name.split(".")[0] in ("jax", "jaxlib", "flax") for name in sys.modules)]), {}

    env = Imports()
    env.observation_space = Imports.observation_space
    return env
