"""Tiny environments with known optimal returns, and some that fail. Import no JAX: workers import this module."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Walk(gym.Env):
    """Left or right on a line with seeded noise; ends at ±3, after a seeded number of steps by truncation.

    A function of seed and actions. Episodes are 1 to about 12 steps long; some terminate and some are truncated.
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
    """:class:`Walk` with a nested dict observation, a dict of all kinds of actions, and frames to render."""

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
        image = np.full((8, 8, 3), 10 * self.steps, np.uint8)
        body = {"position": np.array([self.position, self.steps], np.float32), "parity": np.int64(self.steps % 2)}
        return {"camera": image, "body": body}


class Corridor(gym.Env):
    """Termination only. Walking right ``length`` times pays 1, every step costs 0.1. Optimum: 1 − 0.1·length."""

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
    """Truncation only: ``x ← x + a``, a in ±2; reward ``1 − x²``, 10 steps from x = 1. Optimum: 10 (a = −1, then 0)."""

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
    """Dict observation. The image (all 0 or 255) gives the first action that pays ½, the vector's sign the second.

    Each episode is one step and terminates. Optimum: 1; with only one of the observations ¾. The vector is ±10, because
    a world model would not encode a small one: its reconstruction error would be less than the KL of one bit.
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
    """:class:`Walk` that fails when the file ``fault`` exists: it removes the file and fails as the content says.

    The content is ``raise``, ``hang``, ``exit`` or ``kill``, with ``-reset`` appended to fail in the next reset instead
    of the next step. With ``always-raise`` the file stays.
    """

    def __init__(self, fault):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        self._fail_if_asked("-reset")
        return super().reset(seed=seed)

    def step(self, action):
        self._fail_if_asked("")
        return super().step(action)

    def _fail_if_asked(self, suffix):
        try:
            with open(self.fault, encoding="utf-8") as file:
                fault = file.read()
        except FileNotFoundError:
            return
        if fault == "always-raise":
            raise ValueError("broken for good")
        if fault.endswith("-reset") != bool(suffix):
            return
        try:
            os.rename(self.fault, f"{self.fault}-{os.getpid()}")  # only one of several processes succeeds
        except FileNotFoundError:
            return
        fault = fault.removesuffix("-reset")
        if fault == "raise":
            raise ValueError("the simulator exploded")
        if fault == "exit":
            os._exit(7)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


class Nan(Steady):
    """Returns NaN from its third step on."""

    def step(self, action):
        obs, *rest = super().step(action)
        return (obs * np.nan if self.steps >= 3 else obs), *rest


def broken_build():
    """Raises instead of returning an environment."""
    raise FileNotFoundError("no such level: 7")


def jax_modules_env():
    """An environment whose first observation is 1 if the process has imported JAX, else 0."""
    import sys

    class Imports(Corridor):
        observation_space = spaces.Box(0, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.float32([any(name.split(".")[0] in ("jax", "jaxlib", "flax") for name in sys.modules)]), {}

    env = Imports()
    env.observation_space = Imports.observation_space
    return env
